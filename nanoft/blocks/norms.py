"""Norms: scale each position of the residual stream to a size of about one, computed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight) (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight)

    def formula(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm as a function of everything that may get a gradient."""
        if not self.offset:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)  # 1 + weight would lose the weight's last bits
        return F.rms_norm(x.to(wide), weight.shape, self.offset + weight.to(wide), self.eps).to(x.dtype)


class LayerNorm(RMSNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias (Ba et al. 2016, eq. 4)."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__(size, eps, offset)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight, self.bias)

    def formula(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


NORM_KINDS: dict[str, type[RMSNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
