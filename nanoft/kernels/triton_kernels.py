"""Fused kernels for CUDA GPUs, in Triton (Tillet et al. 2019): one launch and one pass over memory each.

Between the matrix products of a step there is only elementwise or row-wise arithmetic, whose time is that of reading
and writing its operands. PyTorch's formulas read and write every intermediate result; these kernels read the inputs
once, compute in float32 and write the result once. For the same reason, the 4-bit weights are unpacked in one launch,
including the scales of scales.

Each kernel implements a formula of another module, which is named in the docstring of its function. With
TRITON_INTERPRET=1 they run on a CPU, slowly, for tests without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanoft.attention import Rotation, SequenceContext
from nanoft.blocks.double_quantization import NESTED
from nanoft.blocks.norms import RMSNorm
from nanoft.blocks.rope import Rope
from nanoft.model import ACTIVATIONS, MLP, DecoderConfig, SelfAttention
from nanoft.nf4 import BLOCK, CODES, quantize, unpack_table

BLOCKS = 16  # blocks of 64 weights that one program unpacks
WIDTH = 1024  # numbers of a row that one program activates
# Whether a product and a sum may be fused; in unpacking, the last bit would then differ from bitsandbytes.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
FUSED: dict[str, Any] = {"enable_fp_fusion": True}


def rows(numbers: int) -> dict[str, Any]:
    """Launch options of a program that holds rows of this many numbers in registers: 8 per thread of 2^n warps."""
    return {"num_warps": min(16, max(1, triton.next_power_of_2(numbers) // 256)), **FUSED}


@triton.jit
def unpack_4bit_kernel(
    packed, absmax, nested, values, offset, points, out, blocks, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """A program unpacks some blocks; NESTED = 0: the scales are not quantized."""
    block = tl.program_id(0).to(tl.int64) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    inside = block < blocks
    scale = tl.load(absmax + block, inside, other=0)
    if NESTED:
        scale = tl.load(values + scale.to(tl.int32)) * tl.load(nested + block // NESTED, inside, other=0)
        scale += tl.load(offset)
    place = tl.arange(0, BLOCK // 2)
    byte = tl.load(packed + block[:, None] * (BLOCK // 2) + place[None, :], inside[:, None], other=0).to(tl.int32)
    pairs = tl.join(tl.load(points + (byte >> 4)), tl.load(points + (byte & 15)))  # the first is in the high bits
    weight = tl.reshape(pairs, (PER_PROGRAM, BLOCK)) * scale[:, None]
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + at, weight.to(out.dtype.element_ty), inside[:, None])


@functools.cache
def code_points(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(CODES[kind], dtype=torch.float32, device=device)  # a copy, for which the CPU would wait


def unpack_4bit(parts: list[Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    """The weight of packed parts, (blocks, 64), as `nanoft.nf4.unpack_table` makes it: points[code] * scale."""
    packed, absmax, *nested = parts
    scales, values, offset = nested or (absmax, absmax, absmax)
    points = code_points(kind, packed.device)
    out = torch.empty((len(absmax), BLOCK), dtype=dtype, device=packed.device)
    unpack_4bit_kernel[(triton.cdiv(len(absmax), BLOCKS),)](
        packed, absmax, scales, values, offset, points, out, len(absmax), BLOCK, NESTED if nested else 0, BLOCKS,
        **EXACT,
    )  # fmt: skip
    return out


@triton.jit
def widened(x):
    """x in float32, or unchanged if it is float64."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def norm_gradient(x, g, scale, size):
    """dL/dx of rows n = x scale, with scale = 1 / sqrt(mean(x^2) + eps) and g = dL/dn: scale (g - n mean(g n))."""
    normed = x * scale
    return scale * (g - normed * (tl.sum(g * normed, 1, keep_dims=True) / size))


