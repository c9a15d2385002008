"""A gated convolution over a few positions, in the place of attention (LFM2, Liquid AI 2025).

g, c, u = W_in x;   out = W_out (c conv(g u))
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nanoft.attention import SequenceContext


class ShortConv(nn.Module):
    """out = W_out (c conv(g u)), where g, c and u are thirds of W_in x. The modules have the names of the files."""

    def __init__(self, config: Any, layer: int):  # of a DecoderConfig
        super().__init__()
        self.index, self.inputs, hidden_size = layer, ("in_proj",), config.hidden_size
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.conv = nn.Conv1d(hidden_size, hidden_size, config.conv_kernel, groups=hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        return self.out_proj(self.gate(*self.mix([self.in_proj(x)], context)))

    def mix(self, projected: list[Tensor], context: SequenceContext) -> tuple[Tensor, Tensor]:
        """conv(g u) and c, (b, q, hidden) each, of what the linears `inputs` make of x."""
        g, c, u = projected[0].chunk(3, dim=-1)
        return context.convolve(g * u, self.conv.weight[:, 0], self), c

    def gate(self, y: Tensor, c: Tensor) -> Tensor:
        return y * c
