"""What differs on Apple GPUs (Metal) whether or not kernels are used: a limit on memory, and dropout when recomputing.

Device and host share one memory. PyTorch lets the GPU allocate 1.7 times what Metal recommends; beyond the
recommendation macOS swaps, and no error says so. Here the recommendation is the limit, unless
PYTORCH_MPS_HIGH_WATERMARK_RATIO is set. kernels/metal.py has the overview; docs/metal.md is the guide for users.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WATERMARK = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"  # limit as a multiple of Metal's recommendation; 0: no limit


def set_memory_limit() -> None:
    """Limit this process to the memory that Metal recommends, unless the user has set a limit."""
    if WATERMARK not in os.environ:
        torch.mps.set_per_process_memory_fraction(1.0)


def held_bytes() -> float:
    """Memory that PyTorch holds on the GPU."""
    return float(torch.mps.driver_allocated_memory())


def limit_bytes(available: float) -> float:
    """Memory that this process may use: Metal's recommendation, or less if other programs hold memory.

    Args:
        available: bytes of main memory that are free.
    """
    return min(float(torch.mps.recommended_max_memory()), held_bytes() + available)


def with_same_dropout(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The block as a function that draws the same dropout masks when it is recomputed.

    `checkpoint` restores the random numbers of CUDA and the CPU, but not those of Metal (PyTorch 2.8 to 2.13).
    """
    first: list[Tensor] = []

    def call(*arguments: Any) -> Tensor:
        state = torch.mps.get_rng_state()
        if not first:
            first.append(state)
            return block(*arguments)
        torch.mps.set_rng_state(first[0])
        y = block(*arguments)
        torch.mps.set_rng_state(state)
        return y

    return call
