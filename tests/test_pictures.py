"""The pictures of the documents: their scripts run, and draw the committed files."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
DRAWN = ("conversation", "window", "packed", "memory")


def run(script: str, *words: str) -> None:
    command = [sys.executable, str(PICTURES / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def words_of(path: Path) -> list[str]:
    """All texts of a picture; letters are shapes, above which matplotlib writes the text as a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def size(path: Path) -> list[float]:
    """Width and height, in points; fails if the file is not well-formed."""
    return [float(value) for value in ET.parse(path).getroot().attrib["viewBox"].split()[2:]]


def test_the_committed_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    run("draw.py", str(tmp_path))
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(DRAWN)
    for name in DRAWN:
        drawn, committed = tmp_path / f"{name}.svg", PICTURES / f"{name}.svg"
        assert words_of(drawn) == words_of(committed), f"run python docs/pictures/draw.py: {name}.svg is outdated"
        assert size(drawn) == pytest.approx(size(committed), rel=1e-3)


def test_the_pictures_say_what_the_documents_say() -> None:
    tokens = words_of(PICTURES / "conversation.svg")[:39]  # docs/tour.md: 39 tokens, 22 of them targets
    assert (tokens[0], tokens[17], tokens[38]) == ("&lt;s&gt;", '{"', "&lt;/s&gt;")
    shown = words_of(PICTURES / "memory.svg")
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    peaks = [word for word in shown if word.endswith(" GB") and not word.startswith("90 %")]
    assert len(peaks) == 4
    in_text = {f"{float(value):.1f} GB" for value in re.findall(r"\d+\.\d+", text)}
    assert set(peaks) <= in_text


@pytest.mark.parametrize("path", sorted(PICTURES.glob("*.svg")), ids=lambda path: path.stem)
def test_a_picture_is_small_and_names_no_place_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    size(path)
    assert path.stat().st_size < 200_000
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert 'href="http' not in text


def test_a_document_shows_each_picture() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = re.findall(
        r"\]\((?:docs/)?pictures/(\w+)\.svg\)", "".join(page.read_text(encoding="utf-8") for page in pages)
    )
    assert sorted(shown) == sorted(path.stem for path in PICTURES.glob("*.svg"))


@pytest.mark.slow
def test_the_pictures_of_the_readme_come_from_a_run(tmp_path: Path) -> None:
    run("demo.py", str(tmp_path), "training.max_steps=3", "data.max_samples=60", "evaluation.prompts=3")
    texts = [text.text or "" for text in ET.parse(tmp_path / "terminal.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "$ python train.py configs/tiny.py"
    for shown in ("data", "training", "plan", "step 3", "verdict", "result"):
        assert any(text.startswith(shown) for text in texts), shown
    assert size(tmp_path / "curves.svg")
