"""A block whose linears of one input are computed together with their adapters and keep little for backward.

Only A and B get a gradient, so backward needs little: x for dA, u = x A^T (r per token) for dB, and W for dx.
`_GroupedLinear` keeps exactly that, once for all linears of one input. If that input is a cheap function of something
that is kept anyway (a norm of the residual stream, silu(gate) * up), it is recomputed instead of kept.
(DoRA also keeps each output, for the gradient of m.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanoft.attention import SequenceContext
from nanoft.blocks.deltanet import GatedDeltaNet
from nanoft.blocks.per_layer import finish
from nanoft.blocks.short_conv import ShortConv
from nanoft.kernels import fused
from nanoft.kernels.attention import FastContext
from nanoft.lora import VARIANTS, LoRALinear, weight_of
from nanoft.model import MLP, Block, SelfAttention, identity, select
from nanoft.nf4 import Frozen, PackedLinear

LINEARS = {nn.Linear, PackedLinear}
OUTPUTS: dict[type[nn.Module], str] = {SelfAttention: "o_proj", GatedDeltaNet: "out_proj", ShortConv: "out_proj"}
Prepare = Callable[..., Tensor]  # from what is kept to the linears' input


class FastBlock(Block):
    """A `Block`, with the same modules, that keeps less for backward. Each half is fast if its types are known.

    The last block computes `o_proj` at the target positions only. With hooks on its halves, which would not be called,
    it takes the reference path.
    """

    def forward(self, x: Tensor, context: SequenceContext, target_positions: Tensor | None = None) -> Tensor:
        mixer = self.mixer
        if mixer._forward_hooks or self.mlp._forward_hooks:
            return super().forward(x, context, target_positions)
        if supports_mixer(self):
            projected = grouped_linear([getattr(mixer, name) for name in mixer.inputs], *fused.normed(self.norm(0), x))
            mix, output = _attend if type(mixer) is SelfAttention else type(mixer).mix, OUTPUTS[type(mixer)]
            x, *mixed = (select(part, target_positions) for part in (x, *mix(mixer, projected, context)))
            gate = mixer.gate if len(mixed) > 1 else identity
            y = self.add(x, self.norm(1)(grouped_linear((getattr(mixer, output),), gate, *mixed)[0]))
        else:
            y = self.add(x, self.norm(1)(mixer(self.norm(0)(x), context)))
            x, y = select(x, target_positions), select(y, target_positions)
        x = x if self.parallel else y
        if not supports_mlp(self):
            return finish(self, self.add(y, self.norm(3)(self.mlp(self.norm(2)(x)))), context, target_positions)
        is_used = not context.recomputing or self.norm(3) is not identity or bool(self.per_layer)
        y = self.add(y, self.norm(3)(grouped_mlp(self.mlp, *fused.normed(self.norm(2), x), is_used=is_used)))
        return finish(self, y, context, target_positions)


def supports(block: nn.Module) -> bool:
    """Whether at least one half of a block consists of exactly the types that are known here."""
    return type(block) is Block and (supports_mixer(block) or supports_mlp(block))


def supports_mixer(block: Block) -> bool:
    """Recomputing its gate, a GatedDeltaNet's norm is no input: its weight can be trained only as another type."""
    known = type(block.mixer) in OUTPUTS and type(getattr(block.mixer, "norm", None)) in (
        *fused.KNOWN_NORMS,
        type(None),
    )
    return known and is_known(block.norm(0), block.mixer)


def supports_mlp(block: Block) -> bool:
    return type(block.mlp) is MLP and is_known(block.norm(2), block.mlp)


def is_known(norm: Any, half: nn.Module) -> bool:
    """Whether norm and linears are of exactly the known types: a subclass may compute something else."""
    linears = [module for name, module in half.named_children() if "_proj" in name]
    adapted = [linear.base if type(linear) in VARIANTS.values() else linear for linear in linears]
    return (type(norm) in fused.KNOWN_NORMS or norm is identity) and {type(linear) for linear in adapted} <= LINEARS


def _attend(attn: SelfAttention, projected: list[Tensor], context: SequenceContext) -> tuple[Tensor, ...]:
    """What attention collects, (b, q, h * d), and the projection that has its gate, if it has one."""
    rotation = context.rotations[attn.rope] if type(context) is FastContext and attn.rope is not None else None
    heads = fused.heads(attn, projected, rotation) or attn.heads(projected, context)
    y = context.attend(*heads, attn).flatten(2)
    return (y, projected[0]) if attn.gated else (y,)


def grouped_mlp(mlp: Any, prepare: Prepare, *inputs: Tensor, is_used: bool = True) -> Tensor:
    """mlp(prepare(*inputs)); of what it computes, the projections alone are kept. If it is not used, it may be 0."""
    projected = grouped_linear([getattr(mlp, name) for name in mlp.inputs], prepare, *inputs)
    return grouped_linear((mlp.down_proj,), fused.activation(mlp, inputs[0]), *projected, is_used=is_used)[0]