@triton.jit
def rms_norm_kernel(x, weight, y, size, EPS: tl.constexpr, OFFSET: tl.constexpr, SIZE: tl.constexpr):
    """A program normalizes one row."""
    at = tl.arange(0, SIZE)[None, :]
    place, inside = tl.program_id(0).to(tl.int64) * size + at, at < size
    row = widened(tl.load(x + place, inside, other=0.0))
    scale = 1 / tl.sqrt(tl.sum(row * row, 1, keep_dims=True) / size + EPS)
    w = widened(tl.load(weight + at, inside, other=0.0)) + OFFSET
    tl.store(y + place, (row * scale * w).to(y.dtype.element_ty), inside)


@triton.jit
def rms_norm_backward_kernel(x, weight, dy, dx, size, EPS: tl.constexpr, OFFSET: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[None, :]
    place, inside = tl.program_id(0).to(tl.int64) * size + at, at < size
    row = widened(tl.load(x + place, inside, other=0.0))
    scale = 1 / tl.sqrt(tl.sum(row * row, 1, keep_dims=True) / size + EPS)
    g = widened(tl.load(dy + place, inside, other=0.0)) * (widened(tl.load(weight + at, inside, other=0.0)) + OFFSET)
    tl.store(dx + place, norm_gradient(row, g, scale, size).to(dx.dtype.element_ty), inside)


class RMSNormFunction(torch.autograd.Function):
    """y = x w / sqrt(mean(x^2) + eps); w is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        x = x.contiguous()
        y, size = torch.empty_like(x), x.shape[-1]
        ctx.save_for_backward(x, weight)
        ctx.constants = size, eps, offset, triton.next_power_of_2(size)
        rms_norm_kernel[(x.numel() // size,)](x, weight, y, *ctx.constants, **rows(size))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dy, size = torch.empty_like(x), gradients[0].contiguous(), x.shape[-1]
        rms_norm_backward_kernel[(x.numel() // size,)](x, weight, dy, dx, *ctx.constants, **rows(size))
        return dx, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), (..., size), of a frozen weight (nanoft/blocks/norms.py)."""
    return RMSNormFunction.apply(x, weight, eps, offset)


@triton.jit
def activation(x, KIND: tl.constexpr):
    """The activation of x and its derivative."""
    if KIND == "silu":  # x s with s = sigmoid(x)
        s = 1 / (1 + tl.exp(-x))
        y, slope = x * s, s * (1 + x * (1 - s))
    elif KIND == "gelu":  # x P with P = (1 + erf(x / sqrt(2))) / 2, the normal distribution
        p = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        y, slope = x * p, p + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:  # gelu_tanh: x (1 + tanh(z)) / 2 = x s with s = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
        s = 1 / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        y, slope = x * s, s * (1 + x * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x))
    return y, slope


@triton.jit
def gated_kernel(gate, up, y, gate_row, up_row, size, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """A program computes a part of one row; gate_row, up_row: strides of their rows."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    g = widened(tl.load(gate + row * gate_row + at, at < size, other=0.0))
    u = widened(tl.load(up + row * up_row + at, at < size, other=0.0))
    a, _ = activation(g, KIND)
    tl.store(y + row * size + at, (a * u).to(y.dtype.element_ty), at < size)


@triton.jit
def gated_backward_kernel(gate, up, dy, dgate, dup, gate_row, up_row, size, KIND: tl.constexpr, WIDTH: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    g = widened(tl.load(gate + row * gate_row + at, at < size, other=0.0))
    u = widened(tl.load(up + row * up_row + at, at < size, other=0.0))
    d = widened(tl.load(dy + row * size + at, at < size, other=0.0))
    a, slope = activation(g, KIND)
    tl.store(dgate + row * size + at, (d * u * slope).to(dgate.dtype.element_ty), at < size)
    tl.store(dup + row * size + at, (d * a).to(dup.dtype.element_ty), at < size)


class GatedFunction(torch.autograd.Function):
    """y = f(gate) up;  dgate = dy up f'(gate), dup = dy f(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        shape, size = gate.shape, gate.shape[-1]
        gate, up = gate.flatten(0, -2), up.flatten(0, -2)  # (n, size): halves of a fused projection stay views
        ctx.save_for_backward(gate, up)
        ctx.shape, ctx.kind = shape, kind
        y = gate.new_empty(gate.shape)
        gated_kernel[_grid(gate)](gate, up, y, gate.stride(0), up.stride(0), size, kind, WIDTH, **FUSED)
        return y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup, dy = gate.new_empty(gate.shape), gate.new_empty(gate.shape), gradients[0].contiguous()
        sizes = gate.stride(0), up.stride(0), gate.shape[1]
        gated_backward_kernel[_grid(gate)](gate, up, dy, dgate, dup, *sizes, ctx.kind, WIDTH, **FUSED)
        return dgate.view(ctx.shape), dup.view(ctx.shape), None


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1], WIDTH)


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """activation(gate) * up, (..., size), of an activation in `nanoft.model.ACTIVATIONS` (SwiGLU, GeGLU)."""
    return GatedFunction.apply(gate, up, kind)


