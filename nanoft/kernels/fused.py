"""Norm, activation and rotation in fewer passes: Triton's kernels (triton_kernels.py) on CUDA GPUs on which they agree
with PyTorch's operations; on a CPU, a gradient of the norm that is written by hand."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoft import nf4
from nanoft.attention import Rotation
from nanoft.blocks.norms import NORM_KINDS, RMSNorm
from nanoft.model import ACTIVATIONS, MLP, SelfAttention, identity

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values
_kernels: dict[str, Any] = {}  # the module, by type of device, where its check has passed


def enable(device: torch.device) -> str:
    """Use the kernels on a device if Triton is installed; return a warning if they do not work there, or "".

    With TRITON_INTERPRET=1 they run on a CPU, slowly.
    """
    has_triton = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if device.type in _kernels or not has_triton or importlib.util.find_spec("triton") is None:
        return ""
    try:
        module = importlib.import_module("nanoft.kernels.triton_kernels")
        problem = module.first_difference(device)
    except Exception as error:  # no C compiler, a driver that does not fit, ...
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        return f"system.kernels: Triton's kernels do not work here ({problem}): using PyTorch's operations"
    _kernels[device.type] = module
    nf4.UNPACKERS[device.type] = module.unpack_4bit
    return ""


def kernels(x: Tensor) -> Any:
    """The kernels for a tensor, or None; torch.compile fuses the formulas itself."""
    return None if torch.compiler.is_compiling() else _kernels.get(x.device.type)


def normed(norm: Any, x: Tensor) -> tuple[Any, ...]:
    """norm(x) as a function, and its inputs that get a gradient."""
    if norm is identity:
        return norm, x
    if is_frozen_rms(norm) and not torch.compiler.is_compiling():
        if kernels(x):
            return partial(kernels(x).rms_norm, eps=norm.eps, offset=norm.offset), x, norm.weight
        if x.device.type == "cpu":
            return partial(_FrozenRMSNorm.apply, norm.eps, norm.offset), x, norm.weight
    return (norm.formula, x, *norm.parameters())


def is_frozen_rms(norm: Any) -> bool:
    return type(norm) in (RMSNorm, FastRMSNorm) and not norm.weight.requires_grad


class FastRMSNorm(RMSNorm):
    """With a frozen weight, it keeps only its input for backward, and the size of each position."""

    def forward(self, x: Tensor) -> Tensor:
        function, *inputs = normed(self, x)
        result: Tensor = function(*inputs)
        return result


KNOWN_NORMS = {*NORM_KINDS.values(), FastRMSNorm}


class _FrozenRMSNorm(torch.autograd.Function):
    """y = n w with n = x / rms(x), and for h = w dL/dy the gradient  dx = (h - n mean(h n)) / rms(x).

    PyTorch differentiates each operation of the norm: twice the passes over x.
    """

    @staticmethod
    def forward(ctx: Any, eps: float, offset: float, x: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = offset + weight.to(wide)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)  # sqrt(sum(x^2)), (..., 1)
        inverse = (size.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        n, h = x * inverse, grad_outputs[0] * weight
        return None, None, h.addcmul_(n, (h * n).mean(-1, keepdim=True), value=-1).mul_(inverse).to(x.dtype), None


def activation(mlp: MLP, x: Tensor) -> Any:
    """`mlp.activate` as a function of its projections, of which x is one."""
    kind = next((name for name, function in ACTIVATIONS.items() if function is mlp.activation), "")
    if not kernels(x) or mlp.is_plain or mlp.limit is not None or not kind:
        return mlp.activate

    def activate(*projected: Tensor) -> Tensor:
        gate, up = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
        return kernels(x).gated(gate, up, kind)

    return activate


def heads(attn: SelfAttention, projected: list[Tensor], rotation: Rotation | None) -> Heads | None:
    """`SelfAttention.heads` with a kernel for norm and rotation; None without such norms or rotation, or with gates."""
    norms = [norm for norm in (attn.q_norm, attn.k_norm) if is_frozen_rms(norm)]
    special = attn.over_width or attn.gated or attn.v_norm is not identity
    if rotation is None or len(norms) < 2 or special or not kernels(projected[0]):
        return None
    parts = projected if len(projected) == 3 else projected[0].split(attn.widths, dim=-1)
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    turn = kernels(q).rotate
    q, k = (turn(x, rotation.cos, rotation.sin, n.weight, n.eps, n.offset) for x, n in zip((q, k), norms, strict=True))
    return q if rotation.growth is None else q * rotation.growth, k, v
