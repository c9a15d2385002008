"""The config.json of families with experts: the layers that have some are those of transformers' model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from nanoft import UserError
from nanoft.models import expert_families

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 4}
SIZES |= {"num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "own",
    [{}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 3, "mlp_only_layers": [2]}],
)
def test_layers_with_experts_are_those_of_transformers(own: dict[str, Any]) -> None:
    config = Qwen3MoeConfig(**SIZES, **own)
    with torch.device("meta"):
        blocks = Qwen3MoeForCausalLM(config).model.layers
    routing = expert_families.qwen3_moe(config.to_dict())["routing"]
    assert routing.layers == tuple(hasattr(block.mlp, "experts") for block in blocks)


def test_more_experts_of_a_token_than_there_are_is_refused() -> None:
    config = Qwen3MoeConfig(**SIZES).to_dict() | {"num_experts_per_tok": 5}
    with pytest.raises(UserError, match="num_experts_per_tok: 5 of 4 experts"):
        expert_families.qwen3_moe(config)
