"""Frozen linears in 4 or 8 bits.

Four bits (QLoRA, Dettmers et al. 2023, section 3): the weight is cut into blocks of 64 values. Each block is divided by
its largest magnitude (absmax) and every value is replaced by the nearest of 16 code points: NF4's are quantiles of a
normal distribution, FP4's a tiny float. That is 4 bits a weight plus 32 bits a block for absmax; double quantization
stores the absmax values themselves in 8 bits, which brings 4.5 bits a weight down to 4.13.

Eight bits (LLM.int8(), Dettmers et al. 2022, section 2): each row is divided by its absmax and rounded to -127 ... 127.
Only the weight is rounded here, never the activations.

The frozen weight needs no gradient, so backward needs only  dL/dx = dL/dy W,  and W is unpacked again for that instead
of being kept. Packing is plain torch on every device, so that a weight has the same codes wherever it was packed.
Unpacking has the same bits everywhere: an entry of UNPACKERS (Triton), bitsandbytes on CUDA and the CPU, or a table.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft import UserError
from nanoft.blocks.double_quantization import NESTED, pack_scales, unpack_scales

BLOCK = 64  # weights that share one scale
# Weights packed or unpacked at a time, to bound memory: on a CPU what fits into its caches, elsewhere more, because
# each kernel launch has a cost.
CHUNK, GPU_CHUNK = 1 << 20, 1 << 23
CODES = {
    "nf4": (  # QLoRA, appendix E
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (  # sign, two bits of exponent, one of mantissa, over the largest: 12
        0, 1 / 192, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12,
        0, -1 / 192, -8 / 12, -1, -4 / 12, -6 / 12, -2 / 12, -3 / 12,
    ),
}  # fmt: skip


class PackedLinear(nn.Module):
    """y = x W^T + bias with a frozen W that is packed in 4 or 8 bits; drop-in for a frozen nn.Linear."""

    NAMES = ("packed", "absmax", "nested_absmax", "nested_map", "offset")  # of the parts, in the order of `unpack`
    bias: nn.Parameter | None

    def __init__(self, parts: list[Tensor], shape: tuple[int, ...], kind: str, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.shape = self.out_features, self.in_features = tuple(shape)
        self.kind, self.dtype = kind, dtype
        for name, part in zip(self.NAMES, parts, strict=False):
            self.register_buffer(name, part, persistent=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False))

    @property
    def parts(self) -> list[Tensor]:
        held: dict[str, Any] = self._buffers | self._parameters  # the latter if they are sharded
        return [held[name] for name in self.NAMES if name in held]

    def dequantize(self) -> Tensor:
        """The weight that this layer multiplies by, (out, in)."""
        return unpack(self.parts, self.kind, self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = _FrozenMatmul.apply(x, self)
        return y if self.bias is None else y + self.bias


Frozen = nn.Linear | PackedLinear  # a linear whose weight is not trained


def quantize(
    weight: Tensor, quantization: tuple[str, bool], dtype: torch.dtype, bias: Tensor | None = None
) -> PackedLinear:
    """The linear of `weight`, (out, in), on its device, in the form (nf4 | fp4 | int8, double).

    Args:
        quantization: `double`: the scales of 4-bit blocks are quantized to 8 bits as well.
        dtype: of the bias, and what the weight is rounded to before it is packed and when it is unpacked.
    """
    (kind, double), shape = quantization, tuple(weight.shape)
    if kind == "int8":
        return PackedLinear(pack_8bit(weight.to(dtype)), shape, kind, bias, dtype)
    if weight.numel() % BLOCK:
        raise UserError(f"quantization.bits: {shape}: not a multiple of {BLOCK} weights: set quantization.bits=16")
    packed, absmax = pack_4bit(weight.to(dtype), kind)
    scales = pack_scales(absmax) if double else [absmax]
    return PackedLinear([packed, *scales], shape, kind, bias, dtype)


# --- matrix products: all that an adapter needs of its base


def matmul(layer: Frozen, x: Tensor) -> Tensor:
    """x W^T, (..., in) -> (..., out), in x's dtype, without the bias; not tracked by autograd if packed."""
    if isinstance(layer, nn.Linear):
        return x @ layer.weight.to(x.dtype).T
    return torch.ops.nanoft.frozen_matmul.default(x, layer.parts, layer.kind, layer.shape, layer.dtype, False)


def matmul_backward(layer: Frozen, grad: Tensor) -> Tensor:
    """dL/dx = dL/dy W, (..., out) -> (..., in), in grad's dtype."""
    if isinstance(layer, nn.Linear):
        return grad @ layer.weight.to(grad.dtype)
    return torch.ops.nanoft.frozen_matmul.default(grad, layer.parts, layer.kind, layer.shape, layer.dtype, True)


