"""Plot the curves of a run from metrics.jsonl, in whatever state that is.

    python -m nanoft plot runs/tiny        writes runs/tiny/plots/curves.png and curves.svg, also during training

Damaged lines are counted and skipped: the run may have been killed in the middle of one. Curves also differ in dashes
and markers, for black-and-white prints; the same metrics.jsonl gives the same bytes. During training,
plots are drawn in a separate process (nanoft/tracking/trackers.py), so this module imports neither torch nor anything
that does. Without matplotlib, `chart` draws the loss as text.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanoft import UserError
from nanoft.io.atomic import replace_file
from nanoft.io.untrusted import one_line, parse_json
from nanoft.tracking import page

UNDATED: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # metadata
EVENTS = [("training", "train"), ("evaluation", "eval")]
PANELS = [  # title -> curves: name, event, key; a panel without data is left out
    ("loss", [(name, kind, "loss") for name, kind in EVENTS]),
    ("reward", [(name, kind, "reward") for name, kind in EVENTS]),
    ("reward of answers", [("chosen", "train", "rewards/chosen"), ("rejected", "train", "rewards/rejected")]),
    ("pairs ranked correctly", [(name, kind, "rewards/accuracies") for name, kind in EVENTS]),
    ("tokens per sampled answer", [(name, kind, "completion_tokens") for name, kind in EVENTS]),
    ("gradient norm", [("gradient norm", "train", "grad_norm")]),
    ("learning rate", [("learning rate", "train", "learning_rate")]),
    ("tokens/s", [("all", "train", "tokens_per_second"), ("targets", "train", "target_tokens_per_second")]),
    ("memory, GB", [("peak", "train", "peak_memory_gb"), ("held", "train", "device_held_gb")]),
]
DASHES = ["-", "--", ":", "-."]
MARKS = ["o", "s", "^", "x", "D"]  # 5 markers x 4 dashes: 20 runs look different
STYLE = {
    "svg.hashsalt": "nanoft",  # names of clip paths; otherwise random
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "0.85",
    "axes.formatter.useoffset": False,
    "axes.formatter.min_exponent": 4,  # 0.01 rather than a power of ten
    "legend.frameon": False,
    "legend.handlelength": 1.5,
    "legend.columnspacing": 1.0,
}
WIDE = 10.0  # a loss whose largest value is this many times its smallest is drawn on a logarithmic axis
BLOCKS = " ▁▂▃▄▅▆▇█"
Curve = tuple[list[float], list[float]]  # steps and values


@dataclass(frozen=True)
class Events:
    """The valid lines of a metrics.jsonl, in order, and the number of damaged ones."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] in kinds]

    def series(self, event: str, key: str) -> Curve:
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
    """Write plots/curves.png and .svg of a run, and update its report.html; returns the paths."""
    picture, folder = figure(read_events(directory), directory.resolve().name), directory / "plots"
    folder.mkdir(exist_ok=True)
    paths = [save(picture, folder / "curves.png"), save(picture, folder / "curves.svg")]
    return [*paths, page.write(directory)] if (directory / "report.md").is_file() else paths


def figure(events: Events, title: str) -> Any:
    """A matplotlib Figure with those of `PANELS` that have data, and the best step marked where evaluations are."""
    hidden = ("eval", "loss") if events.finite("eval", "reward") else ()  # it is the negative reward
    panels = [(name, [c for c in curves if events.finite(*c[1:]) and c[1:] != hidden]) for name, curves in PANELS]
    panels = [panel for panel in panels if panel[1]] or PANELS[:1]
    rows, best = (len(panels) + 1) // 2, events.best()
    best_label = f"best: step {best['step']:g}" if best else ""
    with style():
        from matplotlib.figure import Figure

        picture = Figure(figsize=(10, 2.5 * rows + 0.5), dpi=100, layout="constrained")
        picture.suptitle(plain(title))
        for place, (name, curves) in enumerate(panels, start=1):
            axes = picture.add_subplot(rows, 2, place)
            draw_curves(axes, name, [(label, events.series(*of), ".".join(of)) for label, *of in curves])
            if best and any(event == "eval" for _, event, _ in curves):
                axes.axvline(best["step"], color="0.5", linestyle=":", label=best_label)
                best_label = "_"  # label only one of them: matplotlib hides names that start with _
            if len(curves) > 1:  # above the axes, where it covers no curve
                axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)
    return picture


