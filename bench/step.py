"""One optimizer step, nanoft and its peers: how fast, in how much memory, and is it the same step?

    python bench/step.py --shape small                 2 sequences of 1,024 random tokens; ends with one line of JSON
    python bench/step.py --shape masked --nf4 --ckpt   7 of 10 tokens are prompt; 4-bit base; activation checkpointing
    python bench/step.py --shape packed --data a.json  real conversations: nanoft packs them, the peer pads them
    python bench/step.py --shape all --rounds 5        every shape; writes bench/step.json and bench/step.md
    python bench/step.py --environments DIRECTORY      TRL and unsloth, too, from bench/environments.py
    python bench/step.py --peer "python other.py"      another peer with the options and the JSON line of bench/peer.py

The peer is a hand-written loop over transformers + peft. All sides run in fresh processes, one after another, in an
order that rotates every round. They generate the same base weights, adapter and tokens from a seed, so losses and
gradient norms must agree with nanoft's in every step; a peer that differs is not compared. Warm-up steps are discarded.
Tokens per second never count padding; the spread is p10 to p90 over all counted steps. Peak memory is the largest
resident set of the process. Within each round, nanoft's speed is divided by that of the fastest peer, and its memory by
that of the smallest. A control run multiplies matrices of the step's sizes and nothing else, so that speeds can be
given as a share of what the machine can do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contender import EVERY_PEER, HERE, OURS, OWN_PEER, TOLERANCE, add_step_options
from environments import PEERS, python_of

PEER = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'peer.py'))}"
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "long": {"seq": 4096, "bs": 1},
    "masked": {"masked": 0.7},
    "packed": {"packed": 1},
}
GRID = [("small", 0, 0), ("masked", 0, 0), ("small", 1, 0), ("packed", 0, 0), ("small", 0, 1), ("packed", 1, 0)]
GRID += [("long", 0, 0)]  # shape, nf4, ckpt


# ---- The contest


class Failed(Exception):
    """A process without a result; the message is one line."""


def own_command(contender: str) -> list[str]:
    return [sys.executable, str(HERE / "contender.py"), contender]


def flags(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    given = {name: getattr(args, name) for name in names}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def prepared(command: list[str]) -> list[str]:
    """A command of Python, started as nanoft's own: they choose how threads wait and how memory is mapped."""
    program = "from nanoft.runtime.cores import prepare; prepare(); os.execv(sys.executable, sys.argv[1:])"
    return [sys.executable, "-c", f"import os, sys; {program}", *command]


def in_process(command: list[str], timeout_s: float, bounded: bool = True) -> dict[str, Any]:
    """Run a command in a fresh process; its last line is JSON.

    Args:
        bounded: limit its memory to what is free.
    Raises:
        Failed: it failed, took too long, or printed something else.
    """
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout_s,
            preexec_fn=bound_memory if bounded else None,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"timeout after {timeout_s:.0f} s") from None
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    if done.returncode < 0:
        raise Failed(f"ended by signal {-done.returncode}: out of memory?")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]  # warnings may follow
        raise Failed((errors or lines)[-1][:200])
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise Failed("the last line of its output is not JSON") from None
    return result


def bound_memory() -> None:
    """In a child process: fail with an error instead of making the machine swap or kill another process."""
    if sys.platform == "linux":
        with open("/proc/meminfo") as file:
            free_kb = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, (free_kb * 900, free_kb * 900))  # nine tenths of what is free


def contest(args: argparse.Namespace) -> dict[str, Any]:
    """One shape: rounds of both sides, the control, and their summary; failures are part of the result."""
    with tempfile.TemporaryDirectory() as temporary:
        args.ids = Path(temporary) / "ids.npz" if args.packed else None
        os.environ["XDG_CACHE_HOME"] = temporary  # also deletes the tokenized data
        own = flags(args, [*EVERY_PEER, *OWN_PEER])
        commands = {"nanoft": prepared([*own_command("nanoft"), *own, *flags(args, OURS)]), **peer_commands(args, own)}
        try:
            if args.packed:
                in_process([*own_command("pack"), *own, *flags(args, ["data"])], args.timeout_s)
            control = in_process([*own_command("matmul"), *own], args.timeout_s)
        except Failed as error:
            raise SystemExit(f"{case_name(args)}: {error}") from None
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        errors: dict[str, str] = {}
        for number in range(args.rounds):
            for name in rotated(list(commands), number):
                if name in errors:
                    continue
                try:
                    results[name].append(in_process(commands[name], args.timeout_s))
                    say(f"{case_name(args)}: round {number + 1}: {name}: {results[name][-1]['tok_s']:,.0f} tokens/s")
                except Failed as error:
                    errors[name] = str(error)
                    say(f"{case_name(args)}: {name}: {error}")
    return summary(args, results, errors, control)


