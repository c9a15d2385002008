"""Model families: translate a Hugging Face `config.json` into the switches of the one decoder in nanoft/model.py.

`FAMILIES` has one entry per family: how to read its config.json, its name in llama.cpp, and fields or tensors that its
files name differently from most; only nanoft/models knows these names. A field that the family does not read is
refused, because a setting that is silently ignored makes a model silently wrong. A new family is an entry and, if no
combination of switches describes it, a new switch in the decoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nanoft import UserError
from nanoft.blocks.rope import Rope
from nanoft.io.untrusted import refuse_code
from nanoft.model import DecoderConfig
from nanoft.models import other_families as other
from nanoft.models.layer_fields import (
    KINDS,
    ROPE_FIELDS,
    Fields,
    current_form,
    read_rope,
    read_ropes,
    read_windows,
    refuse_wrong_types,
    rope_in_some,
    window_but_every,
)


@dataclass(frozen=True)
class Family:
    """How an architecture of transformers maps to the decoder."""

    architecture: str  # its name in config.json
    switches: Callable[[Fields], dict[str, Any]]  # config.json -> the DecoderConfig fields that differ by family
    fields: Sequence[str]  # fields of config.json that `switches` reads, besides READ_FIELDS
    gguf: str | None  # its name in llama.cpp; None: not exported
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # fields for which only these values are supported
    field_names: dict[str, str] = field(default_factory=dict)  # READ_FIELDS -> their names in its config.json
    names: tuple[tuple[str, str], ...] = ()  # parts of names in files, and their names in the decoder
    transposed: bool = False  # the weights of linears in blocks are stored as (in, out) (Conv1D in transformers)
    stacked: str = ""  # experts are stored as stacks of "in, out" or "out, in": see expert_files.py
    beside_mlp: tuple[tuple[str, str], ...] = ()  # `names` of layers with experts beside an MLP


# Fields of a config.json that are read or checked for every family ...
READ_FIELDS = """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings
    original_max_position_embeddings tie_word_embeddings hidden_act attention_dropout quantization_config
    partial_rotary_factor
""".split()  # noqa: SIM905
# ... and fields that do not affect the logits (like all that begin with _), among them generation settings that older
# versions of transformers stored there.
HARMLESS_FIELDS = """
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    torch_dtype dtype transformers_version use_cache tokenizer_class model_max_length max_length max_sequence_length
    seq_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix
    initializer_range pretraining_tp is_decoder return_dict use_return_dict output_attentions output_hidden_states
    chunk_size_feed_forward id2label label2id problem_type finetuning_task task_specific_params torchscript
    is_llama_config unsloth_fixed unsloth_version attn_implementation use_flash_attention use_flash_attn
    use_flash_attention_2 transformers.js_config neftune_noise_alpha gradient_checkpointing
