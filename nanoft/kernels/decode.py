"""Generation with less overhead: blocks without modules, weights in the order in which a CPU reads them, one rotation.

A step of generation has one position per sequence, so its cost is reading the weights and, in a small model, Python
itself. So a block is replaced by its twin: the block's own `forward`, and those of its parts, on plain objects whose
linears are functions. No equation of the block is repeated here.
"""

from __future__ import annotations

import functools
import platform
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft.attention import AttentionLayer, CacheContext, Rotation
from nanoft.blocks.deltanet import GatedDeltaNet
from nanoft.blocks.moe import Experts, MLPAndExperts
from nanoft.blocks.norms import NORM_KINDS, RMSNorm
from nanoft.blocks.short_conv import ShortConv
from nanoft.kernels.block import LINEARS, FastBlock
from nanoft.kernels.experts import FastExperts, FastMLP
from nanoft.kernels.fused import FastRMSNorm
from nanoft.lora import VARIANTS, LoRALinear, linears_of, weight_of
from nanoft.model import MLP, Block, Decoder, SelfAttention
from nanoft.nf4 import PackedLinear
from nanoft.runtime.memory import available_bytes, available_host_bytes

Function = Callable[..., Tensor]
Build = Callable[[Tensor, Tensor | None], Function]  # a linear from its weight and bias
MEMORY_SHARE = 0.5  # largest share of the free memory for a second copy of the weights
METHODS = (types.FunctionType, staticmethod, property)
CACHED_BYTES = 16e6  # float32 weights up to this size fit into a processor's caches, so their order does not matter


class FastCacheContext(CacheContext):
    """A `CacheContext` that rotates q and k together, and needs no mask if no slot is empty."""

    @classmethod
    def tables(cls, rotations: Sequence[Rotation], filled: Tensor) -> tuple[Sequence[Rotation], Tensor]:
        """The factors of each half of a head and of its other half, (b, slots, 1, n); and which slots are filled."""
        doubled = [Rotation(torch.cat((c, c), dim=-1), torch.cat((-s, s), dim=-1), g) for c, s, g in rotations]
        return doubled, filled[:, None, None]

    def rotate(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        if layer.rope is None:
            return q, k
        cos, sin, growth = self.rotations[layer.rope]
        n, both = cos.shape[-1], torch.cat((q, k), dim=2)  # (b, 1, h + g, d)
        turned = both[..., :n]
        swapped = turned.unflatten(-1, (2, -1)).flip(3).flatten(3)  # the two halves swapped
        turned = torch.addcmul(turned * cos, swapped, sin)
        both = turned if n == both.shape[-1] else torch.cat((turned, both[..., n:]), dim=-1)
        q, k = both[:, :, : q.shape[2]], both[:, :, q.shape[2] :]
        return q if growth is None else q * growth, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        if layer.scores.cap is not None or layer.scores.sinks:
            return super().attend(q, k, v, layer)
        keys, values, seen = self.write(k, v, layer)
        # the h / g query heads of a key head become h / g queries, so that no key is repeated
        queries = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])
        mask = self.filled[..., seen] if seen.start < self.full else None
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=layer.scores.scale)
        return y.reshape(q.shape)


def twin(module: Any, build: Build | None) -> Function:
    """A function that computes what the module computes; the module itself if its type is not known.

    `build` makes the linears, from quantized weights after dequantizing them once; None: each module's own computation.
    """
    if isinstance(module, FastBlock):
        return _twin_class(Block)(module, build)
    kind: Any = {FastMLP: MLP, FastExperts: Experts, FastRMSNorm: RMSNorm}.get(type(module), type(module))
    if kind is nn.ModuleList:
        return [twin(child, build) for child in module]  # type: ignore[return-value]
    if kind in (SelfAttention, GatedDeltaNet, ShortConv, MLP, Experts, MLPAndExperts):
        return _twin_class(kind)(module, build)
    if kind in VARIANTS.values():
        return adapted(module, build) if module.enabled else twin(module.base, build)
    if build is not None and kind in LINEARS:
        with torch.inference_mode(False), torch.no_grad():  # parts of a packed weight may be views
            return build(weight_of(module), module.bias)
    if kind is nn.Linear:
        return plain(module.weight, module.bias)
    if kind in NORM_KINDS.values():
        own = tuple(module.parameters())
        return lambda x, formula=module.formula: formula(x, *own)
    return module


