"""The gated delta rule and the short convolution against other implementations, and where they start anew."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from nanoft.attention import CacheContext, Documents, SequenceContext
from nanoft.blocks.recurrence import convolution, delta_rule
from nanoft.kernels.attention import FastContext

LAYER = SimpleNamespace(index=0)
LENGTHS = (1, 2, 70, 1, 3, 63)  # one position, shorter than the kernel of 4, longer than a chunk of 64


def parts(batch: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, decay and beta of two key heads and four value heads."""
    draw = torch.Generator().manual_seed(length)
    q, k = (torch.randn(batch, length, 2, 8, generator=draw) for _ in range(2))
    v = torch.randn(batch, length, 4, 6, generator=draw)
    decay, beta = (torch.rand(batch, length, 4, generator=draw) for _ in range(2))
    return [part.to(dtype) for part in (q, k, v, -2 * decay, beta)]


def documents(lengths: tuple[int, ...]) -> Documents:
    return Documents(lengths, torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).int())


def test_the_delta_rule_is_that_of_transformers() -> None:
    q, k, v, decay, beta = parts(2, 20)
    y, state = delta_rule(q, k, v, decay, beta)
    own = {"g": decay, "beta": beta, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected, last = torch_recurrent_gated_delta_rule(q, k, v, **own)
    torch.testing.assert_close((y, state), (expected, last), rtol=1e-4, atol=1e-5)


def test_a_written_value_is_read_with_its_key() -> None:
    """With beta 1 and no decay, keys at right angles are a table: the last value of each key is read, others stay."""
    keys, v = torch.eye(8)[[0, 3, 5, 3]][None, :, None], torch.randn(1, 4, 1, 6)
    zero, one = torch.zeros(1, 4, 1), torch.ones(1, 4, 1)
    _, state = delta_rule(keys, keys, v, zero, one)
    expected = torch.zeros(8, 6)
    expected[[0, 5, 3]] = v[0, [0, 2, 3], 0]
    torch.testing.assert_close(state[0, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 20])
def test_the_convolution_is_that_of_torch(length: int) -> None:
    x, weight = torch.randn(2, length, 5), torch.randn(5, 4)
    expected = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], groups=5).mT
    y, left = convolution(x, weight)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(left, F.pad(x, (0, 0, 3, 0))[:, -3:])


@pytest.mark.parametrize("context_class", [SequenceContext, FastContext])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_documents_start_anew(context_class: type[SequenceContext], dtype: torch.dtype) -> None:
    """Two rows of 70, laid end to end; in each document the outputs are those of the document alone."""
    packed, bound = context_class([], documents(LENGTHS)), 1e-5 if dtype == torch.float32 else 0.01  # of the norm
    torch.manual_seed(0)
    whole, x, weight = parts(2, 70, dtype), torch.randn(2, 70, 5).to(dtype), torch.randn(5, 4).to(dtype)
    scanned = packed.scan(*whole, LAYER).flatten(0, 1).split(LENGTHS)
    convolved = packed.convolve(x, weight, LAYER).flatten(0, 1).split(LENGTHS)
    pieces = zip(*(part.flatten(0, 1).split(LENGTHS) for part in (*whole, x)), strict=True)
    for y, filtered, piece in zip(scanned, convolved, pieces, strict=True):
        *own, x = (part[None] for part in piece)
        for found, expected in ((y, delta_rule(*own)[0][0]), (filtered, convolution(x, weight)[0][0])):
            assert (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("context_class", [SequenceContext, FastContext])
def test_no_gradient_crosses_the_border_of_documents(context_class: type[SequenceContext]) -> None:
    packed, x = context_class([], documents((30, 40))), torch.randn(1, 70, 5).requires_grad_()
    inputs = [part.requires_grad_() for part in parts(1, 70)]
    loss = packed.scan(*inputs, LAYER)[:, 30:].sum() + packed.convolve(x, torch.randn(5, 4), LAYER)[:, 30:].sum()
    for gradient in torch.autograd.grad(loss, [*inputs, x]):
        assert torch.equal(gradient[:, :30], torch.zeros_like(gradient[:, :30]))
        assert gradient[:, 30:].any()


def test_steps_with_a_state_are_the_whole_sequence() -> None:
    whole, x, weight = parts(2, 9), torch.randn(2, 9, 5), torch.randn(5, 4)
    expected, convolved = delta_rule(*whole)[0], convolution(x, weight)[0]
    kept: dict[tuple[int, str], Tensor] = {}
    for t in range(9):
        step = CacheContext(([], torch.ones(2, 9, dtype=torch.bool)), {}, {}, t, 0, kept)
        now = slice(t, t + 1)
        y = step.scan(*(part[:, now] for part in whole), LAYER)
        torch.testing.assert_close(y, expected[:, now], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(step.convolve(x[:, now], weight, LAYER), convolved[:, now])
