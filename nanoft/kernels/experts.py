"""Experts that keep less for backward, and whose products have few different sizes, or are one for all experts.

On a GPU, rows sorted by expert are multiplied by the weights of all experts in one launch, a grouped product, which
finds on the device where the rows of an expert end. So nothing waits for the counts, as the loop over experts does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanoft.blocks.double_quantization import unpack_scales
from nanoft.blocks.moe import Experts, MLPAndExperts
from nanoft.kernels import fused
from nanoft.kernels.block import grouped_mlp, is_known
from nanoft.lora import LoRALinear
from nanoft.model import MLP, identity
from nanoft.nf4 import Frozen, unpack

MULTIPLE = 32  # of the rows of an expert, on a CPU in 16 bits
ALIGNED = 8  # numbers of 16 bits: what a grouped product needs its rows to be a multiple of
grouped_mm: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since PyTorch 2.10
GPUS = (9, 10) if torch.__version__ >= "2.9" else (9,)  # compute capabilities with a kernel; PyTorch 2.8 refuses 10


class FastMLP(MLP):
    """One expert, or the MLP beside them, with the same modules: its input and its projections are kept."""

    def forward(self, x: Tensor) -> Tensor:
        return grouped_mlp(self, identity, x) if len(x) else super().forward(x)  # a kernel needs something to do


class FastExperts(Experts):
    """On a CPU an expert has a multiple of 32 rows in 16 bits, because oneDNN makes a kernel for each number of rows.

    Such a kernel takes 0.8 MB and 13 ms, measured; the product of 300 x 512 and 512 x 64 takes 1.5 ms.
    """

    experts: Any
    is_uniform: bool  # the linears of a name are alike in all experts

    def arrange(self) -> None:
        """Find out whether the experts are uniform; if so, their weights become slices of one tensor on such a GPU."""
        linears = [self.linears(name) for name in (*self.experts[0].inputs, "down_proj")]
        self.is_uniform = all(map(are_alike, linears))
        for own in linears if self.is_uniform else ():
            for tensors in zip(*(stored(base_of(linear)) for linear in own), strict=True):
                is_shard = hasattr(tensors[0], "full_tensor")
                if has_grouped_products(tensors[0].device, torch.bfloat16) and not is_shard:
                    for tensor, part in zip(tensors, torch.stack(tensors), strict=True):
                        tensor.data = part

    def outputs(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Those of `Experts`, by grouped products where there is a kernel for them."""
        if not (self.is_uniform and len(tokens) and has_grouped_products(tokens.device, tokens.dtype)):
            return super().outputs(tokens, chosen)
        expert, order = chosen.flatten().sort(stable=True)
        numbers, first = torch.arange(len(self.experts), device=expert.device), self.experts[0]
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)  # of the rows of each expert
        x = tokens.index_select(0, order // self.chosen)
        projected = [multiply(x, ends, self.linears(name)) for name in first.inputs]
        y = multiply(fused.activation(first, x)(*projected), ends, self.linears("down_proj"))
        return y.index_select(0, order.argsort()).unflatten(0, chosen.shape)

    def linears(self, name: str) -> list[Any]:
        return [getattr(expert, name) for expert in self.experts]

    def rows_by_expert(self, chosen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int]]:
        """Those of `Experts`, and rows that no pair has."""
        token, place, counts = super().rows_by_expert(chosen, dtype)
        if chosen.device.type != "cpu" or dtype.itemsize > 2 or not self.training:
            return token, place, counts
        own = torch.tensor(counts)
        more = -own % MULTIPLE
        moved = torch.arange(len(token)) + (more.cumsum(0) - more).repeat_interleave(own)  # where each row is now
        token = token.new_zeros(int((own + more).sum())).index_copy(0, moved, token)
        return token, moved[place], (own + more).tolist()


