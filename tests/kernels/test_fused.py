"""Where Triton's kernels are not used; what they compute is in triton_formulas.py."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from runs import Patch

from nanoft.blocks.norms import RMSNorm
from nanoft.kernels import fused


def test_on_a_cpu_formulas_are_used_unless_kernels_are_interpreted(monkeypatch: Patch) -> None:
    monkeypatch.setattr(fused, "_kernels", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert fused.enable(torch.device("cpu")) == ""
    norm, x = RMSNorm(4, 1e-5), torch.ones(1, 4)
    assert fused.kernels(x) is None
    formula, *inputs = fused.normed(norm, x)
    assert formula == norm.formula
    assert inputs[0] is x
    assert inputs[1] is norm.weight


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_gradient_of_a_frozen_norm_on_a_cpu(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(48, 1e-3, offset).double().requires_grad_(False)
    norm.weight.copy_(torch.randn(48, generator=generator))
    x, dy = (torch.randn(2, 5, 48, dtype=torch.float64, generator=generator) for _ in range(2))
    fast, *inputs = fused.normed(norm, x.requires_grad_())
    assert fast is not norm.formula
    assert torch.allclose(fast(*inputs), norm(x), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: fast(x, norm.weight), x)
    exact, half = torch.autograd.grad(norm(x), x, dy)[0], norm.bfloat16()
    rounded = [part.detach().bfloat16() for part in (x, dy)]

    def error(function: Any) -> float:
        of = rounded[0].clone().requires_grad_()
        return (torch.autograd.grad(function(of, half.weight), of, rounded[1])[0] - exact).abs().max().item()

    fast, *_ = fused.normed(half, rounded[0])
    assert error(fast) <= 1.01 * error(half.formula) < 0.2


def test_without_triton_nothing_is_said(monkeypatch: Patch) -> None:
    monkeypatch.setattr(fused, "_kernels", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fused.enable(torch.device("cuda")) == ""
    assert not fused._kernels