def grouped_linear(
    linears: Sequence[Frozen | LoRALinear], prepare: Prepare, *inputs: Tensor, is_used: bool = True
) -> list[Tensor]:
    """Each linear's output for the same x = prepare(*inputs), like `[linear(x) for linear in linears]`.

    It falls back to exactly that without adapters, if W itself is trained, under autocast, and in torch.compile, which
    decides by itself what to fuse and keep.

    Args:
        linears: all, some or none with an adapter.
        prepare: recomputed in backward. Whatever gets a gradient in it must be among `inputs`.
        is_used: False: only the gradients matter, as of the end of a block that is recomputed; outputs may be 0.
    """
    adapters = [linear for linear in linears if isinstance(linear, LoRALinear)]
    bases = [linear.base if isinstance(linear, LoRALinear) else linear for linear in linears]
    declined = torch.compiler.is_compiling() or torch.is_autocast_enabled(inputs[0].device.type)
    is_trained = any(p.requires_grad for base in bases if isinstance(base, nn.Linear) for p in base.parameters())
    if declined or is_trained or not adapters or not adapters[0].enabled:
        x = prepare(*inputs)
        return [linear(x) for linear in linears]
    empty, scalings, factors = adapters[0].lora_A.new_empty, list[float](), list[Tensor]()
    for linear in linears:  # one without an adapter has an adapter of rank 0
        if isinstance(linear, LoRALinear):
            scalings.append(linear.scaling)
            factors += linear.factors()
        else:
            scalings.append(0.0)
            factors += empty(0, linear.in_features), empty(linear.out_features, 0)
    is_used = is_used or any(adapter.lora_magnitude_vector is not None for adapter in adapters)
    dropout = adapters[0].dropout if adapters[0].training else 0.0
    group = _Group(prepare, len(inputs), bases, scalings, dropout, is_used)
    outputs = zip(linears, _GroupedLinear.apply(group, *inputs, *factors), strict=True)
    return [linear.apply_magnitude_and_bias(y) if isinstance(linear, LoRALinear) else y for linear, y in outputs]


class _Group(NamedTuple):
    """Linears of one input x = prepare(*inputs), without the tensors that get a gradient."""

    prepare: Prepare
    inputs: int  # how many
    bases: list[Frozen]
    scalings: list[float]
    dropout: float
    is_used: bool  # whether anything reads the outputs


class _GroupedLinear(torch.autograd.Function):
    """Frozen linears of one input with their adapters. With the A_i stacked to A, and s_i the scalings:

        u = d(x) A^T,   y_i = x W_i^T + b_i + s_i u_i B_i^T
        g_i = dL/dy_i,  du_i = s_i g_i B_i,  dB_i = s_i g_i^T u_i,  dA = du^T d(x),  dx = sum_i g_i W_i + d(du A)

    d is the dropout of the adapters' input: multiplication by a mask of 0 and 1 / (1 - p), one for the group. The
    tensors are the inputs of `prepare`, then A_1, B_1, A_2, B_2, ...
    """

    @staticmethod
    def forward(ctx: Any, group: _Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, a, b = tensors[: group.inputs], tensors[group.inputs :: 2], tensors[group.inputs + 1 :: 2]
        x = group.prepare(*inputs)
        flat = x.flatten(0, -2)  # (n, in)
        mask = F.dropout(torch.ones_like(flat), group.dropout) if group.dropout else None
        u = _masked(flat, mask) @ torch.cat(a).to(x.dtype).T  # (n, sum of ranks)
        outputs = []
        u_of_each = u.split([len(a_i) for a_i in a], dim=1)
        for base, scaling, u_i, b_i in zip(group.bases, group.scalings, u_of_each, b, strict=True):
            if group.is_used:
                y = base(flat).addmm_(u_i, b_i.to(x.dtype).T, alpha=scaling)  # (n, out)
            else:
                y = x.new_zeros(()).expand(len(flat), base.out_features)
            outputs.append(y.unflatten(0, x.shape[:-1]))
        ctx.group = group
        ctx.save_for_backward(u, mask, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group: _Group = ctx.group
        u, mask, *tensors = ctx.saved_tensors
        inputs, a, b = tensors[: group.inputs], tensors[group.inputs :: 2], tensors[group.inputs + 1 :: 2]
        ranks, g = [len(a_i) for a_i in a], [gradient.flatten(0, -2) for gradient in gradients]  # g_i: (n, out)
        du = torch.cat([s * (g_i @ b_i.to(g_i.dtype)) for g_i, b_i, s in zip(g, b, group.scalings, strict=True)], 1)
        db = [s * (g_i.T @ u_i) for g_i, u_i, s in zip(g, u.split(ranks, dim=1), group.scalings, strict=True)]
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        later: list[Tensor] = []
        with torch.enable_grad():
            x = group.prepare(*inputs)
            rest = _Rest.apply(x, later)
        shape = x.shape
        da: Sequence[Tensor | None] = [None] * len(a)
        if any(ctx.needs_input_grad[1 + group.inputs :: 2]):
            da = (du.T @ _masked(x.detach().flatten(0, -2), mask)).split(ranks)
        del x  # before dx: backward of `prepare` does not need it, and here memory is at its peak
        if rest.requires_grad:
            dx = _masked(du @ torch.cat(a).to(du.dtype), mask)
            for base, g_i in zip(group.bases, g, strict=True):
                dx.addmm_(g_i, weight_of(base).to(dx.dtype))
            later.append(dx.view(shape))
            del dx  # the rest of backward frees it
            rest.backward()  # on to the inputs
        d_factors = [None if d is None else d.to(a[0].dtype) for pair in zip(da, db, strict=True) for d in pair]
        return (None, *(tensor.grad for tensor in inputs), *d_factors)


class _Rest(torch.autograd.Function):
    """A scalar whose backward is the rest of backward, from the gradient of x, which is put into a list by then.

    For a gradient that is passed to `torch.autograd.backward` PyTorch imports sympy: 43 MB and 0.3 s.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, later: list[Tensor]) -> Tensor:
        ctx.later = later
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.later.pop(), None


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