@triton.jit
def rotation_of(cos, sin, at, angles, row):
    """j, c and s of y_i = x_i c_i + x_j s_i, for i and j that are `angles` apart; y_i = x_i for other dimensions."""
    is_first, is_turned = at < angles, at < 2 * angles
    partner = tl.where(is_first, at + angles, tl.where(is_turned, at - angles, at))
    angle = row * angles + tl.where(is_first, at, at - angles)
    c = widened(tl.load(cos + angle, is_turned, other=1.0))
    s = widened(tl.load(sin + angle, is_turned, other=0.0))
    return partner, c, tl.where(is_first, -s, s)


@triton.jit
def rotate_kernel(
    x, weight, cos, sin, y, token_stride, heads, size, angles, angle_rows, EPS: tl.constexpr, OFFSET: tl.constexpr,
    NORMED: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A program rotates all heads of one position."""
    token, head, at = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS)[:, None], tl.arange(0, SIZE)[None, :]
    inside, row = (head < heads) & (at < size), x + token * token_stride + head * size
    partner, c, s = rotation_of(cos, sin, at, angles, token % angle_rows)
    own, other = widened(tl.load(row + at, inside, other=0.0)), widened(tl.load(row + partner, inside, other=0.0))
    if NORMED:
        scale = 1 / tl.sqrt(tl.sum(own * own, 1, keep_dims=True) / size + EPS)
        own *= scale * (widened(tl.load(weight + at, at < size, other=0.0)) + OFFSET)
        other *= scale * (widened(tl.load(weight + partner, at < size, other=0.0)) + OFFSET)
    tl.store(y + (token * heads + head) * size + at, (own * c + other * s).to(y.dtype.element_ty), inside)


@triton.jit
def rotate_backward_kernel(
    x, weight, cos, sin, dy, dx, token_stride, heads, size, angles, angle_rows, EPS: tl.constexpr,
    OFFSET: tl.constexpr, NORMED: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Rotate the gradient back, and then apply the gradient of the norm."""
    token, head, at = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS)[:, None], tl.arange(0, SIZE)[None, :]
    inside, row = (head < heads) & (at < size), (token * heads + head) * size
    partner, c, s = rotation_of(cos, sin, at, angles, token % angle_rows)
    g = widened(tl.load(dy + row + at, inside, other=0.0)) * c
    g -= widened(tl.load(dy + row + partner, inside, other=0.0)) * s
    if NORMED:
        own = widened(tl.load(x + token * token_stride + head * size + at, inside, other=0.0))
        scale = 1 / tl.sqrt(tl.sum(own * own, 1, keep_dims=True) / size + EPS)
        g = norm_gradient(own, g * (widened(tl.load(weight + at, at < size, other=0.0)) + OFFSET), scale, size)
    tl.store(dx + row + at, g.to(dx.dtype.element_ty), inside)


