"""Weights that are dequantized once: when, and with the same products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nanoft.models.weights import cache_weights, choose_dequantize
from nanoft.nf4 import Linear4bit, Linear8bit, matmul, matmul_backward, packed_bytes


def weight(rows: int = 96, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def small_model() -> nn.Sequential:
    first = Linear4bit(weight(), None, "nf4", True, torch.bfloat16)
    second = Linear8bit(weight(64, 96), torch.arange(64.0), torch.bfloat16)
    return nn.Sequential(first, nn.SiLU(), nn.Sequential(second), nn.Linear(64, 4, dtype=torch.bfloat16))


@torch.no_grad()
def test_cached_weights_are_frozen_linears_with_the_same_products() -> None:
    model, x = small_model(), torch.randn(5, 128).bfloat16()
    hidden, head, bias = model[:2](x), model[3], model[2][0].bias
    products = [matmul(model[0], x), matmul(model[2][0], hidden), matmul_backward(model[0], hidden)]
    assert cache_weights(model, "auto") == cache_weights(model, "per_use") == "per_use"  # on a CPU
    assert isinstance(model[0], Linear4bit)
    assert cache_weights(model, "cached") == "cached"
    first, second = model[0], model[2][0]
    assert type(first) is type(second) is nn.Linear
    found = [matmul(first, x), matmul(second, hidden), matmul_backward(first, hidden)]
    assert all(torch.equal(own, other) for own, other in zip(found, products, strict=True))
    assert (first.bias, second.bias) == (None, bias)
    assert model[3] is head
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in (first.weight, second.weight, bias))
    assert packed_bytes(first) == 2 * 96 * 128
    assert cache_weights(model, "cached") == "per_use"  # nothing is packed any more


@pytest.mark.parametrize(
    ("policy", "device_type", "extra", "free", "chosen"),
    [
        ("auto", "cuda", 10, 30, "cached"),
        ("auto", "cuda", 10, 29, "per_use"),
        ("auto", "cpu", 10, 1000, "per_use"),
        ("auto", "mps", 10, 1000, "per_use"),
        ("cached", "cpu", 10, 0, "cached"),
        ("cached", "cuda", 10, 0, "cached"),
        ("per_use", "cuda", 0, 1000, "per_use"),
    ],
)
def test_when_weights_are_cached(policy: str, device_type: str, extra: int, free: int, chosen: str) -> None:
    assert choose_dequantize(policy, device_type, extra, free) == chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_decides_on_cuda() -> None:
    model = small_model().cuda()
    assert cache_weights(model, "auto") == "cached"  # a few kilobytes
    assert isinstance(model[0], nn.Linear)
