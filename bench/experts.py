"""One layer of experts, forward and backward, here and in transformers: python bench/experts.py [--hidden 512 ...]

Both have the same weights, which are frozen unless --train is given, and the same input, whose gradient is computed.
transformers takes its default implementation of experts. Rounds alternate; the ratio is given with p10 and p90.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from nanoft.blocks.moe import Experts
from nanoft.kernels.experts import install
from nanoft.model import Decoder
from nanoft.models.families import decoder_config


def build(args: argparse.Namespace) -> tuple[Experts, Any]:
    """The same random layer, here and in transformers."""
    sizes = {"hidden_size": args.hidden, "moe_intermediate_size": args.width, "num_experts": args.experts}
    sizes |= {"num_experts_per_tok": args.chosen, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 8}
    config = Qwen3MoeConfig(**sizes, norm_topk_prob=True, architectures=["Qwen3MoeForCausalLM"])
    theirs: Any = Qwen3MoeForCausalLM(config).to(getattr(torch, args.dtype)).model.layers[0].mlp
    block: Any = Decoder(decoder_config(config.to_dict())).model.layers[0]
    ours: Experts = block.mlp.to(getattr(torch, args.dtype))
    with torch.no_grad():
        for p in (theirs.gate.weight, *theirs.experts.parameters()):
            p.normal_(std=0.02)
        ours.router.weight.copy_(theirs.gate.weight)
        for number, expert in enumerate(ours.experts):
            gate, up = theirs.experts.gate_up_proj[number].chunk(2)
            for linear, weight in (("gate", gate), ("up", up), ("down", theirs.experts.down_proj[number])):
                expert.get_submodule(f"{linear}_proj").weight.copy_(weight)
    install(block)
    for layer in (ours, theirs):
        layer.requires_grad_(args.train)
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"hidden": 512, "width": 192, "experts": 64, "chosen": 8, "tokens": 1024, "rounds": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    layers, seconds = build(args), (list[float](), list[float]())
    x = torch.randn(1, args.tokens, args.hidden, dtype=getattr(torch, args.dtype))
    for turn in range(-2, args.rounds):  # the first two warm up
        found = []
        for layer, times in zip(layers, seconds, strict=True):
            own, started = x.clone().requires_grad_(), time.perf_counter()
            y = layer(own)
            y.sum().backward()
            times += [time.perf_counter() - started] if turn >= 0 else []
            found.append((y.detach(), own.grad))
    ratios = sorted(theirs / ours for ours, theirs in zip(*seconds, strict=True))
    ours_ms, theirs_ms = (1e3 * statistics.median(times) for times in seconds)
    print(f"nanoft {ours_ms:.1f} ms, transformers {theirs_ms:.1f} ms, ratio {statistics.median(ratios):.2f}, ", end="")
    farthest = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    print(f"{ratios[len(ratios) // 10]:.2f} to {ratios[-1 - len(ratios) // 10]:.2f}; largest difference {farthest:.1e}")


if __name__ == "__main__":
    main()
