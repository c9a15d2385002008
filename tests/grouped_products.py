"""Importing this gives a CPU grouped products where PyTorch has none (before 2.9): those of a loop over the groups."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("aten", "IMPL")


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """(rows, in) x (groups, in, out) -> (rows, out), or (m, rows) x (rows, n) -> (groups, m, n)."""
    groups = [slice(*ends) for ends in pairwise([0, *offs.tolist()])]
    if b.dim() == 3:
        return torch.cat([a[rows] @ matrix for rows, matrix in zip(groups, b, strict=True)])
    return torch.stack([a[:, rows] @ b[rows] for rows in groups])


if not torch._C._dispatch_has_computed_kernel_for_dispatch_key("aten::_grouped_mm", "CPU"):
    LIBRARY.impl("_grouped_mm", grouped_mm, "CPU")
