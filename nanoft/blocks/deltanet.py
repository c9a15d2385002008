"""Gated DeltaNet (Yang et al. 2025), in the form of Qwen3.5: a layer whose memory does not grow with the text.

    q, k, v = silu(conv(W_qkv x));   decay = -exp(A_log) softplus(W_a x + dt_bias);   beta = sigmoid(W_b x)
    y = delta rule of q, k, v, decay, beta (recurrence.py);   out = W_out (norm(y) silu(W_z x))

The modules have the names of the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft.attention import SequenceContext
from nanoft.blocks.norms import RMSNorm


@dataclass(frozen=True)
class DeltaNetSizes:
    """Heads of queries and keys, and of values, a multiple of them, and the sizes of both."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


class GatedDeltaNet(nn.Module):
    """out = W_out (norm(y) silu(W_z x)), where y reads the state that the delta rule writes."""

    def __init__(self, config: Any, layer: int):  # of a DecoderConfig
        super().__init__()
        self.index, hidden_size = layer, config.hidden_size
        self.sizes = sizes = config.delta
        keys, values = sizes.key_heads * sizes.key_dim, sizes.value_heads * sizes.value_dim
        self.widths = [keys, keys, values]
        self.inputs = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        outputs = (sum(self.widths), values, sizes.value_heads, sizes.value_heads)
        for name, width in zip(self.inputs, outputs, strict=True):
            self.add_module(name, nn.Linear(hidden_size, width, bias=False))
        channels = outputs[0]
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(sizes.value_heads))
        self.A_log = nn.Parameter(torch.zeros(sizes.value_heads))
        self.norm = RMSNorm(sizes.value_dim, config.norm_eps)
        self.out_proj = nn.Linear(values, hidden_size, bias=False)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        return self.out_proj(self.gate(*self.mix([getattr(self, name)(x) for name in self.inputs], context)))

    def mix(self, projected: list[Tensor], context: SequenceContext) -> tuple[Tensor, Tensor]:
        """y and z = W_z x, (b, q, h, dv) each, of what the linears `inputs` make of x."""
        qkv, z, b, a = projected
        qkv = F.silu(context.convolve(qkv, self.conv1d.weight[:, 0], self))
        q, k, v = qkv.split(self.widths, dim=-1)
        q, k = (part.unflatten(-1, (-1, self.sizes.key_dim)) for part in (q, k))
        v, z = (part.unflatten(-1, (-1, self.sizes.value_dim)) for part in (v, z))
        wide = torch.promote_types(a.dtype, torch.float32)
        decay = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias.to(wide))
        return context.scan(q, k, v, decay, b.sigmoid(), self), z

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        """norm(y) silu(z), (b, q, h dv)."""
        return (self.norm(y) * F.silu(z)).flatten(2)