""".split()  # noqa: SIM905

SCORES = "ForSequenceClassification"  # the end of an architecture's name, instead of ForCausalLM: a reward model
# Upper limits of sizes in a config.json: several times those of the largest models.
MOST = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 18, "intermediate_size": 1 << 20, "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "head_dim": 1 << 13, "n_positions": 1 << 24,
    **other.SIZES_OF_EXPERTS, "linear_num_key_heads": 1 << 12, "linear_num_value_heads": 1 << 12,
    "linear_key_head_dim": 1 << 13, "linear_value_head_dim": 1 << 13, "linear_conv_kernel_dim": 256,
    "conv_L_cache": 256,
}  # fmt: skip
OUTER_FIELDS = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")  # of a wrapper, for all towers


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """Read a Hugging Face `config.json`; raises a UserError for an unknown field that may change the logits.

    A field that is missing or of the wrong type may raise any other exception.
    """
    refuse_code(hf)
    wrapped, hf = text_fields(hf) is not hf, standard_fields(hf)
    for name, most in MOST.items():  # before anything of that size is allocated
        value, may_be_null = hf.get(name, 1), name.startswith(("num_key", "head_dim", "n_pos", "num_e", "moe_", "top_"))
        least = 0 if name in other.SIZES_OF_EXPERTS and hf.get("shared_intermediate_size") else 1  # Granite 4: or none
        if not (value is None and may_be_null) and (type(value) is not int or not least <= value <= most):
            raise UserError(f"{name}: {value!r:.60} is not a whole number from {least} to {most:,}")
    family = find_family(hf)
    _refuse_unknown(hf, family)
    refuse_wrong_types(hf)
    hidden, heads, layers = hf["hidden_size"], hf["num_attention_heads"], hf["num_hidden_layers"]
    common = {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": hf["intermediate_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hidden // heads,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "windows": (None,) * layers,
        "family": family,
        "wrapped": wrapped,
    }
    switches = FAMILIES[family].switches(hf)
    if "ropes" not in switches:
        common["ropes"] = (read_rope(hf),) * layers
    config = DecoderConfig(**{**common, **switches})
    _check_shape(config)
    return config


def main_rope(config: DecoderConfig) -> Rope:
    """The rope of the layers with the widest view."""
    return next(iter(config.distinct_ropes), Rope())


def text_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of the text tower of a wrapper, under those that hold for all of it; any other config.json itself."""
    names = hf.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"architectures: {names!r:.60} is not a list of names")
    found = [WRAPPERS[name] for name in names if name in WRAPPERS]
    if not found:
        return hf
    towers, text = found[0], hf.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"text_config: {text!r:.60} is not a JSON object: download the file again")
    if (kind := text.get("model_type", next(iter(towers)))) not in list(towers):
        raise UserError(f"text_config: model_type: {kind!r:.60} is not supported: only {', '.join(towers)}")
    outer = {name: hf[name] for name in OUTER_FIELDS if name in hf} | {"architectures": [FAMILIES[kind].architecture]}
    return {**towers[kind], **text, "model_type": kind, **outer}


def standard_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of the text tower, in which those of READ_FIELDS also have the names that most families use."""
    text = text_fields(hf)
    own = FAMILIES[find_family(text)].field_names
    return {**text, **{name: text.get(here) for name, here in own.items() if here in text or name not in text}}


def module_name(name: str) -> str:
    """The decoder's name of a tensor or module in a file of any family; of Gemma 4's experts see `regroup`."""
    return _renamed(name, (pair for family in FAMILIES.values() for pair in family.names))


def regroup(config: DecoderConfig, name: str) -> str:
    """The decoder's name of a part of a layer that may have experts beside an MLP, from the result of `module_name`."""
    return _renamed(name, FAMILIES[config.family].beside_mlp if config.routing else ())


def file_name(family: str, name: str) -> str:
    """The name that a family's files use for a tensor or module of the decoder."""
    return _renamed(name, ((own, here) for here, own in (*FAMILIES[family].names, *FAMILIES[family].beside_mlp)))


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if old in name:
            name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name


def score_architecture(family: str) -> str:
    """The architecture of a family's reward model."""
    return re.sub("ForCausalLM|LMHeadModel", SCORES, FAMILIES[family].architecture)


def find_family(hf: Fields) -> str:
    """The key in FAMILIES: by `architectures`, or by `model_type` if there are none."""
    names = hf.get("architectures") or []
    known = {family.architecture: name for name, family in FAMILIES.items()}
    rewards = {score_architecture(name): name for name in FAMILIES}
    found = [name for own in names if (name := known.get(own) or rewards.get(own))]
    if not names and hf.get("model_type") in FAMILIES:
        found = [hf["model_type"]]
    if not found:
        given = ", ".join(names) or "none"
        supported = ", ".join([*known, *WRAPPERS])
        raise UserError(f"architectures: {given} is not supported: the supported ones are {supported}")
    return found[0]