def peer_commands(args: argparse.Namespace, own: list[str]) -> dict[str, list[str]]:
    """The command of each peer, by its name in the table."""
    if args.peer != PEER:  # it cannot read the texts of a packed shape
        return {args.peer: ["false"] if args.packed else [*shlex.split(args.peer), *flags(args, EVERY_PEER)]}
    found = {"transformers + peft": [*shlex.split(PEER), *own]}
    if args.environments is not None:
        for name in PEERS:
            found[name] = [str(python_of(args.environments / name)), str(HERE / f"peer_{name}.py"), *own]
    return found


def rotated(names: list[str], number: int) -> list[str]:
    """The order of a round: another side is first in the next one."""
    first = number % len(names)
    return names[first:] + names[:first]


def summary(
    args: argparse.Namespace,
    results: dict[str, list[dict[str, Any]]],
    errors: dict[str, str],
    control: dict[str, Any],
) -> dict[str, Any]:
    """The line of JSON: ratios are taken within each round, then their median."""
    sides = {
        name: {"error": errors[name]} if name in errors else side_summary(runs, control)
        for name, runs in results.items()
    }
    peers = [name for name in results if name not in ("nanoft", *errors)]
    checks: dict[str, dict[str, Any]] = {}
    if "nanoft" not in errors and args.peer == PEER:  # another peer has weights and tokens of its own
        checks = {name: compare(args, results["nanoft"][0], results[name][0]) for name in peers}
    compared = [name for name in peers if checks.get(name, {"agree": True})["agree"]] if "nanoft" not in errors else []
    rounds = list(zip(results["nanoft"], *(results[name] for name in compared), strict=True)) if compared else []
    speedups = [round(ours["tok_s"] / max(peer["tok_s"] for peer in rest), 3) for ours, *rest in rounds]
    memories = [round(ours["peak_rss_mb"] / min(peer["peak_rss_mb"] for peer in rest), 3) for ours, *rest in rounds]
    return {
        "shape": case_name(args),
        "nanoft": sides.pop("nanoft"),
        "peers": sides,
        "speedup": round(statistics.median(speedups), 3) if speedups else None,
        "memory_ratio": round(statistics.median(memories), 3) if memories else None,
        "speedups": speedups,
        "memory_ratios": memories,
        "losses": checks,
        "gflop_of_step": control["gflop_of_step"],
        "matmul_gflop_s": control["gflop_s"],
        "rounds": args.rounds,
        "threads": next((run["threads"] for run in results["nanoft"] if "threads" in run), None),
    }


def side_summary(runs: list[dict[str, Any]], control: dict[str, Any]) -> dict[str, Any]:
    """Medians over a side's rounds, and the spread over all of their steps."""
    median = {
        key: statistics.median(run[key] for run in runs)
        for key in ("tok_s", "step_s", "peak_rss_mb", "loaded_rss_mb", "peak_cuda_mb", "reserved_cuda_mb")
        if runs[0].get(key) is not None
    }
    speeds = [speed for run in runs for speed in run.get("speeds", [run["tok_s"]])]
    low, high = spread(speeds)
    achieved = statistics.median(run.get("gflop_s", control["gflop_of_step"] / run["step_s"]) for run in runs)
    return {
        **median,
        "tok_s_p10": low,
        "tok_s_p90": high,
        "percent_of_matmul": round(100 * achieved / control["gflop_s"], 1),
    }


def spread(values: list[float]) -> tuple[float, float]:
    """p10 and p90."""
    if len(values) < 2:
        return values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return round(tenths[0], 1), round(tenths[-1], 1)