class _FrozenMatmul(torch.autograd.Function):
    """`matmul` with `matmul_backward`; only the layer itself is saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return matmul(layer, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return matmul_backward(ctx.layer, grads[0]), None


# One operator, which torch.compile does not look into: if unpacking were traced, the compiler could keep the unpacked
# weights from forward to backward, 14 GB of them at 7B. `define` costs 5 us a call, `custom_op` 25.
torch.library.define(
    "nanoft::frozen_matmul",
    "(Tensor x, Tensor[] parts, str kind, int[] shape, ScalarType dtype, bool transposed) -> Tensor",
)


@torch.library.impl("nanoft::frozen_matmul", "default")
def _frozen_matmul(
    x: Tensor, parts: list[Tensor], kind: str, shape: list[int], dtype: torch.dtype, transposed: bool
) -> Tensor:
    weight = unpack(parts, kind, shape, dtype).to(x.dtype)  # (out, in)
    return x @ (weight if transposed else weight.T)


@torch.library.register_fake("nanoft::frozen_matmul")  # type: ignore[untyped-decorator]
def _frozen_matmul_shape(
    x: Tensor, parts: list[Tensor], kind: str, shape: list[int], dtype: torch.dtype, transposed: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[1] if transposed else shape[0]))


# --- packing


def pack_4bit(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes, two in a byte, (numel / 2, 1) uint8, and the blocks' scales, (numel / 64,) float32.

    Equal to bitsandbytes on the CPU, bit for bit.
    """
    blocks = weight.detach().reshape(-1, BLOCK)
    packed = torch.empty((len(blocks), BLOCK // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(len(blocks), dtype=torch.float32, device=weight.device)
    first, steps = _steps(kind)
    for part in _chunks(blocks):
        block = blocks[part].float()  # (blocks, 64)
        absmax[part] = scale = block.abs().amax(1)
        scaled = block * (1 / scale.clamp(min=1e-38))[:, None]  # in [-1, 1]
        codes = torch.full(scaled.shape, first, dtype=torch.uint8, device=weight.device)
        for middle, step in steps:  # from the lowest code point up: past the middle, the next one is nearer
            codes.add_(scaled > middle, alpha=step)
        packed[part] = codes[:, ::2] * 16 + codes[:, 1::2]
    return packed.view(-1, 1), absmax


@functools.cache
def _steps(kind: str) -> tuple[int, list[tuple[float, int]]]:
    """The code of the lowest point, and on the way up each middle and what to add to the code there (modulo 256)."""
    points, order = torch.tensor(CODES[kind], dtype=torch.float32).sort(stable=True)
    middles = (points[:-1] + points[1:]) / 2
    return int(order[0]), list(zip(middles.tolist(), (order.diff() % 256).tolist(), strict=True))


def pack_8bit(weight: Tensor) -> list[Tensor]:
    """Codes (out, in) int8 and the rows' absmax (out,) float32: code = round(127 w / absmax)."""
    absmax = weight.detach().abs().amax(1).float()
    factor = 127 / absmax.clamp(min=1e-36)  # finite for a row of zeros
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for part in _chunks(codes):
        codes[part] = torch.round(weight.detach()[part] * factor[part, None])
    return [codes, absmax]


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix, each of about one chunk of values and at least one row."""
    step = max(1, (CHUNK if rows.device.type == "cpu" else GPU_CHUNK) // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


# --- unpacking

UNPACKERS: dict[str, Callable[[list[Tensor], str, torch.dtype], Tensor]] = {}  # faster ones, by type of device


def unpack(parts: list[Tensor], kind: str, shape: tuple[int, ...] | list[int], dtype: torch.dtype) -> Tensor:
    """The weight that the parts stand for, (out, in): each code's value times its scale, rounded to `dtype`.

    The parts are codes and absmax; of a weight with double quantization, codes and the four of `pack_scales`.
    """
    if kind != "int8":
        device = parts[0].device.type
        default = unpack_bitsandbytes if uses_bitsandbytes(device) else unpack_table
        return UNPACKERS.get(device, default)(parts, kind, dtype).view(*shape)
    codes, absmax = parts
    weight, scale = torch.empty(codes.shape, dtype=dtype, device=codes.device), (absmax / 127)[:, None]
    for part in _chunks(codes):
        torch.mul(codes[part], scale[part], out=weight[part])
    return weight


@functools.cache
def uses_bitsandbytes(device_type: str) -> bool:
    """How to unpack 4 bits: with bitsandbytes on CUDA and the CPU where it is installed, otherwise with a table."""
    return device_type in ("cuda", "cpu") and importlib.util.find_spec("bitsandbytes") is not None


def unpack_bitsandbytes(parts: list[Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    import bitsandbytes  # noqa: F401 (this adds its operators to torch.ops)

    packed, absmax, *nested = parts
    if nested:
        scales, values, offset = nested
        dequantize = torch.ops.bitsandbytes.dequantize_blockwise.default
        absmax = dequantize(absmax, scales, values, NESTED, torch.float32) + offset
    # As rows of 64, whatever the weight's shape: with AVX-512, bitsandbytes 0.50 uses the wrong scales for a weight
    # whose row length is not a multiple of 64.
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, BLOCK, kind, (len(absmax), BLOCK), dtype)


def unpack_table(parts: list[Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    packed, absmax, *nested = parts
    if nested:
        absmax = unpack_scales(absmax, *nested)
    table, packed = _pairs(kind, packed.device), packed.view(-1, BLOCK // 2)
    weight = torch.empty((len(absmax), BLOCK), dtype=dtype, device=packed.device)
    for part in _chunks(weight):
        pairs = F.embedding(packed[part].int(), table)  # (blocks, 32, 2)
        weight[part] = pairs.view(-1, BLOCK) * absmax[part, None]
    return weight


@functools.cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """The values of the two codes in each byte, (256, 2) float32; the first is in the high bits."""
    codes = torch.tensor(CODES[kind], dtype=torch.float32)
    return torch.cartesian_prod(codes, codes).to(device)


def packed_bytes(layer: Frozen) -> int:
    """The bytes that the layer's weight takes: codes, scales and the scales of the scales."""
    parts = [layer.weight] if isinstance(layer, nn.Linear) else layer.parts
    return sum(part.nbytes for part in parts)
