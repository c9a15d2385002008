"""Activation policies: which blocks recompute, and that the gradients are the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanoft.models.weights import load_model
from nanoft.recompute import keep_by_policy
from tiny_models import make_reference

CPU = torch.device("cpu")


def test_policies_name_the_blocks_that_recompute() -> None:
    assert keep_by_policy("none", 2, 3) == ["all"] * 3
    assert keep_by_policy("every_k", 2, 5) == ["all", "input", "all", "input", "all"]
    assert keep_by_policy("every_k", 4, 4) == ["input", "all", "all", "all"]
    assert keep_by_policy("full", 2, 3) == ["input", "input", "all"]  # after the last block, its backward comes first
    assert keep_by_policy("offload", 2, 3) == ["offloaded", "offloaded", "all"]


@pytest.mark.parametrize("keep", ["input", "offloaded"])
def test_recomputed_activations_give_the_same_gradients(keep: Any, tmp_path: Path) -> None:
    make_reference("qwen3", tmp_path)
    ids = torch.randint(0, 199, (2, 20), generator=torch.Generator().manual_seed(1))

    def gradients(kept: list[Any], frozen: bool) -> dict[str, torch.Tensor]:
        model = load_model(tmp_path, CPU, torch.float32)
        model.model.embed_tokens.requires_grad_(not frozen)
        model.activation_policy = kept
        model(ids).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    for frozen in (False, True):
        plain, again = gradients(["all"] * 3, frozen), gradients(["all", keep, keep], frozen)
        assert plain.keys() == again.keys() == gradients([keep] * 3, frozen).keys()
        assert all(torch.equal(plain[name], again[name]) for name in plain)