def compare(args: argparse.Namespace, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Whether every step of both sides had the same loss and the same gradient norm."""
    loss_tolerance, norm_tolerance = TOLERANCE[args.dtype]
    losses = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    norms = [abs(a / b - 1) for a, b in zip(ours["grad_norms"], theirs["grad_norms"], strict=True)]
    agree = all(d <= loss_tolerance for d in losses) and all(d <= norm_tolerance for d in norms)  # NaN agrees with none
    return {"agree": agree, "largest_difference": largest(losses), "of_grad_norm": largest(norms)}


def largest(values: list[float]) -> float | None:
    """None if one is not finite, which JSON cannot express."""
    return round(max(values), 6) if all(map(math.isfinite, values)) else None


# ---- The report


def case_name(args: argparse.Namespace) -> str:
    """The shape and the options that were switched on."""
    switches = {"nf4": args.nf4, "cached": args.dequant == "cached", "ckpt": args.ckpt}
    switches |= {"offload": args.offload, "compile": args.compile}
    return " ".join([args.shape, *(name for name, on in switches.items() if on)])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(cases: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """A Markdown table, one line per shape."""
    peers = list(cases[0]["peers"])
    columns = ["shape", "nanoft, tokens/s", "%", *(f"{name}, tokens/s" for name in peers), "times the fastest"]
    columns += ["nanoft, MB", *(f"{name}, MB" for name in peers), "of the smallest", "losses differ by"]
    lines = [
        "# One optimizer step: nanoft and its peers",
        "",
        f"{settings['machine']}; {settings['versions']}; rounds: {settings['rounds']}.",
        "Written by `bench/step.py`, which says what is compared. Speeds are medians (p10 to p90 of all steps), ratios",
        "medians (and range) over the rounds; % is the share of the rate of bare matmuls of the same sizes.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    return "\n".join([*lines, *map(table_row, cases)]) + "\n"


def table_row(case: dict[str, Any]) -> str:
    ours, sides = case["nanoft"], [case["nanoft"], *case["peers"].values()]
    speeds = [
        f"failed: {side['error']}".replace("|", "/")
        if "error" in side
        else f"{side['tok_s']:,.0f} ({side['tok_s_p10']:,.0f} to {side['tok_s_p90']:,.0f})"
        for side in sides
    ]
    memories = ["" if "error" in side else f"{side['peak_rss_mb']:,.0f}" for side in sides]
    percent = "" if "error" in ours else f"{ours['percent_of_matmul']:.0f}"
    cells = [case["shape"], speeds[0], percent, *speeds[1:], ratio(case["speedups"])]
    cells += [*memories, ratio(case["memory_ratios"]), difference(case["losses"])]
    return "| " + " | ".join(cells) + " |"


def difference(checks: dict[str, dict[str, Any]]) -> str:
    """The largest that `compare` found, as a cell, and which peers take another step."""
    if not checks:
        return "not checked"
    found = [check["largest_difference"] for check in checks.values()]
    differing = [name for name, check in checks.items() if not check["agree"]]
    largest = "not finite" if None in found else f"{max(found):.0e}"
    return largest + (f" DISAGREE: {', '.join(differing)}" if differing else "")


def ratio(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def machine() -> str:
    """The processor and how many cores of it there are."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="small")
    parser.add_argument("--peer", default=PEER, metavar="COMMAND", help="default: bench/peer.py")
    parser.add_argument("--environments", type=Path, metavar="DIRECTORY", help="of bench/environments.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="records for packed shapes; default: random lengths")
    parser.add_argument("--timeout-s", type=float, default=1800, help="for each process")
    parser.add_argument("--out", type=Path, default=HERE / "step", help="of --shape all, without a suffix")
    add_step_options(parser)
    return parser


def parse(argv: Sequence[str], **case: Any) -> argparse.Namespace:
    """The options; those of a shape are defaults."""
    parser = build_parser()
    shape = case.get("shape") or parser.parse_args(argv).shape
    parser.set_defaults(**SHAPES.get(shape, {}))
    args = parser.parse_args(argv)
    vars(args).update(case)
    return args


def run_grid(argv: Sequence[str]) -> None:
    args = parse(argv)
    settings = {"machine": machine(), "versions": versions(), "rounds": args.rounds}
    cases = []
    for shape, nf4, ckpt in GRID:
        cases.append(contest(parse(argv, shape=shape, nf4=nf4, ckpt=ckpt)))
        print(json.dumps(cases[-1]), flush=True)
        args.out.with_suffix(".md").write_text(report(cases, settings), encoding="utf-8")
        args.out.with_suffix(".json").write_text(json.dumps({**settings, "cases": cases}, indent=2) + "\n")
    say(report(cases, settings))


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.shape == "all":
        run_grid(argv)
        return 0
    result = contest(args)
    print(json.dumps(result))
    return 0 if result["speedup"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
