"""What each optimization of the step is worth: the complete step, and the step with one of them removed.

    python bench/tricks.py                     the shapes small, masked, packed and long: 12 minutes on 2 cores
    python bench/tricks.py --shape packed --rounds 1

Every variant runs in a fresh process, in an order that rotates every round, on the same weights and tokens. The
difference of its loss from that of the complete step is reported. Expectations were written down before measuring.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import contender
import step
import torch.nn.functional as F

from nanoft import loss
from nanoft.attention import SequenceContext
from nanoft.kernels import attention, block, fused
from nanoft.kernels.attention import FastContext
from nanoft.kernels.block import identity
from nanoft.model import Decoder, select
from nanoft.runtime.cores import HUGE_PAGES

HERE = Path(__file__).resolve().parent


def large_chunks() -> None:
    """Logits of 1,024 positions at once, whatever the size of the cache."""
    loss.chunk_rows = lambda vocab, device: 1024


def large_blocks() -> None:
    """The softmax of a whole chunk at once."""
    loss.CORE_CACHES = 1 << 40


def every_position() -> None:
    """Logits at all positions, as frameworks compute them; those without a target are ignored."""
    import torch
    import torch.nn.functional as F

    forward, wanted = Decoder.forward, []

    def decode(self: Any, ids: Any, positions: Any = None, documents: Any = None, target_positions: Any = None) -> Any:
        wanted[:] = [target_positions]
        return forward(self, ids, positions, documents)

    Decoder.forward = decode

    def token_nll(hidden: Any, head: Any, targets: Any) -> Any:
        labels = torch.full((hidden.shape[0] * hidden.shape[1],), contender.IGNORE)
        labels[wanted[0]] = targets
        return F.cross_entropy((hidden.flatten(0, 1) @ head.T).float(), labels, reduction="none")

    contender.token_nll = token_nll  # type: ignore[assignment]


def torch_loss() -> None:
    """torch.nn.functional.linear_cross_entropy at the target positions (PyTorch 2.13)."""
    import torch.nn.functional as F

    def token_nll(hidden: Any, head: Any, targets: Any) -> Any:
        return F.linear_cross_entropy(hidden.flatten(0, 1), head, targets, reduction="none")

    contender.token_nll = token_nll  # type: ignore[assignment]


def full_last_block() -> None:
    """The last block for every position; only the head for target positions."""
    forward = Decoder.forward

    def decode(self: Any, ids: Any, positions: Any = None, documents: Any = None, target_positions: Any = None) -> Any:
        return select(forward(self, ids, positions, documents), target_positions)

    Decoder.forward = decode


def plain_adapters() -> None:
    """Each linear by its formula, W x + s B A x."""

    def one_by_one(linears: Sequence[Any], prepare: Any, *inputs: Any, is_used: bool = True) -> list[Any]:
        x = prepare(*inputs)
        return [linear(x) for linear in linears]

    block.grouped_linear = one_by_one


def kept_inputs() -> None:
    """Linears in groups, but the outputs of norms and silu(gate) * up are kept for backward."""
    grouped = block.grouped_linear
    block.grouped_linear = lambda linears, prepare, *inputs, **options: grouped(
        linears, identity, prepare(*inputs), **options
    )


def plain_norm() -> None:
    """PyTorch's norm, differentiated operation by operation."""
    fused.normed = lambda norm, x: (norm.formula, x, *norm.parameters())


def small_pages() -> None:
    """Memory in pages of 4 KiB, which torch has to know from its beginning."""
    if os.environ.get(HUGE_PAGES[0]) == HUGE_PAGES[1]:
        os.environ[HUGE_PAGES[0]] = "0"
        os.execv(sys.executable, [sys.executable, *sys.argv])


def plain_rotation() -> None:
    """The core's rotation."""
    FastContext.rotate = SequenceContext.rotate


def kernel_attention() -> None:
    """PyTorch's kernel in both directions, also for bfloat16 on a CPU."""

    def causal(q: Any, k: Any, v: Any, scores: Any, sinks: None) -> Any:
        heads = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scores.scale, enable_gqa=True)
        return y.transpose(1, 2)

    attention._causal = causal


def masked_attention() -> None:
    """The core's attention: packed documents under a mask over all pairs."""
    FastContext.attend = SequenceContext.attend


