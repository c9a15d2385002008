"""The config.json of Qwen3.5 and LFM2: the layers and widths are those that transformers makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Lfm2Config, Qwen3_5TextConfig
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

from nanoft.models import other_families

LFM2 = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"block_auto_adjust_ff_dim": False},
        {"block_multiple_of": 32},
        {"block_ffn_dim_multiplier": 1.3},
        {"block_ffn_dim_multiplier": 0.4, "block_multiple_of": 7},
    ],
)
def test_the_width_of_an_mlp_of_lfm2(own: dict[str, Any]) -> None:
    config = Lfm2Config(**LFM2, intermediate_size=1000, **own)
    with torch.device("meta"):
        mlp = Lfm2MLP(config)
    assert other_families.lfm2(config.to_dict() | own)["intermediate_size"] == mlp.w1.out_features


@pytest.mark.parametrize("interval", [2, 4, 7])
def test_every_nth_layer_of_qwen3_5_has_attention(interval: int) -> None:
    config = Qwen3_5TextConfig(num_hidden_layers=9, full_attention_interval=interval)
    fields = config.to_dict() | {"layer_types": None, "full_attention_interval": interval}
    attends = [kind == "full_attention" for kind in config.layer_types]
    assert [mixer == "attention" for mixer in other_families.qwen3_5(fields)["mixers"]] == attends