class RotateFunction(torch.autograd.Function):
    """The rotation of norm(x), (b, q, heads, d); backward rotates back, then differentiates the norm; w is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, offset: float
    ) -> Tensor:
        heads, size = x.shape[2:]
        x = x if x.stride()[2:] == (size, 1) and x.stride(0) == x.stride(1) * x.shape[1] else x.contiguous()
        cos, sin, angles = cos.contiguous(), sin.contiguous(), cos.shape[-1]
        y = x.new_empty(x.shape)
        powers = triton.next_power_of_2(heads), triton.next_power_of_2(size)
        ctx.sizes = x.stride(1), heads, size, angles, cos.numel() // angles
        ctx.constants = eps, offset, weight is not None, *powers
        ctx.save_for_backward(x if weight is not None else None, weight, cos, sin)
        rotate_kernel[(x.shape[0] * x.shape[1],)](
            x, cos if weight is None else weight, cos, sin, y, *ctx.sizes, *ctx.constants, **rows(heads * size)
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        dy = gradients[0].contiguous()
        dx = torch.empty_like(dy)
        rotate_backward_kernel[(dy.shape[0] * dy.shape[1],)](
            dy if x is None else x, cos if weight is None else weight, cos, sin, dy, dx, *ctx.sizes, *ctx.constants,
            **rows(dy.shape[2] * dy.shape[3]),
        )  # fmt: skip
        return dx, None, None, None, None, None


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 0.0, offset: float = 0.0
) -> Tensor:
    """`nanoft.attention.rotate` of x, (b, q, heads, d); with a weight, (d,), of the RMSNorm of each head."""
    return RotateFunction.apply(x, cos, sin, weight, eps, offset)


# --- the check before they are used


def with_formulas(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor
) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Each kernel and its formula in the core: x is (1, q, h, d), cos and sin (1, q, 1, d / 2), the weight (d,)."""
    dtype, (length, heads, size) = x.dtype, x.shape[1:]
    config = DecoderConfig(8, size, size, 1, heads, heads, size, 1e-5, (Rope(),), False, (None,), "", qk_norm="head")
    attn = SelfAttention(config, 0).to(x.device, dtype)
    for norm in (attn.q_norm, attn.k_norm):
        norm.weight = nn.Parameter(weight, requires_grad=False)
    context = SequenceContext([Rotation(cos, sin)])
    packed = quantize(x.detach().view(length, -1), ("nf4", True), dtype)
    pairs: dict[str, Any] = {
        "4-bit weights": (
            lambda: unpack_4bit(packed.parts, "nf4", dtype), lambda: unpack_table(packed.parts, "nf4", dtype),
        ),
        "RMSNorm": (lambda: rms_norm(x, weight, 1e-5, 1.0), lambda: RMSNorm(size, 1e-5, 1.0).formula(x, weight)),
        "rotation": (
            lambda: rotate(x, cos, sin, weight, 1e-5), lambda: attn.heads([x.flatten(2)] * 3, context)[0],
        ),
    }  # fmt: skip
    for kind in ACTIVATIONS:
        pairs[kind] = partial(gated, x, x, kind), partial(MLP(replace(config, activation=kind)).activate, x, x)
    return pairs


def first_difference(device: torch.device) -> str:
    """The first kernel that differs from the core, as it stands, for a few numbers on a device; "" if none does."""
    x = torch.linspace(-3, 3, 4 * 12 * 64, device=device).view(1, 4, 12, 64).requires_grad_()
    weight, angles = torch.linspace(0.5, 1.5, 64, device=device), torch.linspace(0, 7, 128, device=device)
    cos, sin = (part.view(1, 4, 1, 32) for part in (angles.cos(), angles.sin()))
    for name, functions in with_formulas(x, cos, sin, weight).items():
        both = [function() for function in functions]
        if both[0].requires_grad:
            both += [torch.autograd.grad(y, x, y.detach().cos(), retain_graph=True)[0] for y in both[:2]]
        if any((a - b).abs().max() > 1e-4 for a, b in zip(both[::2], both[1::2], strict=True)):
            return name
    return ""