# The optimization, what replaces it, the shape, and what was expected of removing it.
TRICKS: list[tuple[str, Callable[[], None], str, str]] = [
    (
        "logits at target positions only",
        every_position,
        "masked",
        "0.7x: 40 % of the FLOP, 70 % useless",
    ),
    (
        "last MLP at target positions only",
        full_last_block,
        "masked",
        "0.95x: 70 % of an eighth of the MLPs",
    ),
    (
        "logits in chunks that fit into the cache",
        large_chunks,
        "small",
        "0.85x: passes over 128 MB, not 16 MB",
    ),
    ("softmax of few logits at a time", large_blocks, "small", "0.9x: five passes over 32 MB, not 2 MB"),
    ("chunked loss (instead: linear_cross_entropy)", torch_loss, "small", "about 1x: it is chunked too"),
    ("grouped linears", plain_adapters, "small", "0.85x, +100 MB: saves three passes per linear"),
    ("recomputed inputs", kept_inputs, "small", "1.03x, +75 MB: 4.75 KiB per token and layer"),
    ("the norm's gradient by hand", plain_norm, "small", "0.97x: 7 passes over x instead of about 15"),
    ("huge pages", small_pages, "small", "0.96x: 47,000 page faults a step"),
    ("rotation in two passes", plain_rotation, "small", "0.98x: it touches a tenth of the data of an MLP"),
    ("chunked attention, bfloat16 on a CPU", kernel_attention, "small", "0.85x: the kernel was 38 % of a step"),
    ("chunked attention, 4,096 tokens", kernel_attention, "long", "0.7x: attention is half of the step"),
    ("documents batched by length", masked_attention, "packed", "0.7x: 4 of 5 pairs are never computed"),
]


def run(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One contender: the step with one optimization removed, or none (an empty name)."""
    for trick, plain, _, _ in TRICKS:
        if trick == name:
            plain()
    return contender.run_nanoft(args)


def measure(shape: str, rounds: int, argv: Sequence[str]) -> list[dict[str, Any]]:
    """Every optimization of a shape against the complete step."""
    tricks = [trick for trick in TRICKS if trick[2] == shape]
    names = ["", *(name for name, *_ in tricks)]
    args = step.parse(argv, shape=shape)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        args.ids = Path(temporary) / "ids.npz" if args.packed else None
        options = step.flags(args, [*contender.EVERY_PEER, *contender.OWN_PEER])
        if args.packed:
            step.in_process([*step.own_command("pack"), *options], 600)
        for number in range(rounds):
            for at in range(len(names)):
                name = names[(at + number) % len(names)]
                command = [sys.executable, str(HERE / "tricks.py"), "--contender", name, "--shape", shape, *options]
                results[name].append(step.in_process(step.prepared(command), 1800))
                step.say(f"{shape}: round {number + 1}: without {name or 'none'}: {results[name][-1]['tok_s']:,.0f}")
    rows = []
    for name, _, _, expected in tricks:
        pairs = list(zip(results[name], results[""], strict=True))
        speeds = [without["tok_s"] / whole["tok_s"] for without, whole in pairs]
        rows.append(
            {
                "trick": name,
                "shape": shape,
                "expected": expected,
                "tok_s": statistics.median(r["tok_s"] for r in results[name]),
                "tok_s_whole": statistics.median(r["tok_s"] for r in results[""]),
                "speeds": [round(speed, 3) for speed in speeds],
                "more_mb": statistics.median(a["peak_rss_mb"] - b["peak_rss_mb"] for a, b in pairs),
                "loss_difference": round(max(abs(a["losses"][-1] - b["losses"][-1]) for a, b in pairs), 6),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    lines = [
        "# The step with one optimization removed",
        "",
        f"{settings['machine']}; {settings['versions']}; rounds: {settings['rounds']}. Written by `bench/tricks.py`.",
        "Speed relative to the complete step: median (and range) over the rounds.",
        "",
        "| removed | shape | expected | measured | more MB | losses differ by |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['trick']} | {r['shape']} | {r['expected']} | {step.ratio(r['speeds'])}x | {r['more_mb']:+,.0f} "
        f"| {r['loss_difference']:.0e} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*step.SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "tricks", help="without its suffix")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.contender is not None:
        print(json.dumps(run(step.parse(rest, shape=args.shape), args.contender)))
        return 0
    shapes = list(dict.fromkeys(shape for *_, shape, _ in TRICKS)) if args.shape == "all" else [args.shape]
    rows = [row for shape in shapes for row in measure(shape, args.rounds, rest)]
    settings = {"machine": step.machine(), "versions": step.versions(), "rounds": args.rounds}
    text = table(rows, settings)
    if args.shape == "all":
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")
        args.out.with_suffix(".json").write_text(json.dumps({**settings, "tricks": rows}, indent=2) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
