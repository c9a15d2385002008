"""One GPU, the shape of Mistral-7B: speed and memory of each way to train it, and of the peer in the same session.

    python bench/gpu.py                   9 minutes; writes bench/gpu_<name of the GPU>.json and .md
    python bench/gpu.py --smoke           tiny shapes, also on a CPU: does the script run?
    python bench/gpu.py --only nf4        the cases whose name contains a word

Every case is a contender (bench/contender.py) in a fresh process: random weights are generated on the device, one
tensor at a time, and quantized at once. A case that fails, runs out of memory or time, or needs a missing package is a
table row with the reason. Memory is the peak of the steps, not of building the model. If the peer ran on the same
tokens, the largest difference of the loss is reported, and with the same checkpointing the ratio of speeds. Planned
memory is that of nanoft/training/memory_plan.py. A second table has Triton's kernels beside their formulas.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contender import EVERY_PEER, HERE, OURS, OWN_PEER, add_step_options
from plan import predict
from step import PEER, Failed, compare, difference, flags, in_process, own_command, say, side_summary, versions

MISTRAL_7B = {"hidden": 4096, "layers": 32, "heads": 32, "kv": 8, "ffn": 14336, "seq": 4096, "bs": 1}
TINY = {"hidden": 64, "layers": 2, "heads": 4, "kv": 2, "ffn": 128, "vocab": 1024, "seq": 256, "bs": 1, "steps": 2}
PACKED, NF4, CKPT, MASKED, COMPILE = {"packed": 1}, {"nf4": 1}, {"ckpt": 1}, {"masked": 0.7}, {"compile": 1}
# The most important cases come first: a slow machine skips the last ones. Sequences have 4,096 tokens.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("nanoft", PACKED),
    ("peer", PACKED),
    ("nanoft", PACKED | NF4 | CKPT),
    ("peer", PACKED | NF4 | CKPT),
    ("nanoft", PACKED | NF4),
    ("nanoft", PACKED | {"triton": 0}),
    ("nanoft", PACKED | NF4 | {"triton": 0}),
    ("nanoft", PACKED | COMPILE),
    ("nanoft", PACKED | NF4 | COMPILE),
    ("nanoft", {}),
    ("peer", {}),
    ("nanoft", NF4),
    ("peer", NF4),
    ("nanoft", PACKED | NF4 | {"dequant": "cached"}),
    ("nanoft", PACKED | {"bs": 4}),
    ("nanoft", PACKED | NF4 | {"bs": 4}),
    ("nanoft", PACKED | NF4 | CKPT | {"bs": 4}),
    ("nanoft", MASKED),
    ("peer", MASKED),
    ("nanoft", MASKED | NF4),
    ("nanoft", PACKED | {"bs": 2}),
    ("nanoft", PACKED | CKPT),
    ("nanoft", PACKED | NF4 | COMPILE | {"dequant": "cached"}),
    ("nanoft", PACKED | NF4 | CKPT | {"offload": 1}),
]


def case_name(side: str, options: dict[str, Any]) -> str:
    """The side and every option, such as `nanoft packed nf4 bs=4`."""
    words = [key if value == 1 and key != "bs" else f"{key}={value}" for key, value in options.items()]
    return " ".join([side, *words])


def run_case(
    args: argparse.Namespace, side: str, options: dict[str, Any], work: Path, left_s: float, control: dict[str, Any]
) -> dict[str, Any]:
    """One case in a fresh process: its figures, or the reason why there are none."""
    row: dict[str, Any] = {"case": case_name(side, options), "side": side, "options": options}
    if left_s < 5:
        return {**row, "error": "not measured: out of time"}
    limit_s = min(left_s, args.case_s)
    case = argparse.Namespace(**{**vars(args), **options})
    case.ids = work / f"{case.bs}_rows.npz" if case.packed else None
    known = flags(case, [*EVERY_PEER, *OWN_PEER])
    command = shlex.split(PEER) if side == "peer" else [*own_command("nanoft"), *flags(case, OURS)]
    try:
        if case.ids and not case.ids.exists():
            in_process([*own_command("pack"), *known], limit_s, bounded=False)
        result = in_process([*command, *known], limit_s, bounded=False)
    except Failed as error:
        return {**row, "error": str(error)}
    kept = {key: result[key] for key in ("losses", "grad_norms")}
    if side == "nanoft" and not {"offload", "compile", "dequant"} & set(options):
        bare = 0.0 if result["peak_cuda_mb"] else 2**20 * float(result["bare_rss_mb"])  # on a CPU: libraries
        row["planned_mb"] = round(predict(case, bare)["peak"] / 2**20)
    return {**row, **side_summary([result], control), **kept}


def compared_with_peer(args: argparse.Namespace, row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For a case of nanoft: how its losses differ from the peer's on the same tokens and base, and the speedup."""
    if "error" in row or row["side"] == "peer":
        return {}
    found: dict[str, Any] = {}
    for other in rows:
        if other["side"] != "peer" or "error" in other:
            continue
        same = {key: row["options"].get(key) == other["options"].get(key) for key in ("packed", "masked", "bs", "nf4")}
        if all(same.values()):
            check = compare(args, row, other)
            found |= {"losses_compared_with_peer": check}
            if check["agree"] and row["options"].get("ckpt") == other["options"].get("ckpt"):
                found |= {"speedup": round(row["tok_s"] / other["tok_s"], 3)}
    return found