def _refuse_unknown(hf: Fields, family: str) -> None:
    """Refuse every field that the family does not read, unless it is harmless or off."""
    supported = {"hidden_act": ("silu", "swish"), "attention_dropout": (0.0,)} | FAMILIES[family].only
    for name, values in supported.items():
        if hf.get(name) not in (*values, None):
            right = repr(values[0]) if values else None
            raise UserError(f"{name}: {hf[name]!r} is not supported: only {right} is")
    entry = FAMILIES[family]
    known = {*READ_FIELDS, *HARMLESS_FIELDS, *entry.fields, *entry.only, *entry.field_names.values()}
    for name, value in hf.items():
        if value and name not in known and not name.startswith("_"):
            what = f"unknown field of {family}, which may change the model"
            raise UserError(f"{name}: {value!r:.60}: {what}: if it does not, remove it from config.json")


def with_both_rope_forms(hf: Fields) -> dict[str, Any]:
    """The fields with the rope in the forms of transformers 4 and 5, which use a default if theirs is missing."""
    ropes, share, family = decoder_config({**hf}).distinct_ropes, dict[str, Any](), FAMILIES[find_family(hf)]
    if not ropes or find_family(hf).startswith("gemma4"):  # which version 4 does not know
        return {**hf}
    rope, *local = ropes
    current = full = current_form(rope)
    classic = None if rope.kind == "default" else {**full, "type": rope.kind}
    if rope.kind == "longrope":  # version 4 supports it in Phi-3 only, with exactly these fields
        classic = {"type": rope.kind, **{key: full[key] for key in ("short_factor", "long_factor")}}
        share["original_max_position_embeddings"] = rope.context
    if rope.share != 1 or "partial_rotary_factor" in family.field_names:
        share["partial_rotary_factor"] = rope.share
    if local:
        current = dict(zip(KINDS, (full, current_form(local[0])), strict=True))
        if find_family(hf) == "gemma3_text":
            share["rope_local_base_freq"] = local[0].theta
    share |= {"rope_theta": rope.theta, "rope_parameters": current, "rope_scaling": classic}
    return {**hf, **share, **{here: share[name] for name, here in family.field_names.items() if name in share}}


# ---- The families


def _llama(hf: Fields) -> dict[str, Any]:
    return {**_attention_bias(hf), "mlp_bias": bool(hf.get("mlp_bias", False))}


def _mistral(hf: Fields) -> dict[str, Any]:
    """A sliding window of 4096 unless the field says otherwise, in all layers unless layer_types says otherwise."""
    return {"windows": read_windows(hf, hf.get("sliding_window", 4096))}


def _qwen2(hf: Fields) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _qwen_windows(hf)}


def _qwen3(hf: Fields) -> dict[str, Any]:
    head_dim = hf.get("head_dim") or 128
    return {**_attention_bias(hf), "qk_norm": "head", "head_dim": head_dim, "windows": _qwen_windows(hf)}


def _qwen_windows(hf: Fields) -> tuple[int | None, ...]:
    """With use_sliding_window only, and without layer_types from max_window_layers on."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    return read_windows(hf, window, hf.get("max_window_layers", 28))


def _gemma(hf: Fields) -> dict[str, Any]:
    """Norms multiply by 1 + weight, before and after each half; embeddings grow by sqrt(hidden)."""
    return {
        "norms": "both", "norm_offset": 1.0, "activation": "gelu_tanh", "head_dim": hf.get("head_dim") or 256,
        "attention_scale": (hf.get("query_pre_attn_scalar") or 256) ** -0.5,
        "embedding_scale": hf["hidden_size"] ** 0.5,
        "attention_cap": hf.get("attn_logit_softcapping"), "logit_cap": hf.get("final_logit_softcapping"),
        "tied": hf.get("tie_word_embeddings", True), **_attention_bias(hf),
    }  # fmt: skip


def _attention_bias(hf: Fields) -> dict[str, bool]:
    return dict.fromkeys(("qkv_bias", "o_bias"), bool(hf.get("attention_bias", False)))


def _gemma2(hf: Fields) -> dict[str, Any]:
    """Every second layer, from the first on, attends within a window only."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return {**_gemma({**caps, **hf}), "windows": window_but_every(2, hf, 4096)}


