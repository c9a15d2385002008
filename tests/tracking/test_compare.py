"""Comparing runs, and following one while it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import training, write_events

from nanoft.__main__ import main
from nanoft.tracking import compare
from nanoft.tracking.plots import Events, read_events
from nanoft.tracking.run import Run

ROOT = Path(__file__).parents[2]


def cells(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_runs_are_compared_by_what_differs_and_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rank, steps in (("a", 8, 20), ("b", 16, 40)):
        config = {
            "lora": {"rank": rank, "alpha": 8.0},
            "output": {"dir": name},
            "provenance": {"data_sha256": "d" * 64},
        }
        write_events(tmp_path / name, training(steps), b'{"half' if name == "b" else b"")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    report = {"tuned": {"exact_match": 0.625}, "training": {"seconds": 125.0, "tokens_per_second": 3000.4}}
    (tmp_path / "b" / "report.json").write_text(json.dumps(report))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    table = cells(said)
    assert table[""] == ["a", "b"]
    assert table["lora.rank"] == ["8", "16"]
    assert not {"lora.alpha", "output.dir", "data_sha256"} & table.keys()  # the same, or only a place
    assert table["steps"] == ["20", "40"]
    assert table["best eval loss"] == ["0.3000 (step 20)", "0.1500 (step 40)"]
    assert table["perplexity"] == ["1.35", "1.162"]  # exp(0.3), exp(0.15)
    assert table["exact match"] == ["-", "62.5%"]
    assert table["tokens/s"] == ["90", "3,000"]
    assert table["memory, GB"] == ["1.50", "1.50"]
    assert table["time"] == ["18 s", "2 min 5 s"]
    assert table["state"] == ["not done", "not done"]
    assert "b: skipped 1 damaged lines of metrics.jsonl" in said


def test_tables_fit_80_columns_and_show_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"a-long-name-of-a-run-{n}" for n in range(7)]
    for n, name in enumerate(names):
        config = {"training": {"gradient_accumulation_steps": n}, "data": {"train_file": f"/somewhere/{'x' * 80}/{n}"}}
        write_events(tmp_path / name, training(20))
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for count in (1, 2, 7):
        assert main(["compare", *(str(tmp_path / name) for name in names[:count])]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        shown = [cell.strip() for line in lines if line.startswith("| steps") for cell in line.split("|")[2:-1]]
        assert shown == ["20"] * count
        ends = [c.strip()[-2:] for line in lines if line.startswith("| data.train") for c in line.split("|")[2:-1]]
        assert ends == [f"/{n}" for n in range(count)] * (count > 1)


def test_damaged_files_beside_it_do_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a", "[" * 99_999), ("b", '{"training": [], "tuned": 3, "lora": 5, "provenance": "x"}')):
        write_events(tmp_path / name, [])
        for file in ("config.json", "report.json"):
            (tmp_path / name / file).write_text(text)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert cells(capsys.readouterr().out)["steps"] == ["0", "0"]


def test_one_plot_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    runs = [str(write_events(tmp_path / name, training(30))) for name in ("a", "b")]
    assert main(["compare", *runs, "--plot", str(tmp_path / "all.svg")]) == 0
    text = (tmp_path / "all.svg").read_text()
    assert 'id="run.0"' in text
    assert 'id="run.1"' in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: the following arguments are required: RUN"),
        (["nowhere"], "error: nowhere: has no metrics.jsonl"),
        (["--follow", "a", "b"], "error: --follow: shows one run"),
        (["--follow", __file__], f"error: --follow: {__file__}: not a directory"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_the_dashboard_tells_where_the_run_stands(tmp_path: Path) -> None:
    events = [{"event": "memory", "step": 0, "total_steps": 60}, *training(30)]
    events += [{"event": "warning", "step": 30, "what": f"w{n}", "text": "\x1b[2J hf_" + "x" * 34} for n in range(5)]
    lines = compare.dashboard("a", read_events(write_events(tmp_path, events, b"half")))
    text = "\n".join(lines)
    assert lines[0] == "a  step 30 of 60 (50%)"
    assert "eval loss 0.2000, best 0.2000 at step 30" in text
    assert [f"w{n}" in text for n in range(5)] == [False, False, True, True, True]
    assert "\x1b" not in text
    assert "hf_" not in text
    assert lines[-1] == "skipped 1 damaged lines"
    assert compare.dashboard("a", Events()) == ["a: has not started"]


def test_following_waits_for_a_run_and_ends_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nanoft", "compare", "--follow", str(tmp_path / "run"), "--every", "0.05"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        time.sleep(0.5)
        with Run.open(tmp_path / "run") as run:
            run.open_metrics(0, [0, 0], [])
            for step in (1, 2, 3):
                run.log("train", step, loss=1.0 / step)
                time.sleep(0.1)
            assert process.poll() is None
            run.log("done", 3, steps=3)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.startswith("run  step 3  done\nstep 3 train: loss 0.3333\n")  # once, outside a terminal


def test_following_a_run_that_nobody_works_on_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.open(tmp_path / "run") as run:
        run.open_metrics(0, [0, 0], [])
        run.log("train", 1, loss=1.0)
        thread = threading.Thread(target=compare.follow, args=(run.directory, 0.05))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()  # somebody does
    thread.join(10)
    assert not thread.is_alive()
    assert "stopped before its end" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_terminal_is_drawn_anew(
    columns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_events(tmp_path / "run", [*training(10), {"event": "done", "step": 10}])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert compare.follow(tmp_path / "run", 0.05) == 0
    said = capsys.readouterr().out
    assert said.startswith(compare.HOME)
    assert max(map(len, said.removeprefix(compare.HOME).splitlines())) <= columns + 3
    assert said.count("█") > 10
    assert "run  step 10  done" in said
