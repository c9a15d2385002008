"""One optimizer step, nanoft and transformers + peft: how fast, in how much memory, and is it the same step?

    python bench/step.py --shape small                 2 sequences of 1,024 random tokens; ends with one line of JSON
    python bench/step.py --shape masked --nf4 --ckpt   7 of 10 tokens are prompt; 4-bit base; activation checkpointing
    python bench/step.py --shape packed --data a.json  real conversations: nanoft packs them, the peer pads them
    python bench/step.py --shape all --rounds 5        every shape; writes bench/step.json and bench/step.md
    python bench/step.py --peer "python other.py"      another peer with the options and the JSON line of bench/peer.py

Both sides run in fresh processes, one after another, in an order that rotates every round. They generate the same base
weights, adapter and tokens from a seed, so losses and gradient norms must agree in every step; otherwise no ratio is
reported. Warm-up steps are discarded. Tokens per second never count padding; the spread is p10 to p90 over all counted
steps. Peak memory is the largest resident set of the process. A control run multiplies matrices of the step's sizes and
nothing else, so that speeds can be given as a share of what the machine can do.
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

PEER = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'peer.py'))}"
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "long": {"seq": 4096, "bs": 1},
    "masked": {"masked": 0.7},
    "packed": {"packed": 1},
}
GRID = [("small", 0, 0), ("small", 1, 0), ("small", 0, 1), ("small", 1, 1), ("long", 0, 0), ("long", 0, 1)]
GRID += [("long", 1, 1), ("masked", 0, 0), ("masked", 1, 0), ("packed", 0, 0), ("packed", 1, 0)]


# ---- The contest


class Failed(Exception):
    """A process without a result; the message is one line."""


def own_command(contender: str) -> list[str]:
    return [sys.executable, str(HERE / "contender.py"), contender]


def flags(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    given = {name: getattr(args, name) for name in names}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


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
    foreign = args.peer != PEER
    with tempfile.TemporaryDirectory() as temporary:
        args.ids = Path(temporary) / "ids.npz" if args.packed else None
        os.environ["XDG_CACHE_HOME"] = temporary  # also deletes the tokenized data
        own = flags(args, [*EVERY_PEER, *OWN_PEER])
        commands = {
            "nanoft": [*own_command("nanoft"), *own, *flags(args, OURS)],
            "peer": [*shlex.split(args.peer), *(flags(args, EVERY_PEER) if foreign else own)],
        }
        try:
            if args.packed:
                in_process([*own_command("pack"), *own, *flags(args, ["data"])], args.timeout_s)
            control = in_process([*own_command("matmul"), *own], args.timeout_s)
        except Failed as error:
            raise SystemExit(f"{case_name(args)}: {error}") from None
        if foreign and args.packed:
            commands["peer"] = ["false"]  # it cannot read the texts
        results: dict[str, list[dict[str, Any]]] = {"nanoft": [], "peer": []}
        errors: dict[str, str] = {}
        for number in range(args.rounds):
            for name in list(commands)[:: 1 if number % 2 == 0 else -1]:
                if name in errors:
                    continue
                try:
                    results[name].append(in_process(commands[name], args.timeout_s))
                    say(f"{case_name(args)}: round {number + 1}: {name}: {results[name][-1]['tok_s']:,.0f} tokens/s")
                except Failed as error:
                    errors[name] = str(error)
                    say(f"{case_name(args)}: {name}: {error}")
    return summary(args, results, errors, control, foreign)


def summary(
    args: argparse.Namespace,
    results: dict[str, list[dict[str, Any]]],
    errors: dict[str, str],
    control: dict[str, Any],
    foreign: bool,
) -> dict[str, Any]:
    """The line of JSON: ratios are taken within each round, then their median."""
    sides = {
        name: {"error": errors[name]} if name in errors else side_summary(runs, control)
        for name, runs in results.items()
    }
    if errors:
        check: dict[str, Any] = {"checked": False, "why": "a side failed"}
    elif foreign:
        check = {"checked": False, "why": "another peer has weights and tokens of its own"}
    else:
        check = compare(args, results["nanoft"][0], results["peer"][0])
    counts = not errors and check.get("agree", True)
    pairs = list(zip(results["nanoft"], results["peer"], strict=True)) if counts else []
    speedups = [ours["tok_s"] / theirs["tok_s"] for ours, theirs in pairs]
    memories = [ours["peak_rss_mb"] / theirs["peak_rss_mb"] for ours, theirs in pairs]
    return {
        "shape": case_name(args),
        **sides,
        "speedup": round(statistics.median(speedups), 3) if counts else None,
        "memory_ratio": round(statistics.median(memories), 3) if counts else None,
        "speedups": [round(ratio, 3) for ratio in speedups],
        "memory_ratios": [round(ratio, 3) for ratio in memories],
        "losses": check,
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
    return {"checked": True, "agree": agree, "largest_difference": largest(losses), "of_grad_norm": largest(norms)}


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
    columns = ["shape", "nanoft, tokens/s", "%", "peer, tokens/s", "%", "speedup"]
    columns += ["nanoft, MB", "peer, MB", "memory", "losses differ by"]
    lines = [
        f"# One optimizer step: nanoft and {settings['peer']}",
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
    cells = [case["shape"]]
    for side in (case["nanoft"], case["peer"]):
        if "error" in side:
            cells += [f"failed: {side['error']}".replace("|", "/"), ""]
        else:
            cells += [
                f"{side['tok_s']:,.0f} ({side['tok_s_p10']:,.0f} to {side['tok_s_p90']:,.0f})",
                f"{side['percent_of_matmul']:.0f}",
            ]
    cells += [ratio(case["speedups"])]
    cells += [f"{side['peak_rss_mb']:,.0f}" if "error" not in side else "" for side in (case["nanoft"], case["peer"])]
    cells += [ratio(case["memory_ratios"])]
    check = case["losses"]
    cells += [difference(check)]
    return "| " + " | ".join(cells) + " |"


def difference(check: dict[str, Any]) -> str:
    """What `compare` found, as a cell."""
    if not check["checked"]:
        return "not checked"
    found = check["largest_difference"]
    return ("not finite" if found is None else f"{found:.0e}") + ("" if check["agree"] else " DISAGREE")


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
    peer = "transformers + peft" if args.peer == PEER else f"`{args.peer}`"
    settings = {"peer": peer, "machine": machine(), "versions": versions(), "rounds": args.rounds}
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