def _gemma3(hf: Fields) -> dict[str, Any]:
    """Five of six layers attend within a window only, and have a rope of their own."""
    windows = window_but_every(hf.get("sliding_window_pattern") or 6, hf, 4096)
    local = {"rope_theta": hf.get("rope_local_base_freq") or 10000.0}
    return {
        **_gemma(hf),
        "qk_norm": "head",
        "windows": windows,
        "ropes": read_ropes({"rope_theta": 1e6, **hf}, windows, local),
    }


def _phi3(hf: Fields) -> dict[str, Any]:
    """q, k, v in one linear, and gate and up."""
    return {"qkv": "fused", "mlp": "fused", "windows": read_windows(hf, hf.get("sliding_window"))}


def _ministral3(hf: Fields) -> dict[str, Any]:
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):  # transformers' default stretches positions
        raise UserError("rope_parameters: missing: download the file again")
    return {"head_dim": hf.get("head_dim") or 128, "norm_eps": hf.get("rms_norm_eps", 1e-5)}


def _olmo2(hf: Fields) -> dict[str, Any]:
    """Norms on outputs only; queries and keys are normalized over all heads together."""
    return {"norms": "output", "qk_norm": "width", **_attention_bias(hf)}


def _olmo3(hf: Fields) -> dict[str, Any]:
    """Three of four layers attend within a window only; only the others stretch positions."""
    windows, local = window_but_every(4, hf, 4096), {"rope_theta": hf.get("rope_theta", 5e5)}
    return {**_olmo2(hf), "windows": windows, "ropes": read_ropes({"rope_theta": 5e5, **hf}, windows, local)}


def _exaone4(hf: Fields) -> dict[str, Any]:
    """In models in which three of four layers attend within a window only, the others do not rotate."""
    hybrid, every = hf.get("sliding_window", 4096) is not None, hf.get("sliding_window_pattern") or 4
    windows = window_but_every(every, hf, 4096) if hybrid else (None,) * hf["num_hidden_layers"]
    ropes = rope_in_some(read_rope(hf), [window is not None or not hybrid for window in windows])
    return {"norms": "output", "qk_norm": "head", "windows": windows, "ropes": ropes}


def _smollm3(hf: Fields) -> dict[str, Any]:
    """Every fourth layer does not rotate."""
    n, rope = hf.get("no_rope_layer_interval") or 4, read_rope({"rope_theta": 2e6, **hf})
    has_rope = hf.get("no_rope_layers") or [(layer + 1) % n > 0 for layer in range(hf["num_hidden_layers"])]
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return {**_llama(hf), "tied": hf.get("tie_word_embeddings", True), "windows": read_windows(hf, window),
            "ropes": rope_in_some(rope, has_rope)}  # fmt: skip


def _granite(hf: Fields) -> dict[str, Any]:
    """Llama with four factors."""
    return {
        **_llama(hf), "embedding_scale": hf.get("embedding_multiplier", 1.0),
        "residual_scale": hf.get("residual_multiplier", 1.0), "attention_scale": hf.get("attention_multiplier", 1.0),
        "logit_scale": 1 / hf.get("logits_scaling", 1.0),
    }  # fmt: skip


