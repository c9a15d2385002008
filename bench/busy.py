"""A training step beside other processes: how much of its quiet speed is left, by how threads wait for one another.

    python bench/busy.py                          needs an idle machine; writes bench/busy.md
    python bench/busy.py --rounds 1 --neighbors 2 --steps 3

Each row is a way to wait, set in the environment before torch is imported; `auto` is what train.py decides by the load
(nanoft/runtime/cores.py). A neighbor is a process that computes all the time. Fresh processes, in an order that rotates
every round; tokens/s are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from contender import HERE
from step import in_process, machine, own_command, prepared

from nanoft.runtime.cores import SLEEP, SPIN, allowed_cores

WAYS: dict[str, dict[str, str]] = {
    "auto": {},
    "OpenMP's default": {},
    **{f"{name}={value}": {name: value} for name, value in (SLEEP, SPIN, (SPIN[0], "1000"), (SPIN[0], "100"))},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def speed(way: str, neighbors: int, steps: int) -> float:
    """Tokens/s of a step of bench/step.py's small shape beside so many neighbors."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbors)]
    command = [*own_command("nanoft"), "--steps", str(steps)]
    command = prepared(command) if way == "auto" else command
    others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    os.environ.clear()
    os.environ.update({**others, **WAYS[way]})
    try:
        return float(in_process(command, 600.0)["tok_s"])
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--neighbors", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {(way, n): [] for way in WAYS for n in (0, args.neighbors)}
    for number in range(args.rounds):
        order = list(found)
        for way, neighbors in order[number:] + order[:number]:
            found[way, neighbors].append(speed(way, neighbors, args.steps))
            print(f"{way}, {neighbors} neighbors: {found[way, neighbors][-1]:,.0f} tokens/s", flush=True)
    best = max(statistics.median(found[way, 0]) for way in WAYS)
    lines = [
        f"| | quiet | {args.neighbors} busy | quiet, share of the best | busy, share of it |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        quiet, busy = (statistics.median(found[way, n]) for n in (0, args.neighbors))
        lines.append(f"| {way} | {quiet:,.0f} | {busy:,.0f} | {quiet / best:.2f} | {busy / best:.2f} |")
    about = f"{len(allowed_cores())} cores, {machine()}; rounds: {args.rounds}. Written by `bench/busy.py`."
    text = f"# A step beside a busy process, tokens/s\n\n{about}\n\n" + "\n".join(lines) + "\n"
    (HERE / "busy.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
