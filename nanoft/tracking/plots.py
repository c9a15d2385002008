"""The curves of a run: reads metrics.jsonl back, in whatever state it is, and plots it.

    python -m nanoft plot runs/tiny        writes runs/tiny/plots/curves.png and curves.svg, also during training

Damaged lines are counted and skipped: the run may have been killed in the middle of one. Curves are black and differ in
dashes and markers, so they survive printing; the same metrics.jsonl gives the same bytes. During training, plots are
drawn in a separate process (nanoft/tracking/trackers.py), so this module imports neither torch nor anything that does.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.io.atomic import replace_file
from nanoft.io.untrusted import one_line, parse_json

UNDATED: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # metadata
PANELS = [  # label of the axis -> curves: name, event, key
    ("loss, nats per target token", [("loss", "train", "loss"), ("eval loss", "eval", "loss")]),
    ("learning rate", [("learning rate", "train", "learning_rate")]),
    ("gradient norm", [("grad norm", "train", "grad_norm")]),
    ("tokens/s", [("all", "train", "tokens_per_second"), ("targets", "train", "target_tokens_per_second")]),
    ("memory, GB", [("peak", "train", "peak_memory_gb"), ("held", "train", "device_held_gb")]),
]
DASHES = ["-", "--", ":", "-."]
MARKS = ["o", "s", "^", "x", "D"]  # 5 markers x 4 dashes: 20 runs look different
STYLE = {
    "svg.hashsalt": "nanoft",  # names of clip paths; otherwise random
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "0.85",
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Events:
    """The valid lines of a metrics.jsonl, in order, and the number of damaged ones."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] in kinds]

    def series(self, event: str, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a curve; missing and non-finite values are NaN, which leaves a gap."""
        lines = self.of(event)
        return [float(line["step"]) for line in lines], [number(line.get(key)) for line in lines]

    def finite(self, event: str, key: str) -> list[float]:
        return [value for value in self.series(event, key)[1] if math.isfinite(value)]

    def last(self, event: str, key: str) -> float:
        """The newest finite value; NaN if there is none."""
        return (self.finite(event, key) or [math.nan])[-1]

    def best(self) -> dict[str, Any] | None:
        """The first evaluation with the lowest loss."""
        finite = [line for line in self.of("eval") if math.isfinite(number(line.get("loss")))]
        return min(finite, key=lambda line: line["loss"], default=None)


def number(value: Any) -> float:
    """A finite number as float; NaN for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= sys.float_info.max else math.nan


def read_events(directory: Path) -> Events:
    """The events of a run directory; none if the run has not started."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return Events()
    if not path.is_file():
        raise UserError(f"{path}: not a regular file: give a run directory")
    events = [as_event(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    valid = [event for event in events if event is not None]
    return Events(valid, len(events) - len(valid))


def as_event(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is damaged."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    is_event = isinstance(values, dict) and isinstance(values.get("event"), str)
    return values if is_event and math.isfinite(number(values.get("step"))) else None


def draw(directory: Path) -> list[Path]:
    """Write plots/curves.png and plots/curves.svg of a run; returns their paths."""
    picture, folder = figure(read_events(directory), directory.resolve().name), directory / "plots"
    folder.mkdir(exist_ok=True)
    return [save(picture, folder / "curves.png"), save(picture, folder / "curves.svg")]


def figure(events: Events, title: str) -> Any:
    """A matplotlib Figure with one panel for each of `PANELS`."""
    with style():
        from matplotlib.figure import Figure

        picture = Figure(figsize=(7, 2 * len(PANELS)), dpi=100, layout="constrained")
        picture.suptitle(plain(title))
        for axes, (name, curves) in zip(picture.subplots(len(PANELS), sharex=True), PANELS, strict=True):
            axes.set_ylabel(name)
            for index, (label, event, key) in enumerate(curves):
                curve(axes, events.series(event, key), label, index, f"{event}.{key}")
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
            curve(axes, events.series("eval", "loss"), plain(name), index, f"run.{index}", few=sys.maxsize)
        axes.legend(loc="upper right")
    return picture


def curve(axes: Any, points: tuple[list[float], list[float]], label: str, index: int, gid: str, few: int = 40) -> None:
    """Plot (steps, values) in the style number `index`, up to `few` points with markers; `gid` is its id in an SVG."""
    mark = MARKS[index % len(MARKS)] if len(points[0]) <= few else ""
    looks = {"color": "black", "linewidth": 1.0, "markersize": 3.5, "markerfacecolor": "white"}
    axes.plot(*points, DASHES[index % len(DASHES)], marker=mark, label=label, gid=gid, **looks)


def style() -> Any:
    """A context with matplotlib's defaults and `STYLE`, whatever the user's matplotlibrc says."""
    try:
        import matplotlib.style
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install -e '.[plot]'") from None
    return matplotlib.style.context(["default", STYLE])


def save(picture: Any, path: Path) -> Path:
    """Write a figure atomically, in the format of its suffix, without a timestamp; returns its path."""
    if path.suffix not in UNDATED:
        raise UserError(f"{path}: unknown plot format: use one of {', '.join(UNDATED)}")
    buffer = io.BytesIO()
    with style():
        picture.savefig(buffer, format=path.suffix[1:], metadata=UNDATED[path.suffix])
    replace_file(path, buffer.getvalue())  # a viewer sees the old picture or the new one
    return path


def plain(text: str) -> str:
    """A name escaped for matplotlib, which reads `$...$` as a formula and hides labels that start with `_`."""
    return ("\u200b" if text.startswith("_") else "") + one_line(text).replace("$", r"\$")


def run(args: argparse.Namespace) -> int:
    """`python -m nanoft plot RUN`; returns the exit code."""
    if not Path(args.run).is_dir():
        raise UserError(f"{args.run}: no such run directory")
    for path in draw(Path(args.run)):
        print(path)
    return 0
