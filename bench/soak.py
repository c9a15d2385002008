"""A long run with injected faults: does it leak memory, lose a step, or write a broken line?

    python bench/soak.py                  20,000 steps of a small model: a quarter of an hour on one core
    python bench/soak.py --steps 1000

train.py runs on the base of the embedded demo with synthetic data; it saves every 25 steps and evaluates every 100. Now
and then its process receives SIGKILL or SIGTERM, and the same command is run again. In each process some losses are
NaN, and one save fails because the disk is full. From outside, every half second: resident memory, open files, threads,
and the new lines of metrics.jsonl. The growth of memory is the median slope between all pairs of readings of one
process (Theil-Sen), without its first third. Results are written to bench/soak.json and bench/soak.md; exit code 1
means that a check failed.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path += [str(ROOT / "tests" / "faults"), str(HERE), str(ROOT)]

from harness import Fault, inject  # noqa: E402
from step import machine, versions  # noqa: E402

EVERY_S = 0.5  # between two readings
NAMES = {-9: "killed", 75: "asked to stop", 2: "refused by the disk", 0: "ended"}  # meaning of the exit codes
SETTINGS = [
    *("lora.rank=4", "lora.dropout=0.1", "lora.target_modules=q_proj", "data.validation_split=0.1"),
    *("training.micro_batch_size=2", "training.gradient_accumulation_steps=2", "training.learning_rate=1e-4"),
    *("training.log_steps=1", "training.eval_steps=100", "training.save_steps=25", "training.keep_checkpoints=3"),
    *("evaluation.prompts=4", "evaluation.max_new_tokens=4", "logging.progress_bar=false"),
    *("logging.show_example=false", "system.device=cpu", "system.threads=1"),
]


def theil_sen_slope(points: list[tuple[float, float]]) -> float:
    """The median slope between all pairs of points (Theil, 1950; Sen, 1968)."""
    slopes = [(y - b) / (x - a) for (a, b), (x, y) in itertools.combinations(points, 2) if x != a]
    return statistics.median(slopes) if slopes else 0.0


@dataclass
class Metrics:
    """Follows metrics.jsonl as it grows, and records what is wrong with it."""

    path: Path
    inode: int = 0
    offset: int = 0
    step: int = 0
    lines: int = 0
    wrong: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)

    def update(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_ino != self.inode:  # rewritten by a process that resumed at an earlier step
                self.inode, self.offset, self.step = os.fstat(file.fileno()).st_ino, 0, 0
                self.events.clear()
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        for line in whole.splitlines():
            self.read(line)

    def read(self, line: bytes) -> None:
        self.lines += 1
        try:
            values = json.loads(line)
        except ValueError:
            self.wrong.append(f"not JSON: {line[:80]!r}")
            return
        self.events[values.get("what", values["event"])] += 1
        if values["event"] == "train":
            if values["step"] != self.step + 1:
                self.wrong.append(f"step {values['step']} after step {self.step}")
            self.step = values["step"]


@dataclass
class Process:
    """The readings of one process: (step, resident bytes, open files, threads)."""

    readings: list[tuple[int, int, int, int]] = field(default_factory=list)
    code: int = 0

    def steady(self) -> list[tuple[int, int, int, int]]:
        """The readings during training, without the first third and those after the last step."""
        last = max((reading[0] for reading in self.readings), default=0)
        training = [reading for reading in self.readings if 0 < reading[0] < last]
        return training[len(training) // 3 :]


def soak(directory: Path, steps: int, seed: int) -> tuple[list[Process], Metrics, Counter[str]]:
    """Train to the end, restarting after each fault."""
    chance, disturbed = random.Random(seed), Counter[str]()
    data = directory / "data.jsonl"
    records = [{"prompt": f"Say {n} {'again ' * (n % 5)}", "completion": f"{n}" * (1 + n % 3)} for n in range(200)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = [*SETTINGS, f"training.max_steps={steps}", f"data.train_file={data}", f"output.dir={directory / 'run'}"]
    metrics, processes = Metrics(directory / "run" / "metrics.jsonl"), []
    while not processes or processes[-1].code != 0:
        nan = tuple(sorted(chance.sample(range(1, 2 * steps), steps // 100)))
        fault = Fault(str(errno.ENOSPC), at=chance.randrange(1000), nan=nan)
        until = metrics.step + chance.randint(max(1, steps // 40), steps // 5)
        end = chance.choice([signal.SIGKILL, signal.SIGTERM]) if until < steps else None
        processes.append(watch(settings, fault, metrics, until, end, directory))
        code = processes[-1].code
        disturbed[NAMES.get(code, f"exit code {code}")] += 1
        readings = len(processes[-1].readings)
        print(f"step {metrics.step:,} of {steps:,}: exit code {code}, {readings} readings", file=sys.stderr)
        if len(processes) > 200:
            metrics.wrong.append("200 processes did not get to the end")
            break
    return processes, metrics, disturbed


def watch(settings: list[str], fault: Fault, metrics: Metrics, until: int, end: int | None, directory: Path) -> Process:
    """Run one process, take readings, and send it the signal `end` after step `until`."""
    seen, begun = Process(), metrics.step
    command = [sys.executable, __file__, "--inside", json.dumps(asdict(fault)), *settings]
    with open(directory / "out", "ab") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        handle = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(EVERY_S)
            metrics.update()
            try:
                sizes = handle.memory_info().rss, handle.num_fds(), handle.num_threads()
                seen.readings.append((metrics.step if metrics.step > begun else 0, *sizes))
            except psutil.Error:  # the process has just ended
                continue
            if end is not None and metrics.step >= until:
                process.send_signal(end)
                end = None
    metrics.update()
    seen.code = process.returncode
    return seen


def figures(processes: list[Process], metrics: Metrics, disturbed: Counter[str]) -> dict[str, Any]:
    long = [process.steady() for process in processes if len(process.steady()) >= 20]
    slopes = [theil_sen_slope([(step, rss) for step, rss, _, _ in readings]) * 1000 / 1e6 for readings in long]
    grown = [readings[-1][1] - readings[0][1] for readings in long]

    def change(column: int) -> int:
        """The largest change of the median reading between the two halves of a process."""
        halves = [(readings[: len(readings) // 2], readings[len(readings) // 2 :]) for readings in long]
        medians = [[statistics.median(reading[column] for reading in half) for half in pair] for pair in halves]
        return int(max((abs(b - a) for a, b in medians), default=0))

    return {
        "steps": metrics.step,
        "processes": len(processes),
        **{f"processes_{name.replace(' ', '_')}": count for name, count in disturbed.items()},
        "windows_skipped": metrics.events["step skipped"],
        "saves_failed": sum(count for what, count in metrics.events.items() if what.startswith("saving step")),
        "rollbacks": metrics.events["rolled back"],
        "evaluations": metrics.events["eval"],
        "readings": sum(len(process.readings) for process in processes),
        "lines_read": metrics.lines,
        "wrong_lines": len(metrics.wrong),
        "processes_long_enough": len(long),
        "rss_mb": round(max((reading[1] for readings in long for reading in readings), default=0) / 1e6, 1),
        "rss_mb_per_1000_steps": round(statistics.median(slopes), 3) if slopes else None,
        "rss_mb_per_1000_steps_worst": round(max(slopes), 3) if slopes else None,
        "rss_mb_grown_worst": round(max(grown) / 1e6, 2) if grown else None,
        "open_files": max((reading[2] for readings in long for reading in readings), default=0),
        "open_files_change": change(2),
        "threads": max((reading[3] for readings in long for reading in readings), default=0),
        "threads_change": change(3),
    }


def kept(found: dict[str, Any], steps: int) -> dict[str, bool]:
    """The checks."""
    flat = found["rss_mb_per_1000_steps"] is None or found["rss_mb_per_1000_steps"] < 1
    return {
        "every step once, every line complete": found["wrong_lines"] == 0 and found["steps"] == steps,
        "memory flat (below 1 MB in 1,000 steps)": flat,
        "open files and threads constant": found["open_files_change"] == found["threads_change"] == 0,
        "no exit code but 0, 75, -9, and 2 for the full disk": not any(
            name.startswith("processes_exit") for name in found
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "soak", help="without a suffix")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        found = figures(*(parts := soak(Path(scratch), args.steps, args.seed)))
    promises = kept(found, args.steps)
    settings = {"machine": machine(), "versions": versions(), "seconds": round(time.monotonic() - started)}
    lines = ["# A long run with injected faults", "", f"{settings['machine']}; {settings['versions']}."]
    lines += ["Written by `bench/soak.py`, which says how.", "", "| | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in {**found, **settings}.items()][:-3]
    lines += ["", *(f"- {'passed' if good else 'FAILED'}: {name}" for name, good in promises.items())]
    lines += [f"  {wrong}" for wrong in parts[1].wrong[:10]]
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = {**settings, "figures": found, "promises": promises, "wrong": parts[1].wrong[:100]}
    args.out.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0 if all(promises.values()) else 1


def inside(fault: str, settings: list[str]) -> int:
    """One process of the run, with its faults."""
    import train

    inject(Fault(**json.loads(fault)))
    return train.main([str(ROOT / "configs" / "tiny.py"), *settings])


if __name__ == "__main__":
    sys.exit(inside(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["--inside"] else main())