def report(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """A Markdown table, one line per case."""
    columns = [
        "case",
        "tokens/s",
        "p10 to p90",
        "% of matmul",
        "peak MB",
        "planned MB",
        "reserved MB",
        "losses differ by",
        "speedup",
    ]
    lines = [
        f"# {settings['device']}: {settings['shape']}",
        "",
        f"{settings['versions']}.",
        "Written by `bench/gpu.py`, which says how. Bare matmuls of the step's sizes reach",
        f"{settings['control']['gflop_s'] / 1e3:,.1f} TFLOP/s here: that is 100 %.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    return "\n".join([*lines, *map(table_row, rows), *kernel_table(settings["kernels"])]) + "\n"


def kernel_table(found: dict[str, Any]) -> list[str]:
    """Triton's kernels beside their formulas, or why there is no such table."""
    if "error" in found:
        return ["", f"Triton's kernels: not measured ({found['error']})."]
    lines = [
        "",
        "| kernel, tokens x heads x size, bfloat16, forward and backward | us | formula, us | speedup | difference |",
    ]
    lines += ["|---|---|---|---|---|"]
    for name, row in found["kernels"].items():
        cells = f"{row['us']:,.0f} | {row['formula_us']:,.0f} | {row['speedup']:.2f} | {row['difference']:.0e}"
        lines.append(f"| {name} | {cells} |")
    return lines


def table_row(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['case']} | {row['error'].replace('|', '/')} |" + " |" * 7
    check = row.get("losses_compared_with_peer")
    cells = [
        row["case"],
        f"{row['tok_s']:,.0f}",
        f"{row['tok_s_p10']:,.0f} to {row['tok_s_p90']:,.0f}",
        f"{row['percent_of_matmul']:.0f}",
        f"{row.get('peak_cuda_mb', row['peak_rss_mb']):,.0f}",
        f"{row['planned_mb']:,.0f}" if "planned_mb" in row else "",
        f"{row['reserved_cuda_mb']:,.0f}" if "reserved_cuda_mb" in row else "",
        difference({"peer": check}) if check else "",
        f"{row['speedup']:.2f}" if "speedup" in row else "",
    ]
    return "| " + " | ".join(cells) + " |"


def run_cases(args: argparse.Namespace, out: Path | None, settings: dict[str, Any], started: float) -> str:
    """All cases in order; results so far are written after each one."""
    rows: list[dict[str, Any]] = []
    text = ""
    with tempfile.TemporaryDirectory() as work:
        for side, options in CASES:
            if args.only not in case_name(side, options):
                continue
            left_s = args.minutes * 60 - (time.monotonic() - started)
            rows.append(run_case(args, side, options, Path(work), left_s, settings["control"]))
            compared = [{**row, **compared_with_peer(args, row, rows)} for row in rows]
            text = report(compared, settings)
            say(table_row(compared[-1]))
            if out:
                out.with_suffix(".md").write_text(text, encoding="utf-8")
                out.with_suffix(".json").write_text(json.dumps({**settings, "cases": compared}, indent=2) + "\n")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--minutes", type=float, default=8, help="for all cases; the remaining ones are skipped")
    parser.add_argument("--case-s", type=float, default=120, help="timeout of one process, seconds")
    parser.add_argument("--out", type=Path, help="without a suffix; default: bench/gpu_<name>; none for --smoke")
    add_step_options(parser)
    smoke = parser.parse_known_args()[0].smoke
    parser.set_defaults(warmup=3, **(TINY if smoke else MISTRAL_7B))
    args = parser.parse_args()
    started = time.monotonic()
    try:
        here = in_process([*own_command("device")], args.case_s, bounded=False)["device"]
        if here == "CPU" and not smoke:
            say("no GPU here: use --smoke to run tiny shapes on the CPU")
            return 2
        control = in_process([*own_command("matmul"), *flags(args, EVERY_PEER)], args.case_s, bounded=False)
    except Failed as error:
        say(f"bare matmuls failed: {error}")
        return 1
    try:
        kernels = in_process([*own_command("kernels"), *flags(args, EVERY_PEER)], args.case_s, bounded=False)
    except Failed as error:
        kernels = {"error": str(error)}
    shape = f"{args.layers} layers of {args.hidden}, sequences of {args.seq:,} tokens, rank {args.r}, {args.dtype}"
    settings = {"device": here, "shape": shape, "versions": versions(), "control": control, "kernels": kernels}
    slug = re.sub(r"\W+", "_", here.lower()).strip("_")
    out = args.out or (None if smoke else HERE / f"gpu_{slug}")
    print(run_cases(args, out, settings, started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
