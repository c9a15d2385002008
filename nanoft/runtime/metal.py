"""What differs on Apple GPUs (Metal) at run time: device and host share one memory, whose limit is only advice.

PyTorch lets the GPU of a Mac allocate 1.7 times what Metal recommends; beyond the recommendation macOS swaps, and no
error says so. Here the recommendation is the limit, unless PYTORCH_MPS_HIGH_WATERMARK_RATIO is set. What differs in the
model is in kernels/metal.py; docs/metal.md explains both.
"""

from __future__ import annotations

import os

import torch

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
