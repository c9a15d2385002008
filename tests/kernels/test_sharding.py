"""Sharding with one process changes nothing; with several: tests/runtime/test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nanoft.kernels import sharding


@pytest.mark.parametrize(("limit", "expected"), [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_clipping_returns_the_norm_before(limit: float, expected: float) -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert sharding.clip_grad_norm([p], limit) == 5.0
    assert p.grad.norm().item() == pytest.approx(expected, rel=1e-5)


def test_one_process_has_whole_tensors() -> None:
    tensors = {"w": torch.ones(3)}
    assert sharding.gather_full(tensors) is tensors
    assert sharding.distribute_like(tensors, {}) is tensors
    assert sharding.full_tensor(tensors["w"]) is tensors["w"]
