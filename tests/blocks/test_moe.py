"""Experts against the sum that defines them, one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nanoft.attention import Scores, attention, causal_mask
from nanoft.blocks.moe import Balance, Experts, Routing
from nanoft.kernels import attention as fast_attention
from nanoft.kernels import experts as fast
from nanoft.model import MLP, DecoderConfig

SIZES: dict[str, Any] = dict.fromkeys(("vocab_size", "num_layers", "num_heads", "num_kv_heads"), 1)
SIZES |= {"hidden_size": 8, "intermediate_size": 6, "head_dim": 2, "norm_eps": 1e-6, "family": "", "tied": True}


def layer(over_chosen: bool, chosen: int = 2, **switches: Any) -> Experts:
    config = DecoderConfig(**SIZES, ropes=(None,), windows=(None,), **switches)
    torch.manual_seed(0)
    routing, bias = Routing((True,), 5, chosen, 6, over_chosen), config.mlp_bias
    return Experts(routing, 8, [MLP(config, 6) for _ in range(5)], bias).double()


def by_definition(experts: Experts, x: Tensor) -> Tensor:
    rows = []
    for token in x:
        logits = experts.router.weight @ token + (0 if experts.router.bias is None else experts.router.bias)
        chosen = sorted(range(5), key=lambda e: -logits[e].item())[: experts.chosen]
        total = sum(logits[e].exp() for e in (chosen if experts.over_chosen else range(5)))
        rows.append(sum(logits[e].exp() / total * experts.experts[e](token) for e in chosen))
    return torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("over_chosen", [True, False])
@pytest.mark.parametrize("switches", [{}, {"mlp": "interleaved", "mlp_limit": 0.3, "mlp_bias": True}], ids=str)
def test_output_and_gradients_are_those_of_the_definition(over_chosen: bool, switches: dict[str, Any]) -> None:
    experts = layer(over_chosen, **switches)
    inputs = [torch.randn(7, 8, dtype=torch.double, requires_grad=True)] * 2
    found, wanted = experts(inputs[0].view(1, 7, 8))[0], by_definition(experts, inputs[1])
    torch.testing.assert_close(found, wanted)
    every = [inputs[0], *experts.parameters()]
    gradients = (torch.autograd.grad(y.sin().sum(), every, materialize_grads=True) for y in (found, wanted))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)


def test_a_limited_gate_is_that_of_gpt_oss() -> None:
    mlp = layer(True, mlp="interleaved", mlp_limit=0.3).experts[0]
    x = torch.randn(4, 12, dtype=torch.double)
    gate, up = x[:, ::2].clamp(max=0.3), x[:, 1::2].clamp(-0.3, 0.3)
    torch.testing.assert_close(mlp.activate(x), (up + 1) * gate / (1 + (-1.702 * gate).exp()))


@pytest.mark.parametrize("count", [1, 3, 40])
def test_rows_up_to_a_multiple_change_nothing(count: int) -> None:
    x = torch.randn(1, count, 8)
    plain, padded = layer(False).bfloat16(), layer(False).bfloat16()
    block: Any = torch.nn.Module()
    block.mlp = padded
    fast.install(block)
    assert type(padded) is fast.FastExperts
    token, place, counts = padded.rows_by_expert(torch.tensor([[0, 2]] * count), torch.bfloat16)
    assert counts == [32 * (-(-count // 32)), 0, 32 * (-(-count // 32)), 0, 0]
    assert token[place].tolist() == [n // 2 for n in range(2 * count)]
    torch.testing.assert_close(padded(x.bfloat16()), plain(x.bfloat16()), rtol=2e-2, atol=2e-3)


def test_an_expert_without_tokens_has_a_gradient_in_training_and_no_work_otherwise() -> None:
    experts, seen = layer(True), list[int]()
    for number, expert in enumerate(experts.experts):
        expert.register_forward_hook(lambda *_, number=number: seen.append(number))
    x = torch.randn(1, 1, 8, dtype=torch.double)
    experts(x).sum().backward()
    assert seen == [0, 1, 2, 3, 4]
    assert all(p.grad is not None for p in experts.experts.parameters())
    seen.clear()
    experts.eval()(x)
    assert len(seen) == 2
    assert experts(x[:, :0]).shape == (1, 0, 8)


def test_a_router_in_16_bits_computes_in_float32() -> None:
    experts, x = layer(True).bfloat16(), torch.randn(9, 8).bfloat16()
    exact = x.double() @ experts.router.weight.double().T
    weights, chosen = experts.route(x)
    assert weights.dtype == torch.float32
    assert torch.equal(chosen, exact.topk(2).indices)
    torch.testing.assert_close(weights.double(), exact.topk(2).values.softmax(-1), rtol=1e-5, atol=1e-6)


def test_the_balance_loss_is_1_for_equal_shares_and_largest_if_always_the_same_are_chosen() -> None:
    balance = Balance([6, 3, 0], [layer(True)], torch.device("cpu"))
    logits = torch.zeros(9, 4)
    logits[6:, :2] = 50.0
    chosen = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3], [0, 3], [1, 2], *[[0, 1]] * 3])
    balance.add(logits, chosen)
    torch.testing.assert_close(balance.losses, torch.tensor([1.0, 4 / 2, 0.0]))


def test_the_gradient_of_the_balance_loss_is_that_of_its_definition() -> None:
    logits, given = torch.randn(9, 5, dtype=torch.double, requires_grad=True), torch.tensor([0.3, -2.0])
    chosen, wanted, start = logits.topk(2).indices, torch.zeros(()), 0
    balance = Balance([4, 5], [layer(True)] * 3, torch.device("cpu"))
    balance.gradient = given
    passed = logits * 1.0
    balance.add(passed, chosen)
    (found,) = torch.autograd.grad(passed.sum(), logits)
    for weight, tokens in zip(given, (4, 5), strict=True):
        own, picked = logits[start : start + tokens].softmax(-1), chosen[start : start + tokens]
        shares = [5 / (2 * tokens) * (picked == i).sum() for i in range(5)]
        wanted = wanted + weight / 3 * sum(share * own[:, i].mean() for i, share in enumerate(shares))
        start += tokens
    torch.testing.assert_close(found - 1, torch.autograd.grad(wanted, logits)[0])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("length", [6, 300])
def test_sinks_take_a_share_of_the_weights(window: int | None, length: int) -> None:
    """As a key of its own for each head, with a value of zero; and in chunks, with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8), (4,))
    inputs = [torch.randn(s, generator=generator, dtype=torch.double).requires_grad_() for s in shapes]
    q, k, v, sinks = inputs
    scores, mask = Scores(0.3, window, None, True), causal_mask(2, length, torch.device("cpu"), window)
    keys, values = (part.repeat_interleave(2, dim=2) for part in (k, v))
    s = (0.3 * torch.einsum("bqhd,bkhd->bhqk", q, keys)).masked_fill(~mask, -torch.inf).exp()
    p = s / (s.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    wanted = torch.einsum("bhqk,bkhd->bqhd", p, values)
    gradients = torch.autograd.grad(wanted.sin().sum(), inputs)
    plain = attention(q, k, v, mask, scores, sinks)
    chunked = fast_attention.attend(q, k, v, scores, None, sinks)
    for found in (plain, chunked):
        torch.testing.assert_close(found, wanted)
        for own, other in zip(torch.autograd.grad(found.sin().sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(own, other)
