"""Families that need more than a few switches: what their config.json says of them, for nanoft/models/families.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from nanoft import UserError
from nanoft.blocks.deltanet import DeltaNetSizes
from nanoft.blocks.moe import Routing
from nanoft.models.layer_fields import KINDS, Fields, read_mixers, read_rope, read_ropes, read_windows, window_but_every

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
SIZES_OF_EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "top_k_experts"), 1 << 12)
SIZES_OF_EXPERTS["moe_intermediate_size"] = 1 << 20
_MOE = "attention_bias sliding_window num_experts num_local_experts num_experts_per_tok router_aux_loss_coef".split()  # noqa: SIM905
_QWEN3_MOE = (*_MOE, "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
              "use_sliding_window", "max_window_layers")  # fmt: skip
# This auxiliary loss is a product of means over a forward pass, not a sum over documents as training.balance_loss.
_NO_AUXILIARY_LOSS: dict[str, tuple[Any, ...]] = {"output_router_logits": (False,)}
QWEN3_MOE: dict[str, Any] = {"fields": _QWEN3_MOE, "gguf": "qwen3moe", "only": _NO_AUXILIARY_LOSS}
QWEN3_MOE |= {"names": (("mlp.gate", "mlp.router"),)}
GPT_OSS: dict[str, Any] = {"fields": (*_MOE, "layer_types", "experts_per_token", "initial_context_length")}
GPT_OSS |= {"only": {**_NO_AUXILIARY_LOSS, "swiglu_limit": (7.0,), "swiglu_alpha": (1.702,)}}
GPT_OSS |= {"gguf": "gpt-oss", "stacked": "in, out"}
_GEMMA4_FIELDS = """
    attention_bias final_logit_softcapping sliding_window layer_types global_head_dim num_global_key_value_heads
    per_layer_config attention_k_eq_v num_kv_shared_layers use_double_wide_mlp hidden_size_per_layer_input
    vocab_size_per_layer_input enable_moe_block num_experts top_k_experts moe_intermediate_size
    """.split()  # noqa: SIM905
_GEMMA4_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": ("vision",),  # between the positions of an image
}
# Parts of names in files of layers with experts, and their names in the decoder.
_BESIDE_MLP = (
    ("mlp", "mlp.dense"), ("router", "mlp.sparse.router"), ("experts", "mlp.sparse.experts"),
    *((norm, f"mlp.{norm}") for norm in ("pre_feedforward_layernorm", "pre_feedforward_layernorm_2",
      "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")),
)  # fmt: skip
_GEMMA4_ROPES: dict[str, Any] = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA4: dict[str, Any] = {"fields": _GEMMA4_FIELDS, "gguf": "gemma4", "only": _GEMMA4_ONLY}
GEMMA4 |= {"stacked": "out, in", "beside_mlp": _BESIDE_MLP}


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


def read_routing(
    hf: Fields, layers: tuple[bool, ...], experts: int, chosen: int, width: int, over_chosen: bool,
    beside_mlp: bool = False,
) -> Routing | None:  # fmt: skip
    """The experts of the layers that have some; `experts` in each, of which `chosen`, if the file does not say."""
    experts = hf.get("num_experts") or hf.get("num_local_experts") or experts
    chosen = hf.get("num_experts_per_tok") or chosen
    if chosen > experts:
        name = "top_k_experts" if beside_mlp else "num_experts_per_tok"
        raise UserError(f"{name}: {chosen} of {experts} experts: choose fewer")
    return Routing(layers, experts, chosen, width, over_chosen, beside_mlp) if any(layers) else None


def qwen3_moe(hf: Fields) -> dict[str, Any]:
    """Qwen3 with experts in every n-th layer that is not in a list of others."""
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        raise UserError(f"decoder_sparse_step: {step!r:.60} is not a number of layers")
    if not isinstance(dense, list):
        raise UserError(f"mlp_only_layers: {dense!r:.60} is not a list of layers")
    sparse = tuple((layer + 1) % step == 0 and layer not in dense for layer in range(hf["num_hidden_layers"]))
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    width, normed = hf.get("moe_intermediate_size", 768), bool(hf.get("norm_topk_prob", False))
    return {
        **dict.fromkeys(("qkv_bias", "o_bias"), bool(hf.get("attention_bias", False))), "qk_norm": "head",
        "windows": read_windows(hf, window), "routing": read_routing(hf, sparse, 128, 8, width, normed),
    }  # fmt: skip


def gpt_oss(hf: Fields) -> dict[str, Any]:
    """Experts with biases, sinks, and a window in every second layer from the first on."""
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):  # transformers' default stretches positions
        raise UserError("rope_parameters: missing: download the file again")
    layers, bias, eps = hf["num_hidden_layers"], hf.get("attention_bias", True), hf.get("rms_norm_eps", 1e-5)
    return {
        **dict.fromkeys(("qkv_bias", "o_bias"), bias), "mlp_bias": True, "mlp": "interleaved", "mlp_limit": 7.0,
        "sinks": True, "head_dim": hf.get("head_dim") or 64, "windows": window_but_every(2, hf, 128), "norm_eps": eps,
        "ropes": (read_rope({"rope_theta": 150_000.0, **hf}),) * layers,
        "routing": read_routing(hf, (True,) * layers, 128, 4, hf["intermediate_size"], True),
    }  # fmt: skip


def gemma4(hf: Fields, window: int, size: int) -> dict[str, Any]:
    """The switches; sliding_window and hidden_size_per_layer_input are `window` and `size` if they are missing.

    Layers with a window and those without have heads of their own sizes; in the larger models the values of the latter
    are their keys. In the smaller models the last layers attend to the keys and values of the last layer of their kind
    that has some, their MLPs may be twice as wide, and every layer reads the token once more
    (nanoft/blocks/per_layer.py). 26B-A4B has experts beside the MLP of each layer (nanoft/blocks/moe.py).
    """
    size, vocabulary = hf.get("hidden_size_per_layer_input", size), hf.get("vocab_size_per_layer_input", 262_144)
    if size and vocabulary != hf["vocab_size"]:
        raise UserError(f"vocab_size_per_layer_input: {vocabulary} is not vocab_size, {hf['vocab_size']}")
    windows = (*window_but_every(6, hf, window)[:-1], None)  # the last layer sees everything
    layers = _gemma4_layers(hf, windows)
    ropes = read_ropes({**hf, "rope_parameters": hf.get("rope_parameters") or _GEMMA4_ROPES}, windows, {})
    experts: dict[str, Any] = {"norms": "both"}
    if hf.get("enable_moe_block"):
        sizes = hf["num_experts"], hf["top_k_experts"], hf["moe_intermediate_size"]
        routing = read_routing(hf, (True,) * len(windows), *sizes, True, beside_mlp=True)
        experts = {"norms": "both but mlp", "mlp": "fused", "routing": routing}
    return {
        **experts, "qk_norm": "head", "v_norm": True, "layer_scalar": True, "activation": "gelu_tanh",
        "head_dim": hf.get("head_dim") or 256, "attention_scale": 1.0, "embedding_scale": hf["hidden_size"] ** 0.5,
        "logit_cap": hf.get("final_logit_softcapping"), "tied": hf.get("tie_word_embeddings", True),
        "qkv_bias": bool(hf.get("attention_bias")), "o_bias": bool(hf.get("attention_bias")),
        "windows": windows, "layers": layers, "per_layer_size": size,
        "ropes": tuple(replace(r, head_dim=own.get("head_dim", 0)) for r, own in zip(ropes, layers, strict=True)),
    }  # fmt: skip


def _gemma4_layers(hf: Fields, windows: tuple[int | None, ...]) -> tuple[dict[str, Any], ...]:
    """In what each layer differs: sizes, what its values are, and whose keys and values it attends to."""
    shared, full, layers = hf.get("num_kv_shared_layers") or 0, _gemma4_sizes(hf, windows), []
    for layer, window in enumerate(windows):
        switches = {} if window else dict(full)
        if layer >= (first := len(windows) - shared):
            sources = [source for source, other in enumerate(windows[: max(0, first)]) if other == window]
            if not sources:
                raise UserError(f"num_kv_shared_layers: {shared}: no layer has keys for {KINDS[window is not None]}")
            wide = 2 if hf.get("use_double_wide_mlp") else 1
            switches |= {"source": sources[-1], "intermediate_size": wide * hf["intermediate_size"]}
        layers.append(switches)
    return tuple(layers)


def _gemma4_sizes(hf: Fields, windows: tuple[int | None, ...]) -> dict[str, Any]:
    """The heads of layers without a window. transformers 5.24 writes them layer by layer, files on the Hub by kind."""
    shared, number = bool(hf.get("attention_k_eq_v")), hf.get("num_key_value_heads") or hf["num_attention_heads"]
    sizes = {"head_dim": hf.get("global_head_dim") or 512, "num_key_value_heads": number}
    sizes |= {"num_key_value_heads": heads} if shared and (heads := hf.get("num_global_key_value_heads")) else {}
    if "per_layer_config" in hf:  # where a layer differs
        given = {number.lstrip("0") or "0": own for number, own in (hf["per_layer_config"] or {}).items()}  # "05": ...
        layers = [str(layer) for layer, window in enumerate(windows) if window is None]
        sizes = {"head_dim": hf.get("head_dim") or 256, "num_key_value_heads": number, **given.get(layers[-1], {})}
        if given not in ({}, dict.fromkeys(layers, given.get(layers[-1]))) or len(sizes) > 2:
            raise UserError(f"per_layer_config: {given!r:.60} is more than sizes of heads in layers without a window")
    if wrong := [name for name, size in sizes.items() if type(size) is not int or not 1 <= size <= 1 << 13]:
        raise UserError(f"{wrong[0]}: {sizes[wrong[0]]!r:.60} is not a whole number from 1 to {1 << 13:,}")
    return {"head_dim": sizes["head_dim"], "num_kv_heads": sizes["num_key_value_heads"], "keys_are_values": shared}
