"""What a checkpoint costs training: the demo with a save after every step, and without.

    python bench/save.py              5 rounds of 60 steps, about 6 minutes on 2 cores; writes bench/save.json and .md
    python bench/save.py --rounds 1

Three contenders in fresh processes, in rotated order: no saves; a save after every step in the background, as in
train.py; the same while training waits. The time of a step is that between two lines of metrics.jsonl, saves included,
so the cost of a save is the difference of the medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contender import HERE
from step import machine, say, versions

ROOT = HERE.parent
CONTENDERS = {"no saves": (0, False), "in the background": (1, False), "while training waits": (1, True)}
RUN = """
import sys
sys.path.insert(0, {root!r})
import train
from nanoft.checkpoint import AsyncCheckpointWriter
if {wait}:
    train.AsyncCheckpointWriter = lambda checkpoints, _: AsyncCheckpointWriter(checkpoints, lambda: 0.0)  # no copies
sys.exit(train.main({arguments!r}))
"""


def run(save_steps: int, wait: bool, steps: int) -> dict[str, list[float]]:
    """Seconds of each step; of each save, how long training waited and how long until it was on the disk."""
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory) / "run"
        changes = {
            "training.max_steps": steps,
            "training.log_steps": 1,
            "training.eval_steps": 0,
            "training.save_steps": save_steps,
            "evaluation.prompts": 0,
            "data.validation_split": 0.01,
            "logging.progress_bar": "false",
            "output.dir": where,
        }
        arguments = [str(ROOT / "configs" / "tiny.py"), *(f"{name}={value}" for name, value in changes.items())]
        text = RUN.format(root=str(ROOT), wait=wait, arguments=arguments)
        subprocess.run([sys.executable, "-c", text], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines if line["event"] == "train"][5:-1]  # without warm-up and the last step
    saves = [line for line in lines if line["event"] == "checkpoint" and line["step"] > 5]
    return {
        "step": [later - earlier for earlier, later in itertools.pairwise(times)],
        "waited": [line["waited_seconds"] for line in saves],
        "seconds": [line["seconds"] for line in saves],
    }


def contest(rounds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Medians of each round, by contender."""
    names = list(CONTENDERS)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            ran = run(*CONTENDERS[name], steps)
            results[name].append({key: statistics.median(values) if values else 0.0 for key, values in ran.items()})
            say(f"round {number + 1}: {name}: {results[name][-1]}")
    return results


def report(results: dict[str, list[dict[str, float]]]) -> str:
    plain = [one["step"] for one in results["no saves"]]
    rows = []
    for name, rounds in results.items():
        lost = sorted(100 * (one["step"] / without - 1) for one, without in zip(rounds, plain, strict=True))
        middle = {key: statistics.median(one[key] for one in rounds) * 1000 for key in rounds[0]}
        share = f"{statistics.median(lost):.1f} ({lost[0]:.1f} to {lost[-1]:.1f}) %" if name != "no saves" else ""
        rows.append(
            f"| {name} | {middle['step']:.0f} ms | {share} | {middle['waited']:.1f} ms | {middle['seconds']:.0f} ms |"
        )
    return "\n".join(
        [
            "# What a checkpoint costs",
            "",
            f"{machine()}; {versions()}; the demo (configs/tiny.py), {len(plain)} rounds. Written by `bench/save.py`.",
            "Median over the rounds (and their range). A save after every step is the worst case; the slowdown",
            "is that of one step.",
            "",
            "| saves | time per step | slowdown | training waited | on the disk after |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=HERE / "save", help="without a suffix")
    args = parser.parse_args(argv)
    results: dict[str, Any] = contest(args.rounds, args.steps)
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(report(results), encoding="utf-8")
    print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
