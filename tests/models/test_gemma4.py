"""Gemma 4's config.json: whose keys and values a layer attends to is what transformers says."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention

from nanoft import UserError
from nanoft.models import gemma4

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
SIZES |= {"num_key_value_heads": 1, "global_head_dim": 32, "vocab_size_per_layer_input": 64}


@pytest.mark.parametrize("shared", [0, 1, 4, 6])
def test_layers_share_keys_and_values_as_in_transformers(shared: int) -> None:
    config = Gemma4TextConfig(**SIZES, num_hidden_layers=12, num_kv_shared_layers=shared)
    with torch.device("meta"):
        layers = [Gemma4TextAttention(config, layer) for layer in range(12)]
    own = gemma4.read(config.to_dict(), 512, 256)["layers"]
    found = [layer for layer, switches in enumerate(own) if "source" in switches]
    assert found == [layer for layer, attention in enumerate(layers) if attention.is_kv_shared_layer]
    for layer in found:
        source = own[layer]["source"]
        assert layers[source].store_full_length_kv
        assert config.layer_types[source] == config.layer_types[layer]


def test_layers_without_a_source_are_refused() -> None:
    fields = Gemma4TextConfig(**SIZES, num_hidden_layers=6).to_dict() | {"num_kv_shared_layers": 6}
    with pytest.raises(UserError, match="num_kv_shared_layers: 6: no layer has keys"):
        gemma4.read(fields, 512, 256)


def test_heads_of_layers_without_a_window_are_given_by_layer_or_by_kind() -> None:
    """transformers 5.24 numbers the layers of `per_layer_config` with as many digits as the last one has."""
    config = Gemma4TextConfig(**SIZES, num_hidden_layers=12).to_dict()
    assert set(config["per_layer_config"]) == {"05", "11"}
    by_kind = {name: value for name, value in config.items() if name != "per_layer_config"} | {"global_head_dim": 32}
    found = [gemma4.read(fields, 512, 256)["layers"] for fields in (config, by_kind)]
    assert found[0] == found[1]
    assert [own.get("head_dim") for own in found[0]] == [None] * 5 + [32] + [None] * 5 + [32]
