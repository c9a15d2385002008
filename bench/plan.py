"""Accuracy of the memory plan: nanoft/training/memory_plan.py against measurements in fresh processes.

    python bench/plan.py            every shape: 10 minutes on 2 cores; writes bench/plan.json and bench/plan.md

Each shape is one contender (bench/contender.py). The plan is compared with its largest resident set; on CUDA, with the
peak of allocated memory. Unlike time, memory does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from contender import EVERY_PEER, HERE, OWN_PEER, add_step_options, hf_config
from step import Failed, flags, in_process, machine, own_command, say, versions

from nanoft.config import Config, LoRAConfig, QuantizationConfig
from nanoft.models.families import decoder_config
from nanoft.training.memory_plan import count_parameters, estimate_memory

SHAPES = [
    "",
    "--nf4 1",
    "--ckpt 1",
    "--nf4 1 --ckpt 1",
    "--masked 0.7",
    "--seq 512 --bs 1",
    "--seq 1024 --bs 4",
    "--seq 4096 --bs 1",
    "--seq 4096 --bs 1 --ckpt 1",
    "--seq 4096 --bs 1 --nf4 1 --ckpt 1",
    "--dtype float32",
    "--layers 16",
    "--r 256",
    "--vocab 131072",
    "--hidden 1024 --ffn 2816 --heads 16 --kv 8",
]


def predict(args: argparse.Namespace, baseline: float) -> dict[str, float]:
    """The plan's parts, in bytes, and its peak."""
    import torch

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = decoder_config(hf_config(args))
    config = Config(lora=LoRAConfig(rank=args.r), quantization=QuantizationConfig(bits=4 if args.nf4 else 16))
    keep: Any = ["input" if args.ckpt else "all"] * args.layers
    counts, dtype = count_parameters(decoder, config), getattr(torch, args.dtype)
    plan = estimate_memory(
        decoder, counts, config, device_type, dtype, args.bs, args.seq, keep, baseline, 1 - args.masked
    )
    return {**plan.parts, "peak": plan.peak}


def compare(shape: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_step_options(parser)
    args = parser.parse_args(["--steps", "2", *shape.split()])
    ran = in_process([*own_command("nanoft"), *flags(args, [*EVERY_PEER, *OWN_PEER])], 1800)
    measured = 2**20 * float(ran["peak_cuda_mb"] or ran["peak_rss_mb"])
    baseline = 0.0 if ran["peak_cuda_mb"] else 2**20 * float(ran["bare_rss_mb"])
    predicted = predict(args, baseline)
    return {"shape": shape, "measured": measured, "predicted": predicted, "error": predicted["peak"] / measured - 1}


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    lines = [
        "# Memory: planned and measured",
        "",
        f"{settings['machine']}; {settings['versions']}. Written by `bench/plan.py`.",
        "The first line has the defaults of bench/contender.py; the others name what differs.",
        "",
        "| shape | planned, MB | measured, MB | error |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['shape']} | failed: {row['failed']} | | |")
            continue
        planned, measured = row["predicted"]["peak"] / 1e6, row["measured"] / 1e6
        lines.append(f"| {row['shape'] or 'defaults'} | {planned:,.0f} | {measured:,.0f} | {row['error']:+.1%} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "plan", help="without a suffix")
    parser.add_argument("--shape", help="only this one, as options of bench/contender.py")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES if args.shape is None else [args.shape]:
        try:
            rows.append(compare(shape))
            say(f"{shape or 'defaults'}: {rows[-1]['error']:+.1%}")
        except Failed as error:
            rows.append({"shape": shape, "failed": str(error)})
    settings = {"machine": machine(), "versions": versions()}
    if args.shape is None:
        args.out.with_suffix(".md").write_text(table(rows, settings), encoding="utf-8")
        args.out.with_suffix(".json").write_text(json.dumps({**settings, "shapes": rows}, indent=2) + "\n")
    print(table(rows, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
