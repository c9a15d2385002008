"""Linears of one input together with their adapters, in one autograd function that keeps little for backward.

Nothing but A and B gets a gradient, so backward needs little: x for dA, u = x A^T (r numbers per token) for dB, and W,
which is there anyway, to pass the gradient on. `_GroupedLinear` keeps exactly that, once for all linears of one input;
and where that input is a cheap function of something that is kept anyway (a norm of the residual stream,
silu(gate) * up), it is not kept either but recomputed. (DoRA keeps each output, too, for the gradient of m.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from nanoft.lora import LoRALinear
from nanoft.nf4 import Frozen, matmul_backward

Prepare = Callable[..., Tensor]  # from what is kept to the linears' input


def identity(x: Tensor) -> Tensor:
    return x


def grouped_linear(linears: Sequence[Frozen | LoRALinear], prepare: Prepare, *inputs: Tensor) -> list[Tensor]:
    """Each linear's output for the same x = prepare(*inputs), like `[linear(x) for linear in linears]`.

    Without adapters it is just that; also under autocast, and in torch.compile, which chooses itself what to fuse and
    what to keep.

    Args:
        linears: all, some or none with an adapter.
        prepare: recomputed in backward. Whatever gets a gradient in it must be among `inputs`.
    """
    adapters = [linear for linear in linears if isinstance(linear, LoRALinear)]
    declined = torch.compiler.is_compiling() or torch.is_autocast_enabled(inputs[0].device.type)
    if declined or not adapters or not adapters[0].enabled or any(map(_is_trained, linears)):
        x = prepare(*inputs)
        return [linear(x) for linear in linears]
    group = _Group(prepare, len(inputs), linears, adapters[0].dropout if adapters[0].training else 0.0)
    outputs = zip(linears, _GroupedLinear.apply(group, *inputs, *group.factors()), strict=True)
    return [linear.apply_magnitude_and_bias(y) if isinstance(linear, LoRALinear) else y for linear, y in outputs]


def _is_trained(linear: Frozen | LoRALinear) -> bool:
    """Whether W or b itself gets a gradient."""
    base = linear.base if isinstance(linear, LoRALinear) else linear
    return isinstance(base, nn.Linear) and any(p.requires_grad for p in base.parameters())


class _Group:
    """Linears of one input x = prepare(*inputs); one without an adapter has an adapter of rank 0."""

    def __init__(self, prepare: Prepare, inputs: int, linears: Sequence[Frozen | LoRALinear], dropout: float):
        self.prepare, self.inputs, self.dropout, self.linears = prepare, inputs, dropout, linears
        self.bases = [linear.base if isinstance(linear, LoRALinear) else linear for linear in linears]
        self.scalings = [linear.scaling if isinstance(linear, LoRALinear) else 0.0 for linear in linears]

    def factors(self) -> list[Tensor]:
        """A_1, B_1, A_2, B_2, ..."""
        like = next(linear.lora_A for linear in self.linears if isinstance(linear, LoRALinear))
        pairs: list[Tensor] = []
        for linear in self.linears:
            if isinstance(linear, LoRALinear):
                pairs += linear.factors()
            else:
                pairs += [like.new_empty(0, linear.in_features), like.new_empty(linear.out_features, 0)]
        return pairs

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The inputs, the A_i and the B_i."""
        factors = list(tensors[self.inputs :])
        return list(tensors[: self.inputs]), factors[::2], factors[1::2]


class _GroupedLinear(torch.autograd.Function):
    """Frozen linears of one input with their adapters. With the A_i stacked to A, and s_i the scalings:

        u = d(x) A^T,   y_i = x W_i^T + b_i + s_i u_i B_i^T
        g_i = dL/dy_i,  du_i = s_i g_i B_i,  dB_i = s_i g_i^T u_i,  dA = du^T d(x),  dx = sum_i g_i W_i + d(du A)

    d is the dropout of the adapters' input: multiplication by a mask of 0 and 1 / (1 - p), one for the group.
    """

    @staticmethod
    def forward(ctx: Any, group: _Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, a, b = group.split(tensors)
        x = group.prepare(*inputs)
        flat = x.flatten(0, -2)  # (n, in)
        mask = _dropout_mask(flat, group.dropout)
        u = _masked(flat, mask) @ torch.cat(a).to(x.dtype).T  # (n, sum of ranks)
        outputs = []
        for base, scaling, u_i, b_i in zip(group.bases, group.scalings, _by_rank(u, a), b, strict=True):
            y = base(flat)  # (n, out)
            y.addmm_(u_i, b_i.to(y.dtype).T, alpha=scaling)
            outputs.append(y.unflatten(0, x.shape[:-1]))
        ctx.group = group
        ctx.save_for_backward(u, mask, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group: _Group = ctx.group
        u, mask, *tensors = ctx.saved_tensors
        inputs, a, b = group.split(tensors)
        g = [gradient.flatten(0, -2) for gradient in gradients]  # (n, out) each
        du = torch.cat([s * (g_i @ b_i.to(g_i.dtype)) for g_i, b_i, s in zip(g, b, group.scalings, strict=True)], 1)
        db = [s * (g_i.T @ u_i) for g_i, u_i, s in zip(g, _by_rank(u, a), group.scalings, strict=True)]
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        with torch.enable_grad():
            x = group.prepare(*inputs)
        shape, edge = x.shape, get_gradient_edge(x) if x.requires_grad else None
        da: Sequence[Tensor | None] = [None] * len(a)
        if any(ctx.needs_input_grad[1 + group.inputs :: 2]):
            da = (du.T @ _masked(x.detach().flatten(0, -2), mask)).split([len(a_i) for a_i in a])
        del x  # before dx: backward of `prepare` does not need it, and here memory is at its peak
        if edge is not None:
            dx = _masked(du @ torch.cat(a).to(du.dtype), mask)
            for base, g_i in zip(group.bases, g, strict=True):
                dx += matmul_backward(base, g_i)
            torch.autograd.backward(edge, dx.view(shape))  # on to the inputs
        d_factors = [None if d is None else d.to(a[0].dtype) for pair in zip(da, db, strict=True) for d in pair]
        return (None, *(tensor.grad for tensor in inputs), *d_factors)


def _by_rank(u: Tensor, a: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return u.split([len(a_i) for a_i in a], dim=1)


def _dropout_mask(x: Tensor, p: float) -> Tensor | None:
    return F.dropout(torch.ones_like(x), p) if p else None


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
