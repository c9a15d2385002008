"""What the kernels do differently on Apple GPUs (PyTorch's `mps` device). docs/metal.md is the guide for users.

There are no CUDA kernels, no float64 and no pinned memory, and PyTorch's attention keeps the weights of all pairs for
backward. So attention is evaluated in chunks of queries, and NF4 by a table look-up in plain PyTorch (nanoft/nf4.py).
Everything else runs the same operations as elsewhere.
"""

from __future__ import annotations

from torch import Tensor


def needs_chunks(q: Tensor) -> bool:
    """Whether PyTorch's attention would keep the weights of all pairs, so that the chunked one is taken."""
    return q.device.type == "mps"
