"""A gated DeltaNet layer, forward and backward, beside transformers' own in PyTorch, in one process and by turns.

    python bench/deltanet.py [--length 1024] [--rounds 7] [--dtype float32] [--threads 2]

Both have the same weights, of Qwen3.5's 0.8B, which are frozen as in LoRA; backward goes to the layer's input. Without
the packages flash-linear-attention and causal-conv1d, transformers falls back to PyTorch, as here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from nanoft.blocks.deltanet import DeltaNetSizes, GatedDeltaNet
from nanoft.kernels.attention import FastContext


def step(layer: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor, Tensor]:
    """Seconds, the output and the gradient of the input."""
    start = time.perf_counter()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return time.perf_counter() - start, y.detach(), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 1024), ("rounds", 7), ("threads", 2), ("dtype", "float32")):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    config = Qwen3_5TextConfig(hidden_size=1024, linear_num_value_heads=16)
    theirs = Qwen3_5GatedDeltaNet(config, 0).to(dtype).requires_grad_(False)
    torch.nn.init.uniform_(theirs.A_log, -3.0, 2.0)
    sizes = {"delta": DeltaNetSizes(16, 16, 128, 128), "conv_kernel": 4, "norm_eps": config.rms_norm_eps}
    ours = GatedDeltaNet(SimpleNamespace(hidden_size=1024, **sizes), 0).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    ours.requires_grad_(False)
    x = torch.randn(1, args.length, 1024, dtype=dtype).requires_grad_()
    sides: dict[str, Callable[[Tensor], Tensor]] = {"nanoft": lambda x: ours(x, FastContext([])), "theirs": theirs}
    rounds = [{name: step(layer, x) for name, layer in sides.items()} for _ in range(args.rounds + 1)][1:]
    for part, what in ((1, "output"), (2, "gradient")):
        a, b = (rounds[0][name][part].float() for name in sides)  # type: ignore[union-attr]
        print(f"{what}: differs by {float((a - b).norm() / b.norm()):.1e} of its norm")
    ratios = [each["theirs"][0] / each["nanoft"][0] for each in rounds]
    for name in sides:
        print(f"{name}: {1000 * statistics.median(each[name][0] for each in rounds):.0f} ms")
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) in {args.rounds} rounds")


if __name__ == "__main__":
    main()
