"""The output of `train.py configs/tiny.py` at 80 and 120 columns, stored as text in which every digit is a 9.

The output of the other commands fits into 80 columns, too, except paths and texts of the data.
"""

from __future__ import annotations

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
from tiers import rest_is_slow

ROOT = Path(__file__).parent.parent
SCREEN = ROOT / "tests" / "screens" / "train.txt"
FEW = [
    "data.max_samples=60",
    "training.max_steps=2",
    "evaluation.prompts=3",
    "logging.report_to=none",
    "system.device=cpu",
]
DATA = re.compile(
    r"example | prompt: | wanted: |   base: |  tuned: |  .* -> ."
)  # texts of the data, as long as they are


TRAIN = ("train.py", str(ROOT / "configs" / "tiny.py"), "output.dir=run", *FEW)
OTHERS = [
    (*TRAIN, "--plan"),
    ("eval.py", "run", "--compare-base"),
    ("merge.py", "run", "--out", "merged"),
    ("-m", "nanoft", "compare", "run", "run"),
]


def screen(columns: int, place: Path, arguments: tuple[str, ...] = TRAIN) -> str:
    """All that a command shows in a terminal, without what the progress bar overwrites."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [sys.executable, *(str(ROOT / word) if word.endswith(".py") else word for word in arguments)]
    own = {**os.environ, "XDG_CACHE_HOME": str(place), "PYTHONPATH": str(ROOT)}  # nothing is from the cache
    process = subprocess.Popen(command, cwd=place, env=own, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # the end of a terminal
        pass
    os.close(master)
    assert process.wait() == 0, shown.decode()
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown.decode()).replace("\r\n", "\n")
    lines = [line.rpartition("\r")[2].rstrip() for line in plain.splitlines()]
    return "\n".join(line for line in lines if line and "%|" not in line) + "\n"


def normalized(text: str) -> str:
    """Wrapped lines joined, numbers as 9, columns and data without their width."""
    lines = [line for line in re.sub(r"\n {9,}", " ", text).splitlines() if not DATA.match(line)]
    text = "\n".join(lines).replace(str(ROOT), ".").replace("threads", "thread")
    text = re.sub(r"(?<![A-Za-z_])[+-]?\d[\d,.]*(e[+-]\d+)?", "9", text)
    return re.sub(r"-{3,}", "---", re.sub(r"(?<=\S) +", " ", text)) + "\n"


def too_long(shown: str, columns: int) -> list[str]:
    lines = [line for line in shown.splitlines() if len(line) > columns and not DATA.match(line)]
    return [line for line in lines if str(ROOT) not in line]


@pytest.mark.parametrize("columns", rest_is_slow([80, 120], 80))
def test_a_run_fits_the_terminal_and_looks_as_it_did(columns: int, tmp_path: Path) -> None:
    """After an intended change: WRITE_SCREENS=1 pytest -n0 tests/test_screens.py, and look at the difference."""
    shown = screen(columns, tmp_path)
    assert too_long(shown, columns) == []
    for arguments in OTHERS if columns == 80 else ():
        assert too_long(screen(columns, tmp_path, arguments), columns) == []
    if os.environ.get("WRITE_SCREENS"):
        SCREEN.write_text(normalized(shown), encoding="utf-8")
    assert normalized(shown) == SCREEN.read_text(encoding="utf-8")
