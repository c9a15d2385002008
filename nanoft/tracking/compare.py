"""Compare runs, or follow one while it trains. Only metrics.jsonl and other files of the run directory are read.

python -m nanoft compare runs/a runs/b --plot both.svg      a table, and the eval losses in one plot
python -m nanoft compare runs/a runs/b --html both.html     the same as a page, with each run's report
python -m nanoft compare runs/a --follow                    curves in the terminal until the run ends
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.io.atomic import replace_file
from nanoft.io.tables import format_duration, markdown_table
from nanoft.io.untrusted import one_line, read_json_or_empty
from nanoft.tracking import page, plots
from nanoft.tracking.plots import Events, number, read_events
from nanoft.tracking.run import may_be_running

IGNORED = ("logging", "output", "provenance")  # sections that do not change what is trained
HOME, REST = "\x1b[H\x1b[2J", "\x1b[0J"  # clear the screen and go to its top; clear below the cursor


def run(args: argparse.Namespace) -> int:
    """`python -m nanoft compare RUN... [--follow]`; returns the exit code."""
    if not args.follow:
        files = [Path(name) if name else None for name in (args.plot, args.html)]
        return compare([Path(name) for name in args.runs], *files)
    if len(args.runs) > 1 or args.plot or args.html:
        raise UserError("--follow: shows one run: remove the other runs, --plot and --html")
    return follow(Path(args.runs[0]), max(0.05, args.every))


# ---- Side by side


def compare(directories: Sequence[Path], plot: Path | None = None, html: Path | None = None) -> int:
    """Print a table of runs: the settings that differ, then the figures; draw their eval losses; write a page."""
    directories = list(dict.fromkeys(directories))  # without duplicates
    for directory in directories:
        if not (directory / "metrics.jsonl").is_file():
            raise UserError(f"{directory}: has no metrics.jsonl: give the directory of a run that has started")
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):  # ambiguous: show the whole paths
        names = [str(directory) for directory in directories]
    names = [one_line(name).replace("|", "/") for name in names]
    runs = dict(zip(names, (read_events(directory) for directory in directories), strict=True))
    settings = [settings_of(directory) for directory in directories]
    keys = dict.fromkeys(key for one in settings for key in one)
    differ = [key for key in keys if len({str(one.get(key)) for one in settings}) > 1]
    rows = []
    for key in differ:
        values = [value if isinstance(value := one.get(key), str) else json.dumps(value) for one in settings]
        rows.append([key, *(one_line(value).replace("|", "/") for value in values)])
    reports = [read_json_or_empty(directory / "report.json") for directory in directories]
    columns = [figures(events, report) for events, report in zip(runs.values(), reports, strict=True)]
    rows += [[key, *(column[key] for column in columns)] for key in columns[0]]
    print("\n\n".join(side_by_side(["", *names], rows)))
    if html:
        replace_file(html, page_of_runs(dict(zip(names, directories, strict=True)), runs, rows))
        print(f"page      {html}")
    for name, events in runs.items():
        if events.damaged:
            print(f"{name}: skipped {events.damaged:,} damaged lines of metrics.jsonl")
    if plot:
        plots.save(plots.comparison(runs), plot)
        print(f"plot      {plot}")
    return 0


def side_by_side(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Tables of at most 80 columns, each with as many runs as fit; texts that are too long show their end."""
    room = 80 - len("|  |") - max(len(row[0]) for row in rows)
    widest = max(len(text) for row in [header, *rows] for text in row[1:])
    width = min(max(widest, 15), max(19, room // (len(header) - 1) - 3))  # 19: 12.3456 (step 1000)
    fitting = max(1, room // (width + 3))
    for first in range(1, len(header), fitting):
        part = [[row[0], *row[first : first + fitting]] for row in [header, *rows]]
        cut = [[row[0], *(t if len(t) <= width else f"...{t[3 - width :]}" for t in row[1:])] for row in part]
        yield markdown_table(cut[0], cut[1:])


def page_of_runs(directories: dict[str, Path], runs: dict[str, Events], rows: list[list[str]]) -> bytes:
    """Several runs in one page: settings that differ, figures, eval losses, and the reports."""
    names, pictures = list(directories), {}
    text = f"# {', '.join(names)}\n\n{markdown_table(['', *names], rows)}\n"
    if importlib.util.find_spec("matplotlib"):
        text += "\n## Eval loss\n\n![eval loss](losses)\n"
        pictures["losses"] = plots.encode(plots.comparison(runs), ".svg").decode()
    body = page.from_markdown(text, pictures)
    for name, directory in directories.items():
        body += f"<details><summary>{escape(name)}</summary>\n{page.report_of(directory)}\n</details>\n"
    return page.document(", ".join(names), body)


def settings_of(directory: Path) -> dict[str, Any]:
    """section.field -> value in config.json, and the hashes of data and base; empty if it is missing or damaged."""
    tree = read_json_or_empty(directory / "config.json")
    sections = {name: part for name, part in tree.items() if isinstance(part, dict) and name not in IGNORED}
    found = {f"{name}.{key}": value for name, part in sections.items() for key, value in part.items()}
    hashes = _part(tree, "provenance")
    return found | {key: str(hashes[key])[:12] for key in ("data_sha256", "base_sha256") if key in hashes}


def figures(events: Events, report: dict[str, Any]) -> dict[str, str]:
    """Results of a run as text; from its report if there is one, otherwise from what was logged so far."""
    training = _part(report, "training")
    best, last = events.best(), events.last("eval", "loss")
    speeds = events.finite("train", "tokens_per_second")
    times = [t for t in (number(line.get("time")) for line in events.lines) if math.isfinite(t)]
    took = number(training.get("seconds")) if training else max(times, default=math.nan) - min(times, default=math.nan)
    speed = number(training.get("tokens_per_second")) if training else statistics.median(speeds or [math.nan])
    return {
        "steps": f"{max((line['step'] for line in events.lines), default=0):g}",
        "best eval loss": f"{best['loss']:.4f} (step {best['step']:g})" if best else "-",
        "last eval loss": _figure(last, "{:.4f}"),
        "perplexity": _figure(math.exp(min(best["loss"], 700.0)) if best else math.nan, "{:.4g}"),
        "exact match": _figure(number(_part(report, "tuned").get("exact_match")), "{:.1%}"),
        "tokens/s": _figure(speed, "{:,.0f}"),
        "memory, GB": _figure(max(events.finite("train", "peak_memory_gb"), default=math.nan), "{:.2f}"),
        "time": format_duration(took) if math.isfinite(took) else "-",
        "state": "done" if events.of("done") else "not done",
    }


def _part(report: dict[str, Any], key: str) -> dict[str, Any]:
    part = report.get(key)
    return part if isinstance(part, dict) else {}


def _figure(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"


# ---- One run, live


def follow(directory: Path, every_s: float) -> int:
    """Redraw the state of a run until it is done or no process owns it any more; outside a terminal, only its end."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--follow: {directory}: not a directory: give a run directory")
    lock, goes_on = directory / ".lock", True
    while goes_on:
        # Checked before the file is read. The lock is not taken; its note names the process that owns the run.
        note = lock.read_text("utf-8", errors="replace").strip() if lock.is_file() else ""
        is_running = not (directory / "metrics.jsonl").exists() or may_be_running(note)
        events, width = read_events(directory), shutil.get_terminal_size((80, 24)).columns - 1
        goes_on = is_running and not events.of("done")
        picture = "\n".join(line[:width] for line in dashboard(directory.name, events, width))
        if sys.stdout.isatty():
            print(HOME + picture + REST, flush=True)
        if goes_on:
            time.sleep(every_s)
    if not sys.stdout.isatty():
        print(picture)
    if not events.of("done"):
        print(f"{directory}: stopped before its end: run the same train.py command again to resume")
    return 0


def event_line(event: dict[str, Any]) -> str:
    """A train or warning event as text: step 20 train: loss 1.234, grad norm 0.5, ..."""
    train = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb")
    names = train if event["event"] == "train" else ("what", "text", "error")
    short = {"learning_rate": "lr", "tokens_per_second": "tok/s", "peak_memory_gb": "GB"}
    values = {short.get(name, name.replace("_", " ")): event[name] for name in names if name in event}
    parts = [f"{name} {f'{v:.4g}' if isinstance(v, (int, float)) else v}" for name, v in values.items()]
    return one_line(f"step {event['step']:g} {event['event']}: {', '.join(parts)}")


def dashboard(name: str, events: Events, width: int = 72) -> list[str]:
    """The state of a run as lines of text."""
    name = one_line(name)
    if not events.lines:
        return [f"{name}: has not started"]
    step = max(line["step"] for line in events.lines)
    total = max([number(line.get("total_steps")) for line in events.of("memory") if "total_steps" in line] or [0.0])
    head = f"{name}  step {step:g}" + (f" of {total:g} ({step / total:.0%})" if total else "")
    lines = [head + "  done" * bool(events.of("done"))]
    if train := events.of("train")[-1:]:
        lines.append(event_line(train[0]))
    if best := events.best():
        lines.append(f"eval loss {events.last('eval', 'loss'):.4f}, best {best['loss']:.4f} at step {best['step']:g}")
    lines += ["", *plots.loss_chart(events, width)]
    lines += ["", "gradient norm", *plots.chart(events.series("train", "grad_norm"), width=width, height=4)]
    recent = events.of("warning")[-3:]
    lines += ["", *(event_line(line) for line in recent)] if recent else []
    if events.damaged:
        lines.append(f"skipped {events.damaged:,} damaged lines")
    return lines
