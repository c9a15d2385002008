"""Per-layer embeddings against those of transformers' Gemma 4, with the same weights."""

from __future__ import annotations

import torch
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

from nanoft.blocks import per_layer
from nanoft.model import Decoder
from nanoft.models.families import decoder_config

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
SIZES |= {"num_key_value_heads": 1, "global_head_dim": 32, "vocab_size_per_layer_input": 64, "num_hidden_layers": 6}


def test_what_each_layer_reads_of_a_token_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    config = Gemma4TextConfig(**SIZES, hidden_size_per_layer_input=8)
    theirs = Gemma4TextModel(config).eval()
    fields = {**config.to_dict(), "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text"}
    trunk = Decoder(decoder_config(fields)).model
    names = ("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")
    for name in names:
        trunk.get_submodule(name).load_state_dict(theirs.get_submodule(name).state_dict(), strict=False)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    x = theirs.embed_tokens(ids)
    expected = theirs.project_per_layer_inputs(x, theirs.get_per_layer_inputs(ids, None))  # (b, q, layers, e)
    found = per_layer.embeddings(trunk, ids, x)
    assert len(found) == 6
    for layer in range(6):
        torch.testing.assert_close(found["embedding", layer], expected[:, :, layer], rtol=1e-5, atol=1e-6)
