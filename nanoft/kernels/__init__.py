"""Optimized implementations of the core's equations: removing any of them affects speed and memory, not results.

`apply` installs them at three seams: the class of a block (`FastBlock`: the same modules, linears computed in groups),
the context of a forward pass (`FastContext`: attention without masks), and the twin of a block for generation
(decode.py). A module whose exact type a kernel does not know uses the reference. Edits of the core would be ignored
silently, so `apply` first compares the two on a toy model, and uses the reference if they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanoft.attention import Documents
from nanoft.blocks import per_layer
from nanoft.blocks.deltanet import DeltaNetSizes
from nanoft.blocks.moe import Experts
from nanoft.blocks.norms import RMSNorm
from nanoft.config import LoRAConfig
from nanoft.kernels import attention, experts, fused
from nanoft.kernels.attention import FastContext
from nanoft.kernels.block import FastBlock, supports
from nanoft.kernels.decode import FastCacheContext, twin
from nanoft.lora import inject_lora, linears_of, matches_target
from nanoft.model import Decoder, DecoderConfig

# The toy batch: two sequences of six tokens, as two documents or packed with three.
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]])
DOCUMENTS = Documents((4, 2, 6), torch.tensor([0, 4, 6, 12], dtype=torch.int32))
# Not compiled: their lengths keep changing, with little to fuse. No decorators, which import the compiler: two seconds.
UNCOMPILED: list[tuple[Any, str]] = [
    (attention, "attend"), (FastContext, "scan"), (FastContext, "convolve"), (Experts, "forward"),
]  # fmt: skip


def apply(model: Decoder, lora: LoRAConfig | None = None) -> str:
    """Use the kernels for every block that they support; call it before compiling and sharding.

    Adapters, with settings `lora`, and quantized weights must be in place. Returns a warning if the kernels differ from
    the core, so that the reference path is used, or if those for this device do not work; otherwise "".
    """
    warning = fused.enable(model.device)
    if difference := verify(model.config, lora):
        return f"system.kernels: the kernels differ from the core ({difference}): the reference path is used"
    _install(model)
    return warning


def compile_blocks(model: Decoder) -> None:
    """Fuse the operations between matrix products, block by block; backward recomputes elementwise results.

    With a full memory budget the compiler keeps them: 145 KiB per token and layer of Mistral-7B instead of 93.
    """
    for owner, name in UNCOMPILED:
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))
    torch._functorch.config.activation_memory_budget = 0.8
    torch._dynamo.config.recompile_limit = max(8, len(model.model.layers))  # what a block reads may differ (Gemma 4)
    for block in model.model.layers:
        block.compile()


def _install(model: Decoder) -> None:
    for block in model.model.layers:
        if supports(block):
            block.__class__ = FastBlock
        experts.install(block)
    for module in model.modules():
        if type(module) is RMSNorm:
            module.__class__ = fused.FastRMSNorm
    model.context_class = FastContext


def is_applied(model: Decoder) -> bool:
    return issubclass(model.context_class, FastContext)


def describe(model: Decoder) -> str:
    """The number of fast blocks, for the log."""
    fast = sum(isinstance(block, FastBlock) for block in model.model.layers)
    by = " by Triton" if fused.kernels(model.head) else ""
    return f"{fast} of {len(model.model.layers)} blocks fast{by}" if is_applied(model) else "reference path"


def describe_attention(model: Decoder, dtype: torch.dtype, length: int, packed: bool) -> str:
    """The implementation of attention for sequences of this length on this device, for each kind of layer."""
    c = model.config
    if not is_applied(model):
        return f"PyTorch's kernel for {model.device.type} with a mask over all pairs"
    mixers: list[Any] = [block.mixer for block in model.model.layers if hasattr(block.mixer, "scores")]
    kinds = dict.fromkeys((mixer.head_dim, attention.within(mixer.scores, length)) for mixer in mixers)
    heads = partial(torch.empty, 1, length, c.num_heads, dtype=dtype, device=model.device)
    return "; ".join(dict.fromkeys(attention.describe(heads(size), scores, packed) for size, scores in kinds))


def verify(config: DecoderConfig, lora: LoRAConfig | None) -> str:
    """The first difference between core and kernels in a step of a float64 toy model; "" if there is none.

    It covers neither dropout nor quantized weights, nor kernels of another device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # no other device's
        model = _toy(config, lora)
        expected = _step(model)
        _install(model)
        found = _step(model) | {"answers": _answer(model)}
        expected["answers"] = expected["hidden states"]
    # one gradient is zero up to rounding: that of the bias of keys that are not rotated
    bounds = {name: 1e-7 * tensor.norm() + 1e-12 for name, tensor in expected.items()}
    return next((name for name in found if not (found[name] - expected[name]).norm() <= bounds[name]), "")


