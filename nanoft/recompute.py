"""What a block keeps for its backward pass: its activations, or only its input.

Activation checkpointing (Chen et al. 2016): some blocks keep only their input, and backward recomputes the rest from
it, one block at a time. That costs a second forward pass of those blocks and saves the memory of all but one of them.
Offloading moves even the inputs to the CPU, so that the device's memory does not grow with the number of layers.

The policy wraps the call of a block; the block itself does not know about it.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from nanoft.runtime.device import with_same_dropout

ActivationPolicy = Literal["all", "input", "offloaded"]  # kept: all activations, the input, the input on the CPU


def keep_by_policy(policy: str, every: int, layers: int) -> list[ActivationPolicy]:
    """What each block keeps. The last keeps all: its backward comes first, so recomputing it would save nothing."""
    recomputed: ActivationPolicy = "offloaded" if policy == "offload" else "input"
    step = {"auto": layers + 1, "none": layers + 1, "every_k": every, "full": 1, "offload": 1}[policy]
    return [recomputed if after and (after + 1) % step == 0 else "all" for after in reversed(range(layers))]


def run_block(block: Any, x: Tensor, context: Any, target_positions: Tensor | None, policy: ActivationPolicy) -> Tensor:
    """block(x, context, target_positions) under a policy; x is (b, q, hidden)."""
    if policy == "all" or not torch.is_grad_enabled():
        return block(x, context, target_positions)
    if not x.requires_grad:  # the first block's, when the embedding is frozen
        x = x.detach().requires_grad_()

    def forward(x: Tensor, *taken: Tensor) -> tuple[Tensor, ...]:  # gradients flow through arguments and results alone
        context.tensors.update(zip(block.takes, taken, strict=True))
        context.recomputing = torch.is_grad_enabled()  # the first time, nothing is kept for backward
        return repeatable(x, context, target_positions), *(context.tensors[name] for name in block.gives)

    waiting = save_on_cpu(pin_memory=x.is_cuda) if policy == "offloaded" else contextlib.nullcontext()
    repeatable = with_same_dropout(block) if x.device.type == "mps" else block
    with waiting:
        x, *given = checkpoint(forward, x, *(context.tensors[name] for name in block.takes), use_reentrant=True)
    context.tensors.update(zip(block.gives, given, strict=True))
    return x