def multiply(x: Tensor, ends: Tensor, linears: Sequence[Any]) -> Tensor:
    """W_e x + b_e + s B_e A_e d(x) for the expert e of each row: (rows, in) -> (rows, out).

    The rows are sorted by expert; `ends`, (experts,) int32, says where those of each expert end.
    """
    adapters = [linear for linear in linears if isinstance(linear, LoRALinear)]
    y: Tensor = _FrozenProduct.apply(x, ends, [*map(base_of, linears)])
    if not adapters or not adapters[0].enabled:
        return y
    factors = zip(*(adapter.factors() for adapter in adapters), strict=True)
    has_rows = (counts_of(ends) > 0)[:, None, None]  # the gradient of the others is zero
    a, b = (torch.where(has_rows, one, one.detach()).to(x.dtype) for one in map(torch.stack, factors))
    padding = -a.shape[1] % ALIGNED  # of the rank
    a, b = F.pad(a, (0, 0, 0, padding)), F.pad(b, (0, padding))  # (experts, r, in), (experts, out, r)
    u = grouped_mm(F.dropout(x, adapters[0].dropout, adapters[0].training), a.transpose(1, 2), offs=ends)
    return torch.add(y, grouped_mm(u, b.transpose(1, 2), offs=ends), alpha=adapters[0].scaling)


class _FrozenProduct(torch.autograd.Function):
    """y = W_e x + b_e and dL/dx = W_e^T dL/dy, for the expert e of each row; weights are unpacked for both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, linears: Sequence[Frozen]) -> Tensor:
        ctx.ends, ctx.linears = ends, linears
        y: Tensor = grouped_mm(x, weights(linears, x.dtype).transpose(1, 2), offs=ends)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if biases:
            y += together(biases).to(y.dtype).repeat_interleave(counts_of(ends), dim=0, output_size=len(y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return grouped_mm(gradient.contiguous(), weights(ctx.linears, gradient.dtype), offs=ctx.ends), None, None


def counts_of(ends: Tensor) -> Tensor:
    return ends.diff(prepend=ends.new_zeros(1))


def weights(linears: Sequence[Frozen], dtype: torch.dtype) -> Tensor:
    """The weights of all experts, (experts, out, in); packed ones are unpacked together, as if they were one."""
    first, held = linears[0], [together(parts) for parts in zip(*map(stored, linears), strict=True)]
    if isinstance(first, nn.Linear):
        return held[0].to(dtype)
    packed, absmax, *nested = held
    if nested:
        scales, values, means = nested
        absmax = unpack_scales(absmax, scales, values[0], means)
    shape = (len(linears), first.out_features, first.in_features)
    return unpack([packed.flatten(0, 1), absmax.flatten()], first.kind, shape, first.dtype).view(shape).to(dtype)


def stored(linear: Frozen) -> list[Tensor]:
    return [linear.weight] if isinstance(linear, nn.Linear) else linear.parts


def together(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one, (n, ...): a view, if they follow each other in memory at equal distances, or else a copy."""
    first, size = tensors[0], tensors[0].element_size()
    distances = {after.data_ptr() - before.data_ptr() for before, after in pairwise(tensors)}
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    distance = distances.pop() if len(distances) == len(memory) == 1 else 0
    if distance <= 0 or distance % size:
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (distance // size, *first.stride()))


@functools.cache
def has_grouped_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch has a kernel for them: of bfloat16, on Hopper and data-center Blackwell; elsewhere it loops."""
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in GPUS


def are_alike(linears: Sequence[Any]) -> bool:
    """Whether they differ in their numbers alone: frozen, of sizes that fit, with plain LoRA of one rank or without."""
    bases, adapters = [*map(base_of, linears)], [one for one in linears if isinstance(one, LoRALinear)]
    ranks = {(adapter.scaling, len(adapter.factors()[0])) for adapter in adapters}
    is_plain = all(adapter.lora_magnitude_vector is None and adapter.bias is None for adapter in adapters)
    is_frozen = not any(p.requires_grad for base in bases for p in base.parameters())
    fits = bases[0].in_features % ALIGNED == bases[0].out_features % ALIGNED == 0
    is_one = len({*map(type, bases)}) == 1 and len(adapters) in (0, len(bases)) and len(ranks) < 2
    return is_one and is_plain and is_frozen and fits


def base_of(linear: Frozen | LoRALinear) -> Any:
    return linear.base if isinstance(linear, LoRALinear) else linear


def install(block: Any) -> None:
    """Use these for the experts of a block, if their types are known."""
    mlp: Any = block.mlp
    if type(mlp) is MLPAndExperts:
        if is_fast(mlp.dense):
            mlp.dense.__class__ = FastMLP
        mlp = mlp.sparse
    if type(mlp) is Experts and all(map(is_fast, mlp.experts)):
        mlp.__class__ = FastExperts
        for expert in mlp.experts:
            expert.__class__ = FastMLP
        mlp.arrange()  # type: ignore[operator]


def is_fast(mlp: nn.Module) -> bool:
    return type(mlp) is MLP and is_known(identity, mlp)
