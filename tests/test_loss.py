"""The chunked loss against torch's cross entropy on full logits, and against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanoft import loss
from nanoft.loss import target_nll, token_nll

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2, 9, 8, generator=GENERATOR)
HEAD = torch.randn(11, 8, generator=GENERATOR)
ROWS = torch.tensor([0, 3, 5, 6, 7, 10, 17])
TARGETS = torch.tensor([4, 0, 10, 4, 2, 7, 1])


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sum_and_both_gradients_equal_cross_entropy(
    chunk: int, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_ROWS", chunk)
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()
    ours = target_nll(hidden, head, ROWS, TARGETS, smoothing)
    logits = hidden.flatten(0, 1)[ROWS] @ head.T
    theirs = F.cross_entropy(logits, TARGETS, reduction="sum", label_smoothing=smoothing)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    scaled = zip(
        torch.autograd.grad(ours / 3, [hidden, head]), torch.autograd.grad(theirs / 3, [hidden, head]), strict=True
    )
    for own, other in scaled:
        assert torch.allclose(own, other, atol=1e-6)


def test_token_nll_is_the_same_loss_token_by_token() -> None:
    each = token_nll(HIDDEN, HEAD, ROWS, TARGETS)
    expected = F.cross_entropy(HIDDEN.flatten(0, 1)[ROWS] @ HEAD.T, TARGETS, reduction="none")
    assert torch.allclose(each, expected, atol=1e-6)
    assert torch.allclose(each.sum(), target_nll(HIDDEN, HEAD, ROWS, TARGETS))


def test_no_target_is_a_loss_of_zero_with_a_zero_gradient() -> None:
    hidden = HIDDEN.clone().requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    total = target_nll(hidden, HEAD, none, none)
    total.backward()
    assert total.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert token_nll(HIDDEN, HEAD, none, none).shape == (0,)


def test_bfloat16_stays_near_float32() -> None:
    exact = target_nll(HIDDEN, HEAD, ROWS, TARGETS)
    rounded = target_nll(HIDDEN.bfloat16(), HEAD.bfloat16(), ROWS, TARGETS)
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, exact, rtol=0.02)


def test_frozen_head_gets_no_gradient_and_memory_for_none() -> None:
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone()
    target_nll(hidden, head, ROWS, TARGETS).backward()
    assert head.grad is None
    outside = [i for i in range(18) if i not in ROWS.tolist()]
    assert hidden.grad is not None
    assert not hidden.grad.flatten(0, 1)[outside].any()  # rows that are no targets learn nothing