def is_wide(values: list[float]) -> bool:
    """Whether a logarithmic axis shows more of these values."""
    return bool(values) and min(values) > 0 and max(values) > WIDE * min(values)


def comparison(runs: dict[str, Events]) -> Any:
    """A matplotlib Figure with the eval-loss curves of several runs, by name."""
    with style():
        from matplotlib.figure import Figure

        picture = Figure(figsize=(10, 4.5), dpi=100, layout="constrained")
        curves = [(plain(name), run.series("eval", "loss"), f"run.{n}") for n, (name, run) in enumerate(runs.items())]
        draw_curves(picture.subplots(), "eval loss", curves, few=sys.maxsize)
        picture.legend(loc="outside right upper")
    return picture


def draw_curves(axes: Any, title: str, curves: list[tuple[str, Curve, str]], few: int = 40) -> None:
    """Plot curves, given as label, points and SVG id; those with at most `few` points get markers."""
    axes.set(title=title, xlabel="optimizer step")
    for index, (label, points, gid) in enumerate(curves):
        mark = MARKS[index % len(MARKS)] if len(points[0]) <= few else ""
        looks = {"color": f"C{index % 10}", "linewidth": 1.3, "markersize": 4}
        axes.plot(*points, DASHES[index % len(DASHES)], marker=mark, label=label, gid=gid, **looks)
    if "loss" in title and is_wide([y for _, (_, ys), _ in curves for y in ys if math.isfinite(y)]):
        axes.set_yscale("log")


def chart(curve: Curve, marks: Curve = ([], []), width: int = 79, height: int = 6) -> list[str]:
    """Draw a curve as text, in columns of blocks, and another one as `o`; the axes show the extremes of both."""
    known = [[(x, y) for x, y in zip(*points, strict=True) if math.isfinite(y)] for points in (curve, marks)]
    if not known[0] + known[1]:
        return ["  (no data yet)"]
    xs, ys = zip(*known[0], *known[1], strict=True)
    scale: Any = np.log if is_wide(list(ys)) else np.float64
    low, high, columns = scale(min(ys)), scale(max(ys)), width - 11

    def level(y: Any) -> Any:  # in eighths of a row, from 1
        return np.round((scale(y) - low) / ((high - low) or 1.0) * (8 * height - 1)).astype(int) + 1

    at = np.linspace(min(xs), max(xs), columns)
    tops = level(np.interp(at, *np.transpose(known[0]))) if known[0] else np.zeros(columns, int)
    rows = [[BLOCKS[min(max(top - 8 * row, 0), 8)] for top in tops] for row in range(height)]  # the lowest first
    for x, y in known[1]:
        rows[(level(y) - 1) // 8][np.abs(at - x).argmin()] = "o"
    labels = [f"{min(ys):9.4g}", *[" " * 9] * (height - 2), f"{max(ys):9.4g}"]
    lines = [f"{label} |{''.join(row).rstrip()}" for label, row in zip(labels, rows, strict=True)]
    return [*reversed(lines), f"{'':9} +{f'{min(xs):g}':<{columns - 10}}{f'{max(xs):g}':>10}"]


def loss_chart(events: Events, width: int = 79) -> list[str]:
    """The loss of a run as text, or its reward."""
    key = "reward" if events.finite("train", "reward") else "loss"
    curves = chart(events.series("train", key), events.series("eval", key), width)
    return [f"{key}: training (blocks), evaluation (o), by optimizer step", *curves]


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
    replace_file(path, encode(picture, path.suffix))  # a viewer sees the old picture or the new one
    return path


def encode(picture: Any, suffix: str) -> bytes:
    buffer = io.BytesIO()
    with style():
        picture.savefig(buffer, format=suffix[1:], metadata=UNDATED[suffix])
    return buffer.getvalue()


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