class Twin:
    """The attributes and methods of a module, without nn.Module, and with twins instead of its children."""

    def __init__(self, module: nn.Module, build: Build | None):
        for name, value in vars(module).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.training = False
        for name, own in module._parameters.items():
            setattr(self, name, own)
        for name, child in module._modules.items():
            setattr(self, name, None if child is None else twin(child, build))

    def __call__(self, *arguments: Any) -> Tensor:
        return self.forward(*arguments)  # type: ignore[attr-defined]


@functools.cache
def _twin_class(kind: Any) -> type[Twin]:
    """`Twin` with the methods of a module's class, which are bound when called, so that a twin frees its weights."""
    methods = {name: own for name, own in vars(kind).items() if isinstance(own, METHODS) and not name.startswith("_")}
    return type(kind.__name__, (Twin,), methods)


def plain(weight: Tensor, bias: Tensor | None) -> Function:
    """x W^T + b."""
    return lambda x: F.linear(x, weight, bias)


def adapted(linear: LoRALinear, build: Build | None) -> Function:
    """A linear with its adapter; A and B are rounded to the model's dtype once."""
    base, (a, b), scaling = twin(linear.base, build), linear.factors(), linear.scaling

    @functools.cache
    def rounded(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return a.to(dtype).T, b.to(dtype).T

    def forward(x: Tensor) -> Tensor:
        y = base(x)
        a_t, b_t = rounded(y.dtype)
        flat = y.view(-1, y.shape[-1])
        flat.addmm_(x.to(y.dtype).view(-1, x.shape[-1]) @ a_t, b_t, alpha=scaling)
        return linear.apply_magnitude_and_bias(y)

    return forward


def prepacked(weight: Tensor, bias: Tensor | None) -> Function:
    """x W^T + b from a copy of W, (out, in), in the blocked layout of oneDNN's kernels, as in torch.compile.

    A product with few rows reads a plain W at half the memory bandwidth: a token takes twice the time
    (bench/generate.md).
    """
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    kernel: Function = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: kernel(x, blocks, bias, "none", [], "")


def choose_build(model: Decoder) -> Build | None:
    """How to make the linears of the model's twin, if there is memory for a second copy of the weights."""
    if should_prepack(model):
        return prepacked
    packed = [linear for linear in linears_of(model).values() if isinstance(linear, PackedLinear)]
    copies = sum(linear.out_features * linear.in_features for linear in packed) * model.dtype.itemsize  # bytes
    same = {linear.dtype for linear in packed} == {model.dtype}
    return plain if same and copies <= MEMORY_SHARE * available_bytes(model.device) else None


def should_prepack(model: Decoder) -> bool:
    """Whether oneDNN has kernels for all weights of the model, they are faster, and memory allows them."""
    dtype = model.dtype
    here = model.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    if not here or not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):  # they cast nothing
        return False
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    linears, c = linears_of(model).values(), model.config
    if not {type(linear) for linear in linears} <= LINEARS:  # other types store their weights elsewhere
        return False
    dtypes = {linear.weight.dtype if isinstance(linear, nn.Linear) else linear.dtype for linear in linears}
    numbers = sum(linear.out_features * linear.in_features for linear in linears) + c.vocab_size * c.hidden_size
    least = CACHED_BYTES if dtype == torch.float32 else 0  # PyTorch's own bfloat16 product uses these kernels anyway
    return dtypes == {dtype} and least < numbers * dtype.itemsize <= MEMORY_SHARE * available_host_bytes()
