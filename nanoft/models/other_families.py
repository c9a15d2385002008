"""GPT-2, GPT-NeoX, Qwen3.5 and LFM2: what their config.json says of them, for nanoft/models/families.py."""

from __future__ import annotations

import math
from typing import Any

from nanoft import UserError
from nanoft.blocks.deltanet import DeltaNetSizes
from nanoft.models.layer_fields import Fields, read_mixers, read_rope

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
# The last three are of the layers that predict a second token, which are not loaded.
QWEN3_5 = """
    attention_bias layer_types full_attention_interval linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim
    linear_num_key_heads linear_num_value_heads mtp_num_hidden_layers mtp_use_dedicated_embeddings mlp_only_layers
""".split()  # noqa: SIM905
QWEN3_5_ONLY: dict[str, tuple[Any, ...]] = {"attn_output_gate": (True,), "mamba_ssm_dtype": ("float32",)}
_LFM2_FIELDS = """
    layer_types full_attn_idxs conv_L_cache block_auto_adjust_ff_dim block_ffn_dim_multiplier block_multiple_of
    tie_embedding conv_dim conv_dim_out conv_use_xavier_init block_dim block_mlp_init_scale block_out_init_scale
    block_use_xavier_init block_norm_eps block_use_swiglu num_heads theta use_pos_enc
""".split()  # noqa: SIM905
_LFM2_NAMES = (
    ("embedding_norm", "norm"), ("operator_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
    ("q_layernorm", "q_norm"), ("k_layernorm", "k_norm"), ("self_attn.out_proj", "self_attn.o_proj"),
    ("feed_forward.w1", "mlp.gate_proj"), ("feed_forward.w3", "mlp.up_proj"), ("feed_forward.w2", "mlp.down_proj"),
)  # fmt: skip
LFM2: Any = (tuple(_LFM2_FIELDS), "lfm2", {"conv_bias": (False,)}, {"rms_norm_eps": "norm_eps"}, _LFM2_NAMES)


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


def qwen3_5(hf: Fields) -> dict[str, Any]:
    """Three of four layers are DeltaNets; the others gate their attention, and rotate a quarter of each head."""
    n, layers = hf.get("full_attention_interval") or 4, hf["num_hidden_layers"]
    mixers = read_mixers(hf, "linear_attention", [(layer + 1) % n == 0 for layer in range(layers)])
    sizes = (("num_key_heads", 16), ("num_value_heads", 32), ("key_head_dim", 128), ("value_head_dim", 128))
    rope = read_rope({"partial_rotary_factor": 0.25, **hf})
    return {
        **dict.fromkeys(("qkv_bias", "o_bias"), bool(hf.get("attention_bias"))),
        "norm_offset": 1.0, "qk_norm": "head", "head_dim": hf.get("head_dim") or 256,
        "gated_attention": True, "mixers": mixers, "conv_kernel": hf.get("linear_conv_kernel_dim", 4),
        "delta": DeltaNetSizes(*(hf.get(f"linear_{name}", size) for name, size in sizes)), "ropes": (rope,) * layers,
    }  # fmt: skip


def lfm2(hf: Fields) -> dict[str, Any]:
    """Convolutions over three positions, with some layers of attention between them; the MLP's width is computed."""
    n, full, width = hf["num_hidden_layers"], hf.get("full_attn_idxs"), hf["intermediate_size"]
    mixers = read_mixers(hf, "conv", [full is None or layer in full for layer in range(n)])
    if hf.get("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        if (factor := hf.get("block_ffn_dim_multiplier", 1.0)) is not None:
            multiple = hf.get("block_multiple_of", 256)
            width = math.ceil(int(factor * width) / multiple) * multiple
    eps = hf.get("rms_norm_eps")
    return {
        "qk_norm": "head", "mixers": mixers, "conv_kernel": hf.get("conv_L_cache", 3),
        "intermediate_size": width, "norm_eps": 1e-5 if eps is None else eps,
        "ropes": (read_rope({"rope_theta": 1e6, **hf}),) * n,
        "tied": hf.get("tie_embedding", hf.get("tie_word_embeddings", True)),
    }  # fmt: skip
