"""A run's metrics.jsonl as curves: read back, whatever state it is in, and drawn.

    python -m nanoft plot runs/tiny        writes runs/tiny/plots/curves.png and curves.svg, also while it runs

The file may be of a run that is going on, or that was killed in the middle of a line: what is not a whole event is
counted and passed over. Curves are drawn in black, told apart by dashes and marks, so that they survive a printer; the
same file gives the same bytes (one version of matplotlib assumed), so that a plot can be kept under version control.

train.py draws in a process of its own (nanoft/sinks.py): this module therefore imports neither torch nor anything that
does, and matplotlib only where it draws.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.io.untrusted import one_line, parse_json

EXTRA = "needs matplotlib: pip install -e '.[plot]'"
KINDS = (".png", ".svg", ".pdf")
PANELS = [  # what is told -> its curves: name, event, key
    ("loss, nats per target token", [("loss", "train", "loss"), ("eval loss", "eval", "loss")]),
    ("learning rate", [("learning rate", "train", "learning_rate")]),
    ("gradient norm", [("grad norm", "train", "grad_norm")]),
    ("tokens/s", [("all", "train", "tokens_per_second"), ("targets", "train", "target_tokens_per_second")]),
    ("memory, GB", [("peak", "train", "peak_memory_gb"), ("held", "train", "device_held_gb")]),
]
DASHES = ["-", "--", ":", "-."]
MARKS = ["o", "s", "^", "x", "D"]  # five and four: the twenty-first run looks like the first
FEW = 40  # points; so many or fewer are marked, since one alone makes no line
STYLE = {
    "svg.hashsalt": "nanoft",  # names of clip paths: else they are drawn by lot
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "0.85",
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Events:
    """The whole lines of a metrics.jsonl, in order, and how many were not whole."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] in kinds]

    def series(self, event: str, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a curve; NaN, which leaves a gap, for what is missing or was not finite."""
        lines = self.of(event)
        return [float(line["step"]) for line in lines], [number(line.get(key)) for line in lines]

    def last(self, event: str, key: str) -> float:
        """The newest finite value; NaN if there is none."""
        return next((v for v in reversed(self.series(event, key)[1]) if math.isfinite(v)), math.nan)

    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest loss, the first of equals."""
        finite = [line for line in self.of("eval") if math.isfinite(number(line.get("loss")))]
        return min(finite, key=lambda line: line["loss"], default=None)


def number(value: Any) -> float:
    """A finite number as float; NaN for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= sys.float_info.max else math.nan


def read_events(directory: Path) -> Events:
    """What metrics.jsonl of a run directory says; nothing, if the run has not begun.

    Raises:
        UserError: the file is there and cannot be read.
    """
    path = directory / "metrics.jsonl"
    if not path.exists():
        return Events()
    if not path.is_file():
        raise UserError(f"{path}: not a plain file")
    events = [as_event(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    whole = [event for event in events if event is not None]
    return Events(whole, len(events) - len(whole))


def as_event(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is not a whole one."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    is_event = isinstance(values, dict) and isinstance(values.get("event"), str)
    return values if is_event and math.isfinite(number(values.get("step"))) else None


def draw(directory: Path) -> list[Path]:
    """The curves of a run in its plots/, as curves.png and curves.svg; returns their paths.

    Raises:
        UserError: matplotlib is not installed.
        OSError: the disk refuses.
    """
    picture = figure(read_events(directory), directory.resolve().name)
    (directory / "plots").mkdir(exist_ok=True)
    paths = [directory / "plots" / f"curves{kind}" for kind in (".png", ".svg")]
    for path in paths:
        save(picture, path)
    return paths


def figure(events: Events, title: str) -> Any:
    """A matplotlib Figure with a panel for each of `PANELS`, one above the other."""
    with style():
        from matplotlib.figure import Figure

        picture = Figure(figsize=(7, 2 * len(PANELS)), dpi=100, layout="constrained")
        picture.suptitle(plain(title))
        for axes, (name, curves) in zip(picture.subplots(len(PANELS), sharex=True), PANELS, strict=True):
            axes.set_ylabel(name)
            for index, (label, event, key) in enumerate(curves):
                curve(axes, *events.series(event, key), label, index, gid=f"{event}.{key}")
            if len(curves) > 1:
                axes.legend(loc="upper right")
        axes.set_xlabel("optimizer step")
    return picture


def comparison(runs: dict[str, Events]) -> Any:
    """A matplotlib Figure with the eval-loss curves of several runs, by name."""
    with style():
        from matplotlib.figure import Figure

        picture = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
        axes = picture.subplots()
        axes.set_ylabel("eval loss, nats per target token")
        axes.set_xlabel("optimizer step")
        for index, (name, events) in enumerate(runs.items()):
            curve(axes, *events.series("eval", "loss"), plain(name), index, gid=f"run.{index}", marked=True)
        axes.legend(loc="upper right")
    return picture


def curve(
    axes: Any, steps: Sequence[float], values: Sequence[float], label: str, index: int, gid: str, marked: bool = False
) -> None:
    """One line; the `index` decides how it looks, `gid` is its name in an SVG."""
    mark = MARKS[index % len(MARKS)] if marked or len(steps) <= FEW else ""
    looks = {"color": "black", "linewidth": 1.0, "markersize": 3.5, "markerfacecolor": "white"}
    axes.plot(steps, values, DASHES[index % len(DASHES)], marker=mark, label=label, gid=gid, **looks)


def style() -> Any:
    """matplotlib's own defaults and `STYLE`, whatever the user's matplotlibrc says, while the block lasts.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ImportError:
        raise UserError(f"a plot {EXTRA}") from None
    return matplotlib.style.context(["default", STYLE])


def save(picture: Any, path: Path) -> None:
    """Write a figure in one go, in the format of its name, without the time of day in it."""
    if path.suffix not in KINDS:
        raise UserError(f"{path}: a plot is one of {', '.join(KINDS)}: give the file such a name")
    buffer = io.BytesIO()
    dates = {".svg": "Date", ".pdf": "CreationDate"}
    undated = {dates[path.suffix]: None} if path.suffix in dates else {}
    with style():
        picture.savefig(buffer, format=path.suffix[1:], metadata=undated)
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    aside.write_bytes(buffer.getvalue())
    os.replace(aside, path)  # a viewer sees the old picture or the new one


def plain(text: str) -> str:
    """A name as it is: matplotlib would read what stands between two dollars as a formula, and `_` hides a label."""
    return ("\u200b" if text.startswith("_") else "") + one_line(text).replace("$", r"\$")


def main(argv: list[str]) -> int:
    """`python -m nanoft plot RUN`; one line on stderr for a mistake."""
    try:
        if len(argv) != 1 or argv[0].startswith("-"):
            raise UserError("usage: python -m nanoft plot RUN")
        if not Path(argv[0]).is_dir():
            raise UserError(f"{argv[0]}: no such run directory")
        for path in draw(Path(argv[0])):
            print(path)
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
