"""Time and peak memory of a step as functions of the sequence length, the rank and the number of layers.

    python bench/growth.py                   512 to 32,768 tokens; a quarter of an hour or more on 2 cores
    python bench/growth.py --quick           a few small points
    python bench/growth.py --nf4 --ckpt      any option of bench/contender.py
    python bench/growth.py --with-peer       transformers + peft as well

Every point is a contender (bench/contender.py) in a fresh process. Curves are fitted by least squares of the relative
error: a + b n for memory, and for time where the work is linear; a + b n + c n^2 for time as a function of the length,
because attention compares all pairs. The largest relative residual shows whether a curve fits. Points that run out of
memory or time are reported too. Results are written to bench/growth.json and bench/growth.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import Any

from contender import EVERY_PEER, HERE, OURS, OWN_PEER, add_step_options
from step import PEER, Failed, flags, in_process, machine, own_command, say, versions

# Of each sweep: its points, those of --quick, and the degree of the curve of the times.
SWEEPS: dict[str, tuple[list[int], list[int], int]] = {
    "r": ([4, 8, 16, 32, 64, 128, 256], [4, 64, 256], 1),
    "layers": ([1, 2, 4, 8, 16], [1, 2, 4], 1),
    "seq": ([512, 1024, 2048, 4096, 8192, 16384, 32768], [512, 1024, 2048, 4096], 2),
}
NAMES = {"seq": "tokens per sequence", "r": "rank", "layers": "layers"}
BAR = 30  # characters of the longest bar


def run_sweeps(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Points and fitted curves, by sweep and side."""
    commands = {"nanoft": own_command("nanoft"), **({"peer": shlex.split(PEER)} if args.with_peer else {})}
    sweeps: dict[str, dict[str, Any]] = {}
    started = time.monotonic()
    for name, (points, quick, degree) in SWEEPS.items():
        sides: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
        for value in quick if args.quick else points:
            for side, command in commands.items():
                left_s = args.minutes * 60 - (time.monotonic() - started)
                sides[side].append({"n": value, **run_point(args, name, value, command, left_s)})
                say(f"{name} {value}: {side}: {sides[side][-1]}")
        sweeps[name] = {side: {"points": rows, "fits": fits(rows, degree)} for side, rows in sides.items()}
    return sweeps


def run_point(args: argparse.Namespace, name: str, value: int, command: list[str], left_s: float) -> dict[str, Any]:
    """One process: speed and peak memory, or the reason why there are none."""
    if left_s <= 0:
        return {"error": f"not measured: out of time ({args.minutes:g} minutes)"}
    point = argparse.Namespace(**{**vars(args), name: value})
    given = flags(point, [*EVERY_PEER, *OWN_PEER, *(OURS if command == own_command("nanoft") else [])])
    try:
        result = in_process([*command, *given], left_s)
    except Failed as error:
        return {"error": str(error)}
    keys = ("tok_s", "step_s", "gflop_s", "peak_rss_mb", "loaded_rss_mb", "peak_cuda_mb")
    return {key: result[key] for key in keys if result[key] is not None}


def fits(rows: list[dict[str, Any]], degree: int) -> dict[str, dict[str, Any] | None]:
    """Fitted curves; None if there are no more points than coefficients."""
    done = [row for row in rows if "error" not in row]
    wanted = {"step_s": degree, "peak_rss_mb": 1, "peak_cuda_mb": 1}
    return {
        key: fit([row["n"] for row in done], [row[key] for row in done], order)
        for key, order in wanted.items()
        if done and all(key in row for row in done)
    }


def fit(x: list[float], y: list[float], degree: int) -> dict[str, Any] | None:
    """Coefficients a, b, ... of a + b x + ... that minimize the squares of relative residuals, and the largest one."""
    import numpy as np

    if len(x) <= degree + 1:
        return None
    found = np.polynomial.Polynomial.fit(x, y, degree, w=1 / np.asarray(y))
    residual = float(np.max(np.abs(found(np.asarray(x)) / y - 1)))
    coefficients = found.convert().coef
    padded = [*coefficients.tolist(), *[0.0] * (degree + 1 - len(coefficients))]  # convert() drops zeros at the end
    return {"coefficients": [float(f"{c:.6g}") for c in padded], "largest_residual": round(residual, 4)}


def report(sweeps: dict[str, dict[str, Any]], settings: dict[str, Any]) -> str:
    lines = ["# Growth of a step", "", f"{settings['machine']}; {settings['versions']}.", f"Base: {settings['base']}."]
    lines += ["Written by `bench/growth.py`, which says how."]
    for name, sides in sweeps.items():
        for side, sweep in sides.items():
            lines += ["", f"## {side}: {NAMES[name]}", "", "```", *plot(sweep["points"]), "```", ""]
            lines += [equation(key, found, name) for key, found in sweep["fits"].items()]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]]) -> list[str]:
    """One line per point: tokens per second and peak memory, both as a bar from zero."""
    done = [row for row in rows if "error" not in row]
    memory = "peak_cuda_mb" if done and "peak_cuda_mb" in done[0] else "peak_rss_mb"
    fastest, largest = (max((row[key] for row in done), default=1) for key in ("tok_s", memory))
    lines = [f"{'n':>7} {'tokens/s':>10} {'':{BAR}} {'peak, MB':>9}"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['n']:>7,} {row['error']}")
            continue
        speed, size = "#" * round(BAR * row["tok_s"] / fastest), "#" * round(BAR * row[memory] / largest)
        lines.append(f"{row['n']:>7,} {row['tok_s']:>10,.0f} {speed:{BAR}} {row[memory]:>9,} {size}")
    return lines


def equation(key: str, found: dict[str, Any] | None, name: str) -> str:
    what = {"step_s": "seconds per step", "peak_rss_mb": "peak resident MB", "peak_cuda_mb": "peak MB on the GPU"}[key]
    if found is None:
        return f"- {what}: too few points for a curve"
    terms = [f"{c:.3g}{('', ' n', ' n²')[power]}" for power, c in enumerate(found["coefficients"])]
    sum_of_terms = " + ".join(terms).replace("+ -", "- ")
    return f"- {what} = {sum_of_terms}, n: {NAMES[name]}; largest residual {found['largest_residual']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--with-peer", action="store_true")
    parser.add_argument("--minutes", type=float, default=40, help="points that have not started by then are skipped")
    parser.add_argument("--out", type=Path, default=HERE / "growth", help="without a suffix")
    add_step_options(parser)
    parser.set_defaults(layers=4, bs=1, steps=2)
    args = parser.parse_args()
    base = ", ".join(f"{key} {getattr(args, key)}" for key in ("hidden", "layers", "ffn", "vocab", "seq", "bs", "r"))
    kind = args.dtype + ", NF4" * args.nf4 + ", checkpointed" * args.ckpt
    settings = {"machine": machine(), "versions": versions(), "base": f"{base}, {kind}"}
    sweeps = run_sweeps(args)
    text = report(sweeps, settings)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    args.out.with_suffix(".json").write_text(json.dumps({**settings, "sweeps": sweeps}, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
