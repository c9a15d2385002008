"""Four-bit frozen linears (QLoRA, Dettmers et al. 2023, section 3).

The weight is cut into blocks of 64 values. Each block is divided by its largest magnitude (absmax) and every value is
replaced by the nearest of 16 code points: NF4's are quantiles of a normal distribution, FP4's a tiny float. That is 4
bits a weight plus 32 bits a block for absmax; double quantisation stores the absmax values themselves in 8 bits, which
brings 4.5 bits a weight down to 4.13.

The frozen weight needs no gradient, so backward needs only  dL/dx = dL/dy W,  and W is unpacked again for that instead
of being kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanoft import UserError

BLOCK = 64  # values that share one scale


class Linear4bit(nn.Module):
    """y = x W^T + bias with W packed in 4 bits and frozen; drop-in for a frozen nn.Linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str, double: bool, dtype: torch.dtype):
        """Quantise `weight`, (out, in), on its device.

        Args:
            weight: any float dtype; in_features * out_features must be a multiple of 64.
            bias: (out,) or None, kept in `dtype`.
            kind: "nf4" or "fp4".
            double: quantise the blocks' scales to 8 bits as well.
            dtype: what the weight is unpacked to and the product is computed in.
        """
        super().__init__()
        from bitsandbytes.functional import quantize_4bit

        if weight.numel() % BLOCK:
            raise UserError(f"quantization.bits: a weight of {tuple(weight.shape)} is no multiple of {BLOCK}: use 16")
        self.out_features, self.in_features = weight.shape
        packed, state = quantize_4bit(
            weight.to(dtype).contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type=kind
        )
        self.packed: Tensor
        self.register_buffer("packed", packed, persistent=False)  # (in * out / 2, 1) uint8
        self.state = state
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def dequantize(self) -> Tensor:
        """The weight that this layer really multiplies by, (out, in)."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed, self.state)

    def forward(self, x: Tensor) -> Tensor:
        y = _FrozenMatmul.apply(x, self)
        return y if self.bias is None else y + self.bias


class _FrozenMatmul(torch.autograd.Function):
    """x W^T that remembers the packed W only: unpacked once for the product, once more for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return x @ layer.dequantize().to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0]
        return grad @ ctx.layer.dequantize().to(grad.dtype), None


def packed_bytes(layer: Linear4bit) -> int:
    """Bytes that the layer's weight really takes: codes, scales and the scales of the scales."""
    state = layer.state
    parts = [layer.packed, state.absmax, state.code]
    if state.nested:
        parts += [state.state2.absmax, state.state2.code, state.offset]
    return sum(part.numel() * part.element_size() for part in parts)


def product(layer: nn.Linear | Linear4bit, x: Tensor) -> Tensor:
    """x W^T."""
    weight = layer.dequantize() if isinstance(layer, Linear4bit) else layer.weight
    return x @ weight.to(x.dtype).T


def gradient(layer: nn.Linear | Linear4bit, grad: Tensor) -> Tensor:
    """grad W."""
    weight = layer.dequantize() if isinstance(layer, Linear4bit) else layer.weight
    return grad @ weight.to(grad.dtype)