def _toy(config: DecoderConfig, lora: LoRAConfig | None) -> Decoder:
    """A model of two layers with the same switches, with every trained parameter away from its initial value."""
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2}
    sizes |= {"num_heads": 4, "num_kv_heads": 4 if config.qkv == "interleaved" else 2, "head_dim": 8}
    # the first layer and one that differs from it in what mixes positions, or the last
    other = next((i for i, mixer in enumerate(config.mixers) if mixer != config.mixers[0]), -1)
    times = 1 + any("source" in own for own in config.layers)
    sizes |= {"num_layers": 2 * times, "per_layer_size": config.per_layer_size and 8}
    of_layers = {name: value for name, value in vars(config).items() if value and type(value) is tuple}
    sizes |= {name: (value[0], value[other]) * times for name, value in of_layers.items()}
    sizes["layers"] = tuple(_toy_layer(own, number) for number, own in enumerate(sizes.get("layers", ())))
    sizes["delta"] = config.delta and DeltaNetSizes(2, 4, 4, 6)
    if routing := config.routing:
        layers = routing.layers[0], routing.layers[other]
        sizes["routing"] = replace(routing, layers=layers, experts=4, chosen=min(routing.chosen, 2), width=8)
    sizes["windows"] = tuple(window and 3 for window in sizes["windows"])
    sizes["ropes"] = tuple(
        rope and replace(rope, kind="default", context=3, head_dim=rope.head_dim and 12) for rope in sizes["ropes"]
    )
    model = Decoder(replace(config, **sizes))
    _perturb(model)
    if lora is not None:
        targets = tuple(t for t in lora.target_modules if any(matches_target(name, t) for name in linears_of(model)))
        own: dict[str, Any] = {"rank": 2, "alpha": 3.0, "dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}
        own |= {"bias": "none" if lora.bias == "none" else "lora_only", "target_modules": targets or ("all-linear",)}
        own |= {"modules_to_save": (), "trainable_token_indices": {}}
        inject_lora(model, replace(lora, **own), seed=0)
        _perturb(model)
    return model.double()


def _toy_layer(own: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The switches of a layer with small sizes; the third and fourth layer share the keys of the first two, if any."""
    small = {"head_dim": 12, "num_kv_heads": 1, "intermediate_size": 40, "source": number - 2}
    return {name: small.get(name, value) for name, value in own.items() if name != "source" or number > 1}


@torch.no_grad()
def _perturb(model: Decoder) -> None:
    """Move every trained parameter away from its initial value, because zeros and ones hide mistakes."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def _step(model: Decoder) -> dict[str, Tensor]:
    """Hidden states of two sequences and of packed documents, and the gradients of a step on both, by parameter."""
    with torch.enable_grad():
        hidden = model(IDS)
        packed = model(IDS, POSITIONS, DOCUMENTS, target_positions=torch.tensor([1, 2, 6, 9]))
        loss = hidden.square().sum() + packed.sin().sum()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    named = {f"gradient of {name}": gradient for name, gradient in zip(trained, gradients, strict=True)}
    return {"hidden states": hidden.detach(), "packed": packed.detach(), **named}


@torch.no_grad()
def _answer(model: Decoder) -> Tensor:
    """The hidden states of the two sequences once more, token by token, as in generation."""
    blocks, (batch, length) = [twin(block, None) for block in model.model.layers], IDS.shape
    rotations = model.rotations(torch.arange(length).expand(batch, -1), torch.float64, torch.full((batch, 1), length))
    tables = FastCacheContext.tables(rotations, torch.ones(batch, length, dtype=torch.bool))
    caches = [(batch, one.num_kv_heads, length, one.head_dim) for one in model.config.by_layer]
    keys, values = (dict(enumerate(torch.zeros(size, dtype=torch.float64) for size in caches)) for _ in range(2))
    hidden, kept = [], dict[tuple[int, str], Tensor]()
    for slot in range(length):
        x = model.embed(IDS[:, slot : slot + 1], torch.tensor([[slot]]))
        context = FastCacheContext(tables, keys, values, slot, 0, kept)
        context.tensors |= per_layer.embeddings(model.model, IDS[:, slot : slot + 1], x)
        for block in blocks:
            x = block(x, context)
        hidden.append(model.finish(x))
    return torch.cat(hidden, dim=1)
