"""The delta rule in chunks against the recurrence: outputs, states, gradients, in all number formats."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nanoft.attention import Documents, SequenceContext
from nanoft.blocks import recurrence
from nanoft.kernels import deltanet
from nanoft.kernels.attention import FastContext
from nanoft.runtime.device import doubling_sum


def parts(length: int, dtype: torch.dtype, strength: float = 2.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    q, k = (torch.randn(2, length, 2, 8, generator=draw) for _ in range(2))
    v = torch.randn(2, length, 4, 6, generator=draw)
    decay, beta = (torch.rand(2, length, 4, generator=draw) for _ in range(2))
    return [part.to(dtype).requires_grad_() for part in (q, k, v, -strength * decay, beta)]


def step(rule: object, inputs: list[Tensor], before: Tensor | None = None) -> list[Tensor]:
    """y, the last state, and the gradients of a loss on y."""
    y, state = rule(*inputs, before=before) if rule is recurrence.delta_rule else rule(*inputs, before)  # type: ignore
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    with torch.autocast("cpu", enabled=False):  # only forward passes are under autocast
        return [y, state, *torch.autograd.grad((y * weight).sum(), inputs)]


@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 150])
@pytest.mark.parametrize("strength", [0.0, 2.0, 200.0])  # of the decay; of the last nothing is left after a position
def test_chunks_are_the_recurrence(length: int, strength: float) -> None:
    start = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = parts(length, dtype, strength)
        for before in (None, start.to(dtype)):
            found, expected = step(deltanet.delta_rule, inputs, before), step(recurrence.delta_rule, inputs, before)
            for one, other in zip(found, expected, strict=True):
                assert (one - other).norm() <= bound * other.norm() + 1e-12


def test_it_needs_no_cumsum_where_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA with deterministic algorithms."""
    inputs = parts(150, torch.float64)
    expected = step(deltanet.delta_rule, inputs)
    monkeypatch.setattr(deltanet, "running_sum", doubling_sum)
    monkeypatch.setattr(Tensor, "cumsum", None)
    torch.testing.assert_close(step(deltanet.delta_rule, inputs), expected)


def test_in_bfloat16_the_state_is_float32_and_results_are_rounded_once() -> None:
    rounded = parts(150, torch.bfloat16)
    exact = [part.detach().double().requires_grad_() for part in rounded]
    y, state, *gradients = step(deltanet.delta_rule, rounded)
    expected_y, expected_state, *expected = step(recurrence.delta_rule, exact)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (state - expected_state).norm() < 1e-5 * expected_state.norm()
    for one, other in zip((y, *gradients), (expected_y, *expected), strict=True):
        assert (one - other).norm() < 4e-3 * other.norm()  # eps / 2, and the rounded weight of the loss


def test_autocast_does_not_round_the_state() -> None:
    inputs = parts(100, torch.float32)
    expected = step(recurrence.delta_rule, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(deltanet.delta_rule, inputs), step(recurrence.delta_rule, inputs)
    for one, other in ((one, other) for own in found for one, other in zip(own, expected, strict=True)):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_only_the_inputs_are_kept_for_backward() -> None:
    inputs, kept = parts(150, torch.bfloat16), set[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):  # type: ignore
        deltanet.delta_rule(*inputs)
    assert kept == {part.data_ptr() for part in inputs}


@pytest.mark.parametrize("lengths", [None, (1, 2, 30, 3, 4)])
@pytest.mark.parametrize("trained", [False, True])
def test_the_convolution_is_that_of_the_core(lengths: tuple[int, ...] | None, trained: bool) -> None:
    draw, bounds = torch.Generator().manual_seed(0), torch.tensor((0, *(lengths or ()))).cumsum(0).int()
    x = torch.randn(2, 20, 5, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.randn(5, 4, generator=draw, dtype=torch.float64).requires_grad_(trained)
    documents = None if lengths is None else Documents(lengths, bounds)
    found, expected = (
        context([], documents).convolve(x, weight, SimpleNamespace(index=0))
        for context in (FastContext, SequenceContext)
    )
    torch.testing.assert_close(found, expected)
    inputs = [x, weight] if trained else [x]
    for one, other in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)
