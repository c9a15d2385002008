"""What families with their own reader make of a config.json: layers, widths and sources are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig, Lfm2Config, Qwen3_5TextConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

from nanoft import UserError
from nanoft.models import other_families

LFM2 = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
MOE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 4}
MOE |= {"num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
GEMMA4 = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
GEMMA4 |= {"num_key_value_heads": 1, "global_head_dim": 32, "vocab_size_per_layer_input": 64}


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


@pytest.mark.parametrize(
    "own",
    [{}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 3, "mlp_only_layers": [2]}],
)
def test_layers_with_experts_are_those_of_transformers(own: dict[str, Any]) -> None:
    config = Qwen3MoeConfig(**MOE, **own)
    with torch.device("meta"):
        blocks = Qwen3MoeForCausalLM(config).model.layers
    routing = other_families.qwen3_moe(config.to_dict())["routing"]
    assert routing.layers == tuple(hasattr(block.mlp, "experts") for block in blocks)


def test_more_experts_of_a_token_than_there_are_is_refused() -> None:
    config = Qwen3MoeConfig(**MOE).to_dict() | {"num_experts_per_tok": 5}
    with pytest.raises(UserError, match="num_experts_per_tok: 5 of 4 experts"):
        other_families.qwen3_moe(config)


@pytest.mark.parametrize("shared", [0, 1, 4, 6])
def test_layers_share_keys_and_values_as_in_transformers(shared: int) -> None:
    config = Gemma4TextConfig(**GEMMA4, num_hidden_layers=12, num_kv_shared_layers=shared)
    with torch.device("meta"):
        layers = [Gemma4TextAttention(config, layer) for layer in range(12)]
    own = other_families.gemma4(config.to_dict(), 512, 256)["layers"]
    found = [layer for layer, switches in enumerate(own) if "source" in switches]
    assert found == [layer for layer, attention in enumerate(layers) if attention.is_kv_shared_layer]
    for layer in found:
        source = own[layer]["source"]
        assert layers[source].store_full_length_kv
        assert config.layer_types[source] == config.layer_types[layer]


def test_layers_without_a_source_are_refused() -> None:
    fields = Gemma4TextConfig(**GEMMA4, num_hidden_layers=6).to_dict() | {"num_kv_shared_layers": 6}
    with pytest.raises(UserError, match="num_kv_shared_layers: 6: no layer has keys"):
        other_families.gemma4(fields, 512, 256)


def test_heads_of_layers_without_a_window_are_given_by_layer_or_by_kind() -> None:
    """transformers 5.24 numbers the layers of `per_layer_config` with as many digits as the last one has."""
    config = Gemma4TextConfig(**GEMMA4, num_hidden_layers=12).to_dict()
    assert set(config["per_layer_config"]) == {"05", "11"}
    by_kind = {name: value for name, value in config.items() if name != "per_layer_config"} | {"global_head_dim": 32}
    found = [other_families.gemma4(fields, 512, 256)["layers"] for fields in (config, by_kind)]
    assert found[0] == found[1]
    assert [own.get("head_dim") for own in found[0]] == [None] * 5 + [32] + [None] * 5 + [32]