def _granite4(hf: Fields) -> dict[str, Any]:
    """Without experts and state-space layers, Granite 3 with gate and up in one linear, and with a rope or without."""
    if hf.get("num_local_experts") != 0:
        raise UserError(f"num_local_experts: {hf.get('num_local_experts')!r:.60} is not supported: only 0")
    kinds = hf.get("layer_types") or ["mamba"]
    if other := [kind for kind in kinds if kind not in ("attention", "full_attention")]:
        raise UserError(f"layer_types: {other[0]!r:.60} is not supported: only attention")
    rope = read_rope(hf) if hf.get("position_embedding_type") == "rope" else None
    return {**_granite(hf), "mlp": "fused", "mlp_bias": False, "ropes": (rope,) * hf["num_hidden_layers"]}


def _seed_oss(hf: Fields) -> dict[str, Any]:
    return {"qkv_bias": hf.get("attention_bias", True), "o_bias": hf.get("attention_out_bias", False),
            "mlp_bias": hf.get("mlp_bias", False), "head_dim": hf.get("head_dim") or 128}  # fmt: skip


WINDOWS = ("sliding_window", "layer_types")
QWEN = (*WINDOWS, "use_sliding_window", "max_window_layers")
GEMMA = ("attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", *WINDOWS)
GEMMA_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "hidden_activation": ("gelu_pytorch_tanh",),
}
GEMMA_ONLY |= {"use_bidirectional_attention": (False,), "cache_implementation": ("hybrid",)}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "residual_dropout"), (0.0,))
GRANITE = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
# Fields that only experts and state-space layers use.
GRANITE4 = """
    layer_types num_local_experts num_experts_per_tok output_router_logits router_aux_loss_coef mamba_n_heads
    mamba_n_groups mamba_d_state mamba_d_head mamba_d_conv mamba_expand mamba_chunk_size mamba_conv_bias
    mamba_proj_bias init_method time_step_limit time_step_min time_step_max time_step_floor
""".split()  # noqa: SIM905
GRANITE4_NAMES = (("shared_mlp.input_linear", "mlp.gate_up_proj"), ("shared_mlp.output_linear", "mlp.down_proj"))
BIASES = ("attention_bias", "mlp_bias")
FAMILIES: dict[str, Family] = {  # by model_type
    "llama": Family("LlamaForCausalLM", _llama, BIASES, "llama"),
    "mistral": Family("MistralForCausalLM", _mistral, WINDOWS, "llama"),
    "ministral3": Family("Ministral3ForCausalLM", _ministral3, ("sliding_window",), "mistral3", {"sliding_window": ()}),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, QWEN, "qwen2"),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, ("attention_bias", *QWEN), "qwen3"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", other.qwen3_moe, **other.QWEN3_MOE),
    "gpt_oss": Family("GptOssForCausalLM", other.gpt_oss, **other.GPT_OSS),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, GEMMA, "gemma2", GEMMA_ONLY),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", _gemma3, (*GEMMA, "sliding_window_pattern", "rope_local_base_freq"), "gemma3", GEMMA_ONLY
    ),
    "gemma4_text": Family("Gemma4ForCausalLM", partial(other.gemma4, window=512, size=256), **other.GEMMA4),
    "gemma4_unified_text": Family(
        "Gemma4UnifiedForCausalLM", partial(other.gemma4, window=1024, size=0), **other.GEMMA4
    ),
    "phi3": Family("Phi3ForCausalLM", _phi3, WINDOWS, "phi3", NO_DROPOUT),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, ("attention_bias",), "olmo2"),
    "olmo3": Family("Olmo3ForCausalLM", _olmo3, ("attention_bias", *WINDOWS), "olmo2"),
    "exaone4": Family("Exaone4ForCausalLM", _exaone4, (*WINDOWS, "sliding_window_pattern"), "exaone4"),
    "smollm3": Family(
        "SmolLM3ForCausalLM", _smollm3, (*BIASES, *QWEN, "no_rope_layers", "no_rope_layer_interval"), "smollm3"
    ),
    "granite": Family("GraniteForCausalLM", _granite, (*BIASES, *GRANITE), "granite"),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        _granite4,
        ("attention_bias", *GRANITE, *GRANITE4),
        "granite",
        {"position_embedding_type": ("rope", "nope"), "normalization_function": ("rmsnorm",)},
        {"intermediate_size": "shared_intermediate_size"},
        GRANITE4_NAMES,
    ),
    "seed_oss": Family("SeedOssForCausalLM", _seed_oss, (*BIASES, "attention_out_bias"), "seed_oss", NO_DROPOUT),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", other.qwen3_5, tuple(other.QWEN3_5), "qwen35", other.QWEN3_5_ONLY),
    "lfm2": Family("Lfm2ForCausalLM", other.lfm2, *other.LFM2),
    "gpt2": Family("GPT2LMHeadModel", other.gpt2, *other.GPT2),
    "gpt_neox": Family("GPTNeoXForCausalLM", other.gpt_neox, *other.GPT_NEOX),
}

