"""Linears in groups: their gradients, and what a block keeps for backward."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanoft import kernels
from nanoft.blocks.norms import RMSNorm
from nanoft.config import LoRAConfig
from nanoft.kernels.block import grouped_linear, identity
from nanoft.lora import LoRALinear, inject_lora
from nanoft.model import MLP, Block, Decoder
from nanoft.models.families import decoder_config

SIZES = {"activation": "silu", "mlp": "gated", "mlp_bias": False}
SIZES |= {"hidden_size": 8, "intermediate_size": 8, "mlp_limit": None}


def group(kind: str, freeze: bool = False, dropout: float = 0.0) -> tuple[list[Any], Any, list[Tensor]]:
    """Linears of one input, what makes their input, and from what; float64, on a strip of tokens (2, 5)."""
    generator = torch.Generator().manual_seed(0)
    lora = LoRAConfig(rank=3, alpha=5.0, dropout=dropout, freeze_a=freeze, rank_pattern={"1": 2})
    ranks, outs = (3, 2, 0), (7, 4, 6)
    linears: list[Any] = []
    for rank, out in zip(ranks, outs, strict=True):
        linear: nn.Module = nn.Linear(8, out, bias=kind != "identity").requires_grad_(False)
        if rank:
            linear = LoRALinear(linear, LoRAConfig(**{**vars(lora), "rank": rank}), generator)  # type: ignore[arg-type]
            nn.init.normal_(linear.lora_B, generator=generator)  # type: ignore[arg-type]
        linears.append(linear.double())
    linears.insert(1, linears.pop())  # the one without an adapter in the middle
    config: Any = SimpleNamespace(**SIZES)
    parts = {"identity": identity, "norm": RMSNorm(8, 1e-6).formula, "swiglu": MLP(config).activate}
    prepare: Any = parts[kind]
    count = 2 if kind == "swiglu" else 1
    inputs = [torch.randn(2, 5, 8, dtype=torch.float64, generator=generator) for _ in range(count)]
    if kind == "norm":
        inputs.append(torch.rand(8, dtype=torch.float64, generator=generator) + 0.5)  # its weight
    return linears, prepare, [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("kind", ["identity", "norm", "swiglu"])
def test_gradients_of_a_group_are_those_of_its_outputs(kind: str, freeze: bool, dropout: float) -> None:
    linears, prepare, inputs = group(kind, freeze, dropout)
    owners = [linear for linear in linears if isinstance(linear, LoRALinear)]
    trained = [p for linear in owners for p in (linear.lora_A, linear.lora_B) if p.requires_grad]
    assert len(trained) == (2 if freeze else 4)

    def outputs(*_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # the same mask every time
        return tuple(grouped_linear(linears, prepare, *inputs))

    assert torch.autograd.gradcheck(outputs, (*inputs, *trained))  # the norm's weight is among the inputs


def test_a_group_with_a_trained_base_or_without_adapters_is_its_linears() -> None:
    linears, prepare, inputs = group("norm")
    linears[0].base.weight.requires_grad_()
    expected = [linear(prepare(*inputs)) for linear in linears]
    assert all(torch.equal(*pair) for pair in zip(grouped_linear(linears, prepare, *inputs), expected, strict=True))
    grouped_linear(linears, prepare, *inputs)[0].sum().backward()
    assert linears[0].base.weight.grad is not None
    plain = [nn.Linear(8, 3).double(), nn.Linear(8, 2).double()]
    for found, linear in zip(grouped_linear(plain, prepare, *inputs), plain, strict=True):
        assert torch.equal(found, linear(prepare(*inputs)))


@pytest.mark.parametrize(("norms", "dora", "again"), [("input", False, 0), ("both", False, 1), ("input", True, 1)])
def test_a_recomputed_block_computes_its_last_product_only_if_a_gradient_needs_it(
    norms: str, dora: bool, again: int
) -> None:
    """That of a norm of it, or of DoRA's magnitude, does; the gradients are those of a block that keeps everything."""
    config = decoder_config(
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 16}
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    )
    torch.manual_seed(0)
    model = Decoder(replace(config, norms=norms))
    inject_lora(model, LoRAConfig(rank=2, alpha=8.0, dora=dora), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        nn.init.uniform_(p, 0.5, 1)
    assert kernels.apply(model) == ""
    products: list[int] = []
    base: Any = model.get_submodule("model.layers.0.mlp.down_proj.base")
    base.register_forward_hook(lambda *_: products.append(1))
    found = {}
    for policy in ("all", "input"):
        model.activation_policy = [policy, "all"]  # type: ignore[list-item]
        products.clear()
        model(torch.tensor([[1, 2, 3, 4]])).square().sum().backward()
        found[policy] = [p.grad for p in trained]
        model.zero_grad()
        assert len(products) == (1 if policy == "all" else 1 + again)
    assert all(torch.equal(*pair) for pair in zip(*found.values(), strict=True))


@pytest.mark.parametrize("dora", [False, True])
def test_a_block_keeps_what_the_docstring_says_and_nothing_else(dora: bool) -> None:
    h, kv, m, r, n = 64, 32, 160, 4, 2 * 16  # sizes of the residual stream, of keys, of the MLP; rank; tokens
    config = decoder_config(
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": h, "intermediate_size": m}
        | {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    )
    model = Decoder(config).to(torch.bfloat16)
    inject_lora(model, LoRAConfig(rank=r, alpha=8.0, dora=dora), seed=0)
    assert kernels.apply(model) == ""
    block = model.model.layers[0]
    assert isinstance(block, Block)
    x = torch.randn(2, 16, h, dtype=torch.bfloat16, requires_grad=True)
    context = model.context(torch.arange(16)[None], x.dtype)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known |= {t.untyped_storage().data_ptr() for r in context.rotations for t in r if t is not None}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.dim() > 1:  # DoRA's c: a vector
            saved[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, context)
    residual, rotated, attended, mlp, u = 2 * h, h + 2 * kv, h, 2 * m, 7 * r
    outputs = h + 2 * kv + 2 * h if dora else 0  # of q, k, v, o and down; gate and up are there
    if dora:
        outputs += 2 * m  # before they are scaled
    floor = 2 * n * (residual + rotated + attended + mlp + u + outputs)  # bytes in bfloat16
    if torch.cpu._is_amx_tile_supported():  # PyTorch's attention keeps a float32 number for each query and head
        floor += 4 * n * 4
    assert sum(size for size, _ in saved.values()) == floor
