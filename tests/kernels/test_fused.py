"""Where Triton's kernels are not used; what they compute is in triton_formulas.py."""

from __future__ import annotations

import importlib.util

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


def test_without_triton_nothing_is_said(monkeypatch: Patch) -> None:
    monkeypatch.setattr(fused, "_kernels", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fused.enable(torch.device("cuda")) == ""
    assert not fused._kernels