# Models with several towers, one of them for text: the possible families of text_config, the default first, each with
# default values of its fields.
GEMMA3_TEXT = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4}
WRAPPERS: dict[str, dict[str, Fields]] = {
    "Gemma3ForConditionalGeneration": {"gemma3_text": {**GEMMA3_TEXT, "max_position_embeddings": 131_072}},
    "Gemma4ForConditionalGeneration": {"gemma4_text": {}},
    "Gemma4UnifiedForConditionalGeneration": {"gemma4_unified_text": {}},
    "Mistral3ForConditionalGeneration": {"mistral": {}, "ministral3": {}},
    "Qwen3_5ForConditionalGeneration": {"qwen3_5_text": {"vocab_size": 248_320, "max_position_embeddings": 32_768}},
}


def _check_shape(config: DecoderConfig) -> None:
    """Refuse values that no decoder can have before they fail deep inside it."""
    if config.delta and config.delta.value_heads % config.delta.key_heads:
        raise UserError(f"linear_num_value_heads: {config.delta.value_heads} is not a multiple of linear_num_key_heads")
    for layer in config.by_layer:
        heads, groups, size = layer.num_heads, layer.num_kv_heads, layer.head_dim
        if heads % groups:
            raise UserError(f"num_attention_heads: {heads} is not a multiple of num_key_value_heads, {groups}")
        if size % 2 or size < 1:
            raise UserError(f"head_dim: {size} is not even: its dimensions are rotated in pairs")
    if type(config.norm_eps) not in (int, float) or not 0 <= config.norm_eps < 1:
        raise UserError(f"rms_norm_eps: {config.norm_eps!r:.60} is not between 0 and 1")
    for window in config.windows:
        if window is not None and (type(window) is not int or not 1 <= window <= 1 << 31):
            raise UserError(f"sliding_window: {window!r:.60} is not a number of tokens")
    per_layer = {"layer_types": config.windows, "no_rope_layers": config.ropes}
    for name, own in [*per_layer.items(), ("layer_types", config.mixers or config.windows)]:
        if len(own) != config.num_layers:
            raise UserError(f"{name}: {len(own)} entries: give one for each of the {config.num_layers} layers")
    for rope in config.distinct_ropes:
        size = rope.head_dim or config.head_dim
        rotated = int(size * rope.share)
        if rotated % 2 or not rotated:
            raise UserError(f"partial_rotary_factor: {rope.share} rotates {rotated} of {size} dimensions, not pairs")
        for name in ROPE_FIELDS["longrope"][0].split() if rope.kind == "longrope" else ():
            if len(rope.parameters[name]) != rotated // 2:
                have = f"{len(rope.parameters[name])} numbers"
                raise UserError(f"rope: {name}: {have}: give one for each of {rotated // 2} pairs of dimensions")
        frequencies, factor = rope.angles(size, rope.context + 1)
        if not frequencies.isfinite().all() or not math.isfinite(factor):
            raise UserError(f"rope: {rope.theta}, {dict(rope.parameters)!r:.200}: the angles are not finite")
