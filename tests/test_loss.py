"""The chunked loss against torch's cross entropy on full logits, and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanoft import loss
from nanoft.loss import token_nll

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2, 9, 8, generator=GENERATOR)
HEAD = torch.randn(11, 8, generator=GENERATOR)
ROWS = torch.tensor([0, 3, 5, 6, 7, 10, 17])
TARGETS = torch.tensor([4, 0, 10, 4, 2, 7, 1])


def at(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return hidden.flatten(0, 1)[rows]


def plain_nll(hidden: torch.Tensor, head: torch.Tensor, smoothing: float, z: float) -> torch.Tensor:
    """Each token's loss on all logits, (n,)."""
    logits = at(hidden, ROWS) @ head.T
    nll = F.cross_entropy(logits, TARGETS, reduction="none", label_smoothing=smoothing)
    return nll + z * logits.logsumexp(-1).square()


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z", [0.0, 0.01])
def test_losses_and_gradients_equal_cross_entropy_on_all_logits(
    chunk: int, smoothing: float, z: float, trained_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the sum, of a mean, and with another weight for each token."""
    monkeypatch.setattr(loss, "chunk_rows", lambda vocab, device: chunk)
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_(trained_head)
    wanted = [hidden, head] if trained_head else [hidden]
    ours = token_nll(at(hidden, ROWS), head, TARGETS, smoothing, z)
    theirs = plain_nll(hidden, head, smoothing, z)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    for weights in (torch.ones(7), torch.full((7,), 1 / 7), torch.tensor([0.0, -2.0, 3.0, 0.5, 1e3, 1e-3, 1.0])):
        own = torch.autograd.grad((ours * weights).sum(), wanted, retain_graph=True)
        expected = torch.autograd.grad((theirs * weights).sum(), wanted, retain_graph=True)
        for found, reference in zip(own, expected, strict=True):
            torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-6 * weights.abs().max().item())


def test_hidden_states_and_targets_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="9 hidden states for 7 targets"):
        token_nll(HIDDEN[:1], HEAD, TARGETS)


def test_no_target_is_a_loss_of_zero_with_a_zero_gradient() -> None:
    hidden = HIDDEN.clone().requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    total = token_nll(at(hidden, none), HEAD, none).sum()
    total.backward()
    assert total.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert token_nll(at(HIDDEN, none), HEAD, none).shape == (0,)


def test_bfloat16_stays_near_float32() -> None:
    exact = token_nll(at(HIDDEN, ROWS), HEAD, TARGETS)
    rounded = token_nll(at(HIDDEN, ROWS).bfloat16(), HEAD.bfloat16(), TARGETS)
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, exact, rtol=0.03, atol=0.03)


def test_frozen_head_gets_no_gradient_and_memory_for_none() -> None:
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone()
    token_nll(at(hidden, ROWS), head, TARGETS).sum().backward()
    assert head.grad is None
    outside = [i for i in range(18) if i not in ROWS.tolist()]
    assert hidden.grad is not None
    assert not hidden.grad.flatten(0, 1)[outside].any()  # rows that are no targets learn nothing


@pytest.mark.parametrize("trained_head", [False, True])
def test_gradients_are_those_of_finite_differences_in_float64(trained_head: bool) -> None:
    """gradcheck perturbs each of the n losses by itself: a weight of its own for every row."""
    hidden, head = HIDDEN.double().requires_grad_(), HEAD.double().requires_grad_(trained_head)
    assert torch.autograd.gradcheck(lambda h, w: token_nll(at(h, ROWS), w, TARGETS, 0.1, 0.01), (hidden, head))


@pytest.mark.parametrize("trained_head", [False, True])
def test_nothing_as_large_as_the_logits_is_kept_for_backward(
    trained_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "chunk_rows", lambda vocab, device: 16)
    hidden = torch.randn(256, 4, generator=GENERATOR).requires_grad_()
    head, kept = torch.randn(1000, 4, generator=GENERATOR).requires_grad_(trained_head), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        token_nll(hidden, head, torch.arange(256))
    assert max(kept) <= max(hidden.numel(), trained_head * head.numel())


def test_a_target_whose_probability_is_no_float32_any_more_has_a_finite_loss() -> None:
    hidden, head = torch.tensor([[[1.0]]]).requires_grad_(), torch.tensor([[300.0], [0.0], [-200.0]])
    total = token_nll(hidden, head, torch.tensor([2])).sum()  # exp(-500) is 0 in float32
    total.backward()
    assert total.item() == 500.0
    assert hidden.grad is not None
    assert hidden.grad.item() == 500.0


@pytest.mark.parametrize(("vocab", "device", "rows"), [(32768, "cpu", 256), (32768, "cuda", 1024), (10**6, "cpu", 16)])
def test_chunks_hold_so_many_bytes_and_never_too_few_rows(vocab: int, device: str, rows: int) -> None:
    assert loss.chunk_rows(vocab, torch.device(device)) == rows


def test_under_autocast_the_logits_have_its_dtype() -> None:
    """Full-parameter training: hidden states and head are float32, and the products bfloat16."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(size, 32, generator=generator) for size in (40, 64))
    targets = torch.randint(0, 64, (40,), generator=generator)
    logits = hidden.bfloat16() @ head.bfloat16().T
    with torch.autocast("cpu", torch.bfloat16):
        found = token_nll(hidden, head.requires_grad_(), targets)
    assert torch.allclose(found, F.cross_entropy(logits.float(), targets, reduction="none"), atol=1e-5)
    assert not torch.allclose(found, F.cross_entropy(hidden @ head.detach().T, targets, reduction="none"), atol=1e-5)


def test_under_autocast_the_gradients_are_those_of_the_plain_formula_with_products_in_its_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(size, 32, generator=generator).requires_grad_() for size in (40, 64))
    targets, seen = torch.randint(0, 64, (40,), generator=generator), set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket is torch.ops.aten.mm:
                seen.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = token_nll(hidden, head, targets), F.cross_entropy(hidden @ head.T, targets, reduction="none")
    with Products():
        found = torch.autograd.grad(ours.sum(), [hidden, head])
    assert seen == {torch.bfloat16}
    for one, reference in zip(found, torch.autograd.grad(theirs.sum(), [hidden, head]), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, reference, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("trained_head", [False, True])
def test_under_autocast_a_frozen_head_and_a_trained_one_give_the_same_gradient(trained_head: bool) -> None:
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_(trained_head)
    with torch.autocast("cpu", torch.bfloat16):
        token_nll(at(hidden, ROWS), head, TARGETS).sum().backward()
    exact = HIDDEN.clone().requires_grad_()
    token_nll(at(exact, ROWS), HEAD, TARGETS).sum().backward()
    torch.testing.assert_close(hidden.grad, exact.grad, rtol=2e-2, atol=2e-2)
