"""Attention against a plain softmax over all pairs, its gradients, and a cache against a whole pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plain_attention import places, plainly, tensors, who_sees_whom

from nanoft.attention import CacheContext, Documents, Rotation, Scores, SequenceContext, rotate


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("packed", [None, (5, 6, 1, 10), (11, 3, 8)])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_output_and_gradients_are_those_of_the_plain_formula(
    window: int | None, packed: tuple[int, ...] | None, cap: float | None
) -> None:
    parts = tensors((2, 11), torch.float64)
    documents = Documents(packed, torch.tensor((0, *packed), dtype=torch.int32).cumsum(0)) if packed else None
    expected = plainly(*parts, who_sees_whom(*places(packed or (11, 11), 2, 11), window), cap)
    y = SequenceContext([], documents).attend(
        *parts, SimpleNamespace(index=0, source=0, scores=Scores(8**-0.5, window, cap), sinks=None)
    )
    assert torch.allclose(y, expected, atol=1e-12)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, parts, towards)
    for own, other in zip(torch.autograd.grad(y, parts, towards), wanted, strict=True):
        assert torch.allclose(own, other, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("cap", [None, 0.5])
@torch.no_grad()
def test_steps_with_a_cache_are_a_pass_over_everything(window: int | None, cap: float | None) -> None:
    q, k, v = tensors((2, 9), torch.float64)
    layer, empty = (
        SimpleNamespace(index=0, source=0, scores=Scores(8**-0.5, window, cap), sinks=None),
        2,
    )  # slots before the second sequence
    whole = SequenceContext([]).attend(q, k, v, layer)
    short = SequenceContext([]).attend(q[1:, empty:], k[1:, empty:], v[1:, empty:], layer)
    keys, values = torch.zeros(2, 2, 9, 8).double(), torch.zeros(2, 2, 9, 8).double()
    angles = torch.zeros(2, 9, 1, 4).double()
    filled = torch.arange(9) >= torch.tensor([[0], [empty]])
    tables = CacheContext.tables([Rotation(angles.cos(), angles.sin())], filled)
    for slot in range(9):
        context = CacheContext(tables, [keys], [values], slot, empty)
        y = context.attend(*(part[:, slot : slot + 1] for part in (q, k, v)), layer)
        assert torch.allclose(y[0, 0], whole[0, slot])
        if slot >= empty:
            assert torch.allclose(y[1, 0], short[0, slot - empty])


def test_rotation_is_the_formula_and_its_gradient_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=generator).requires_grad_()
    angle = torch.randn(1, 5, 1, 4, dtype=torch.float64, generator=generator)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    y = rotate(x, angle.cos(), angle.sin())
    assert torch.allclose(y, torch.cat((pairs.real, pairs.imag), dim=-1))
    assert torch.autograd.gradcheck(lambda t: rotate(t, angle.cos(), angle.sin()), (x,))
