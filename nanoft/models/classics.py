"""GPT-2 and GPT-NeoX: what their config.json says of them, for nanoft/models/families.py."""

from __future__ import annotations

from typing import Any

from nanoft import UserError
from nanoft.models.layer_fields import Fields, read_rope

GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_GPT2_ONLY: dict[str, tuple[Any, ...]] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), (0.0, 0.1))
_GPT2_ONLY |= {"activation_function": tuple(GELUS), "scale_attn_weights": (True,)}
_GPT2_FIELDS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner", "rms_norm_eps": "layer_norm_epsilon",
}  # fmt: skip
_GPT2_NAMES = (
    ("transformer", "model"), ("wte", "embed_tokens"), ("wpe", "embed_positions"), ("ln_f", "norm"), ("h", "layers"),
    ("ln_1", "input_layernorm"), ("attn.c_attn", "self_attn.qkv_proj"), ("attn.c_proj", "self_attn.o_proj"),
    ("ln_2", "post_attention_layernorm"), ("mlp.c_fc", "mlp.up_proj"), ("mlp.c_proj", "mlp.down_proj"),
)  # fmt: skip
_SUMMARY = "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout"
_NEOX_FIELDS = {
    "rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct",
}  # fmt: skip
_NEOX_NAMES = (
    ("gpt_neox", "model"), ("embed_in", "embed_tokens"), ("final_layer_norm", "norm"), ("embed_out", "lm_head"),
    ("attention.query_key_value", "self_attn.qkv_proj"), ("attention.dense", "self_attn.o_proj"),
    ("mlp.dense_h_to_4h", "mlp.up_proj"), ("mlp.dense_4h_to_h", "mlp.down_proj"),
)  # fmt: skip
# Of each, fields that are read, the name in llama.cpp, values that are supported, names of fields and of tensors, and
# whether weights are stored as (in, out).
GPT2: Any = (("n_ctx", *_SUMMARY.split()), "gpt2", _GPT2_ONLY, _GPT2_FIELDS, _GPT2_NAMES, True)
_NEOX = ("attention_bias", "use_parallel_residual", "classifier_dropout")
_NEOX_ONLY = {"hidden_act": tuple(GELUS), "hidden_dropout": (0.0,)}
GPT_NEOX: Any = (_NEOX, "gptneox", _NEOX_ONLY, _NEOX_FIELDS, _NEOX_NAMES)


def gpt2(hf: Fields) -> dict[str, Any]:
    """Learned positions instead of a rope; the dropout of pre-training is not applied."""
    return {
        **_classic(hf), "qkv": "fused", "activation": GELUS[hf.get("activation_function", "gelu_new")],
        "positions": hf["max_position_embeddings"], "ropes": (None,) * hf["num_hidden_layers"],
        "intermediate_size": hf.get("n_inner") or 4 * hf["hidden_size"], "tied": hf.get("tie_word_embeddings", True),
    }  # fmt: skip


def gpt_neox(hf: Fields) -> dict[str, Any]:
    """Attention and MLP of a block read the same x; a quarter of each head rotates."""
    bias, share = hf.get("attention_bias", True), hf.get("partial_rotary_factor") or 0.25
    rope, size = read_rope({**hf, "partial_rotary_factor": share}), hf["hidden_size"] // hf["num_attention_heads"]
    if hf.get("head_dim") not in (None, size):  # transformers would use it for the rope only
        raise UserError(f"head_dim: {hf['head_dim']} is not supported: only hidden_size / num_attention_heads, {size}")
    return {
        **_classic(hf), "qkv": "interleaved", "activation": GELUS[hf.get("hidden_act", "gelu")], "qkv_bias": bias,
        "o_bias": bias, "parallel": hf.get("use_parallel_residual", True), "ropes": (rope,) * hf["num_hidden_layers"],
    }  # fmt: skip


def _classic(hf: Fields) -> dict[str, Any]:
    """LayerNorm, biases everywhere, as many heads of keys as of queries, no gate in the MLP."""
    heads, biases = hf["num_attention_heads"], dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True)
    eps = hf.get("rms_norm_eps")
    return {**biases, "norm": "layer", "norm_eps": 1e-5 if eps is None else eps, "mlp": "plain",
            "num_kv_heads": heads, "head_dim": hf["hidden_size"] // heads}  # fmt: skip
