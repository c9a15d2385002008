"""The Metal path: the differences on Apple GPUs (PyTorch's `mps` device). docs/metal.md is the guide for users.

- Attention: PyTorch's kernel keeps the weights of all pairs for backward, so attention.py takes chunks of queries.
- NF4 is unpacked by a table look-up in plain PyTorch (nanoft/nf4.py): bitsandbytes downloads its kernel for Metal.
- The memory limit and dropout in recomputed blocks (runtime/device.py) do not need kernels.
- There is no float64 and no pinned memory. Everything else runs the same operations as elsewhere.
"""

from __future__ import annotations

from torch import Tensor


def needs_chunks(q: Tensor) -> bool:
    """Whether PyTorch's attention would keep the weights of all pairs, so that the chunked one is used."""
    return q.device.type == "mps"
