"""A gated DeltaNet layer against that of transformers, with the same weights."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from nanoft.attention import SequenceContext
from nanoft.blocks.deltanet import DeltaNetSizes, GatedDeltaNet

SIZES = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6}


def test_output_and_gradients_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    theirs = Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(hidden_size=32, **SIZES), 0)
    config = SimpleNamespace(hidden_size=32, delta=DeltaNetSizes(2, 4, 8, 6), conv_kernel=4, norm_eps=1e-6)
    ours = GatedDeltaNet(config, 0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 20, 32)
    found, expected = ours(x, SequenceContext([])), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    g = torch.randn(found.shape)
    gradients = [
        dict(zip(names, torch.autograd.grad(y, list(parameters), g), strict=True))
        for y, (names, parameters) in (
            (found, zip(*ours.named_parameters(), strict=True)),
            (expected, zip(*theirs.named_parameters(), strict=True)),
        )
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
