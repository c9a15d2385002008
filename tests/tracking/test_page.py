"""report.html: the figures of report.md, every tag closed, every text escaped, no external references."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from runs import training, write_events

import train
from nanoft.__main__ import main
from nanoft.tracking import page, plots

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
HOSTILE = '<script src="https://a.example/x.js">alert(1)</script> & "quoted" \\| $title </td></table>'
REPORT = f"""\
# run

**Verdict.** Better: perplexity from 3.5 to 1.25 (-64.3%).

**Warning.** {HOSTILE}.

|            | base | tuned |
|------------|------|-------|
| perplexity | 3.5  | 1.25  |
| a \\| b    | -    | < 0.1 |

## Curves

![curves](plots/curves.png)

### Answers side by side

```
 prompt: {HOSTILE}
 wanted: 17: seventeen
   base: 16
  tuned: ``` **not bold** </pre>

 prompt: two
 wanted:{" "}
   base: 2
  tuned: {HOSTILE}
```

- settings: a=1,
  b=2
data      read 7 records
| records | 7 |
|---------|---|
| 3       | 4 |
"""
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Text and attributes of a page; fails at a tag that is not closed where it must be."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]
        self.references += [value or "" for name, value in attributes if name.rpartition(":")[2] in ("href", "src")]
        assert not [value for _, value in attributes if "://" in (value or "")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] == "style":
            assert "url(" not in text
            assert "@import" not in text
        else:
            self.text += text + " "


def read(path: Path) -> Reader:
    found = Reader(path.read_text("utf-8"))
    assert not {"script", "link", "img", "iframe", "object"} & {*found.tags}
    assert all(reference.startswith("#") for reference in found.references)
    return found


def test_the_page_says_what_the_report_says(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text(REPORT)
    text = " ".join(read(page.write(tmp_path)).text.split())
    for said in (
        "Better: perplexity from 3.5 to 1.25 (-64.3%).",
        "< 0.1",
        "a | b",
        "a=1, b=2",
        "``` **not bold** </pre>",
    ):
        assert said in text
    assert text.count(HOSTILE.replace("\\|", "|")) == 1  # in a sentence, as Markdown shows it
    assert text.count(HOSTILE) == 2  # in answers, as it is
    assert "wanted base tuned" in text  # the head of a table: answers are side by side
    assert "The curves have not been drawn." in text
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_the_page_of_a_run_has_its_curves_and_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    from runs import quick

    run = tmp_path / "run"
    assert train.main(quick(run, training__max_steps=4, logging__plots="end")) == 0
    found = read(run / "report.html")
    figures = re.findall(r"\d[\d,.]*%?", (run / "report.md").read_text())
    assert len(figures) > 50
    assert [figure for figure in figures if figure.rstrip(".,") not in found.text] == []
    assert found.tags.count("svg") == 1
    assert found.text.index("Curves") < found.text.index("optimizer step") < found.text.index("side by side")
    assert "evaluation" in found.text


def test_several_runs_in_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    runs = [write_events(tmp_path / name, training(30)) for name in ("a", "<b>")]
    for run, rank in zip(runs, (3, 4), strict=True):
        (run / "config.json").write_text(json.dumps({"lora": {"rank": rank}}))
    (runs[0] / "report.md").write_text(REPORT)
    assert main(["compare", *map(str, runs), "--html", str(tmp_path / "all.html")]) == 0
    assert f"page      {tmp_path / 'all.html'}" in capsys.readouterr().out
    found = read(tmp_path / "all.html")
    assert found.tags.count("details") == 2
    assert found.tags.count("svg") == 1
    assert "lora.rank 3 " in " ".join(found.text.split())
    assert "from 3.5 to 1.25" in found.text
    assert "has no report yet" in found.text


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    """In Chromium, where no tag of an answer has become an element, and no network was asked for anything."""
    (tmp_path / "report.md").write_text(REPORT)
    write_events(tmp_path, training(30))
    plots.draw(tmp_path)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    address = f"file://{tmp_path / 'report.html'}"
    shown = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "<script" not in shown
    assert shown.count("<svg") == 1
    assert "Better: perplexity from 3.5 to 1.25" in shown
    picture = tmp_path / "page.png"
    subprocess.run(
        [CHROMIUM, *options, f"--screenshot={picture}", address], capture_output=True, timeout=120, check=True
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
