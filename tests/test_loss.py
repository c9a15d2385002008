"""The chunked loss against torch's cross entropy on full logits, and against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanoft import loss
from nanoft.loss import target_nll, token_nll
from nanoft.training.self_test import plain_nll

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2, 9, 8, generator=GENERATOR)
HEAD = torch.randn(11, 8, generator=GENERATOR)
ROWS = torch.tensor([0, 3, 5, 6, 7, 10, 17])
TARGETS = torch.tensor([4, 0, 10, 4, 2, 7, 1])


def at(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return hidden.flatten(0, 1)[rows]


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z", [0.0, 0.01])
def test_sum_and_both_gradients_equal_cross_entropy_on_all_logits(
    chunk: int, smoothing: float, z: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "chunk_rows", lambda vocab, device: chunk)
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()
    ours = target_nll(at(hidden, ROWS), head, TARGETS, smoothing, z)
    theirs = plain_nll(at(hidden, ROWS), head, TARGETS, smoothing, z)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    scaled = zip(
        torch.autograd.grad(ours / 3, [hidden, head]), torch.autograd.grad(theirs / 3, [hidden, head]), strict=True
    )
    for own, other in scaled:
        assert torch.allclose(own, other, atol=1e-6)


def test_token_nll_is_the_same_loss_token_by_token() -> None:
    each = token_nll(at(HIDDEN, ROWS), HEAD, TARGETS)
    expected = F.cross_entropy(HIDDEN.flatten(0, 1)[ROWS] @ HEAD.T, TARGETS, reduction="none")
    assert torch.allclose(each, expected, atol=1e-6)
    assert torch.allclose(each.sum(), target_nll(at(HIDDEN, ROWS), HEAD, TARGETS))


def test_no_target_is_a_loss_of_zero_with_a_zero_gradient() -> None:
    hidden = HIDDEN.clone().requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    total = target_nll(at(hidden, none), HEAD, none)
    total.backward()
    assert total.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert token_nll(at(HIDDEN, none), HEAD, none).shape == (0,)


def test_bfloat16_stays_near_float32() -> None:
    exact = target_nll(at(HIDDEN, ROWS), HEAD, TARGETS)
    rounded = target_nll(at(HIDDEN, ROWS).bfloat16(), HEAD.bfloat16(), TARGETS)
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, exact, rtol=0.02)


def test_frozen_head_gets_no_gradient_and_memory_for_none() -> None:
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone()
    target_nll(at(hidden, ROWS), head, TARGETS).backward()
    assert head.grad is None
    outside = [i for i in range(18) if i not in ROWS.tolist()]
    assert hidden.grad is not None
    assert not hidden.grad.flatten(0, 1)[outside].any()  # rows that are no targets learn nothing


def test_gradients_are_those_of_finite_differences_in_float64() -> None:
    hidden, head = HIDDEN.double().requires_grad_(), HEAD.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: target_nll(at(h, ROWS), w, TARGETS, 0.1, 0.01), (hidden, head))


def test_a_target_whose_probability_is_no_float32_any_more_has_a_finite_loss() -> None:
    hidden, head = torch.tensor([[[1.0]]]).requires_grad_(), torch.tensor([[300.0], [0.0], [-200.0]])
    total = target_nll(hidden, head, torch.tensor([2]))  # exp(-500) is 0 in float32
    total.backward()
    assert total.item() == 500.0
    assert hidden.grad is not None
    assert hidden.grad.item() == 500.0


@pytest.mark.parametrize(("vocab", "device", "rows"), [(32768, "cpu", 128), (32768, "cuda", 1024), (10**6, "cpu", 16)])
def test_chunks_hold_so_many_bytes_and_never_too_few_rows(vocab: int, device: str, rows: int) -> None:
    assert loss.chunk_rows(vocab, torch.device(device)) == rows
