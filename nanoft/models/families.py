"""Model families: what a Hugging Face `config.json` says, as the switches of the one decoder in nanoft/model.py.

`FAMILIES` has one entry per family: how to read its config.json, and its name in llama.cpp. A field that the family
does not read is refused: a setting that is silently ignored is a model that is silently wrong. A new family is an entry
and, if no combination of switches describes it, a new switch in the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanoft import UserError
from nanoft.io.untrusted import refuse_code
from nanoft.model import DecoderConfig, Rope

Fields = Mapping[str, Any]  # of a config.json


@dataclass(frozen=True)
class Family:
    """How an architecture of transformers maps to the decoder."""

    architecture: str  # its name in config.json
    switches: Callable[[Fields], dict[str, Any]]  # config.json -> the DecoderConfig fields in which families differ
    fields: tuple[str, ...]  # of config.json that `switches` reads, besides READ_FIELDS
    gguf: str | None  # its name in llama.cpp; None: llama.cpp does not have it


# Fields of a config.json that are read or checked for every family ...
READ_FIELDS = """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings
    original_max_position_embeddings tie_word_embeddings hidden_act attention_dropout quantization_config
    partial_rotary_factor
""".split()  # noqa: SIM905
# ... and fields that do not affect the logits, as those that begin with _, among them settings of generation that
# transformers once kept there.
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
    "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "head_dim": 1 << 13,
}  # fmt: skip


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """Read a Hugging Face `config.json`; a UserError for a field that may change the logits and is not known here.

    A field that is missing or of the wrong type may raise any other exception.
    """
    refuse_code(hf)
    for name, most in MOST.items():  # before anything of that size is allocated
        value = hf.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise UserError(f"{name}: {value!r:.60} is not a whole number from 1 to {most:,}")
    family = find_family(hf)
    _refuse_unknown(hf, family)
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
        "rope": _read_rope(hf),
        "tied": bool(hf.get("tie_word_embeddings", False)),
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "qk_norm"), False),
        "windows": (None,) * layers,
        "family": family,
    }
    config = DecoderConfig(**{**common, **FAMILIES[family].switches(hf)})
    _check_shape(config)
    return config


def find_family(hf: Fields) -> str:
    """The key in FAMILIES: by `architectures`, or by `model_type` if there are none."""
    names = hf.get("architectures") or []
    known = {family.architecture: name for name, family in FAMILIES.items()}
    found = [known[own] for name in names if (own := name.replace(SCORES, "ForCausalLM")) in known]
    if not names and hf.get("model_type") in FAMILIES:
        found = [hf["model_type"]]
    if not found:
        given = ", ".join(names) or "none"
        raise UserError(f"architectures: {given} is not supported: the supported ones are {', '.join(known)}")
    return found[0]


def _refuse_unknown(hf: Fields, family: str) -> None:
    """Refuse every field that the family does not read, unless it is harmless or off."""
    supported = {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (1.0,), "attention_dropout": (0.0,)}
    for name, values in supported.items():
        if hf.get(name) not in (*values, None):
            raise UserError(f"{name}: {hf[name]!r} is not supported: set it to {values[0]!r} if that is right")
    known = {*READ_FIELDS, *HARMLESS_FIELDS, *FAMILIES[family].fields}
    for name, value in hf.items():
        if value and name not in known and not name.startswith("_"):
            what = f"unknown field of {family}, which may change the model"
            raise UserError(f"{name}: {value!r:.60}: {what}: remove it from config.json if it does not")


# Fields of each type of rope besides those of all types: first the ones that it needs, then the others.
ROPE_FIELDS = {
    "default": ("", ""),
    "linear": ("factor", ""),
    "dynamic": ("factor", ""),
    "llama3": ("factor low_freq_factor high_freq_factor", ""),
    "yarn": ("factor", "beta_fast beta_slow mscale mscale_all_dim attention_factor truncate finetuned"),
}
ALL_ROPES = ["type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"]


def _read_rope(hf: Fields) -> Rope:
    """Classic form: rope_theta and rope_scaling; current form: rope_parameters has both, and its theta counts."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_FIELDS:
        raise UserError(f"rope type {kind!r} is not supported: the supported ones are {', '.join(ROPE_FIELDS)}")
    needed, other = (names.split() for names in ROPE_FIELDS[kind])
    if missing := [name for name in needed if name not in scaling]:
        raise UserError(f"rope type {kind} needs the field {missing[0]}")
    if unknown := [name for name, value in scaling.items() if value and name not in [*ALL_ROPES, *needed, *other]]:
        value = scaling[unknown[0]]
        raise UserError(f"rope: {unknown[0]}: {value!r:.60} has no effect with type {kind}: remove it")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("rope: a partial_rotary_factor other than 1 is not supported")
    given = [value for value in (scaling.get("rope_theta"), hf.get("rope_theta")) if value is not None]
    if wrong := [theta for theta in given if type(theta) not in (int, float) or not 0 < theta < 1e30]:
        raise UserError(f"rope_theta: {wrong[0]!r:.60} is not a positive number")
    theta, parameters = (given or [10000.0])[0], dict(scaling)
    if kind in ("llama3", "yarn"):
        outer, inner = hf.get("original_max_position_embeddings"), scaling.get("original_max_position_embeddings")
        parameters["original_max_position_embeddings"] = outer or inner or hf["max_position_embeddings"]
    context = hf["max_position_embeddings"] if kind == "dynamic" else 0
    return Rope(theta=float(theta), kind=kind, parameters=parameters, context=context)


def with_both_rope_forms(hf: Fields) -> dict[str, Any]:
    """The fields with the rope in both forms; transformers 4 and 5 each use a default if only the other's is there."""
    rope = _read_rope(hf)
    scaling = {key: value for key, value in rope.parameters.items() if key not in ("type", "rope_type", "rope_theta")}
    current = {"rope_type": rope.kind, "rope_theta": rope.theta, **scaling}
    classic = None if rope.kind == "default" else {**current, "type": rope.kind}
    return {**hf, "rope_theta": rope.theta, "rope_parameters": current, "rope_scaling": classic}


# ---- The families


def _llama(hf: Fields) -> dict[str, Any]:
    bias = bool(hf.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(hf.get("mlp_bias", False))}


def _mistral(hf: Fields) -> dict[str, Any]:
    """A sliding window of 4096 unless the field says otherwise, in all layers unless layer_types says otherwise."""
    return {"windows": _windows(hf, hf.get("sliding_window", 4096))}


def _qwen2(hf: Fields) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _qwen_windows(hf)}


def _qwen3(hf: Fields) -> dict[str, Any]:
    bias, head_dim = bool(hf.get("attention_bias", False)), hf.get("head_dim") or 128
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "head_dim": head_dim, "windows": _qwen_windows(hf)}


def _qwen_windows(hf: Fields) -> tuple[int | None, ...]:
    """With use_sliding_window only, and without layer_types from max_window_layers on."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    return _windows(hf, window, hf.get("max_window_layers", 28))


def _windows(hf: Fields, window: int | None, first: int = 0) -> tuple[int | None, ...]:
    """The window of each layer: in those that layer_types names, or without it from layer `first` on."""
    by_type = {"full_attention": None, "sliding_attention": window}
    kinds = hf.get("layer_types")
    if not kinds:
        return tuple(window if index >= first else None for index in range(hf["num_hidden_layers"]))
    if unknown := [kind for kind in kinds if kind not in by_type]:
        raise UserError(f"layer_types: {unknown[0]!r:.60} is not supported: only {', '.join(by_type)}")
    return tuple(by_type[kind] for kind in kinds)


WINDOWS = ("sliding_window", "layer_types")
QWEN = (*WINDOWS, "use_sliding_window", "max_window_layers")
FAMILIES: dict[str, Family] = {  # by model_type
    "llama": Family("LlamaForCausalLM", _llama, ("attention_bias", "mlp_bias"), "llama"),
    "mistral": Family("MistralForCausalLM", _mistral, WINDOWS, "llama"),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, QWEN, "qwen2"),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, ("attention_bias", *QWEN), "qwen3"),
}


def _check_shape(config: DecoderConfig) -> None:
    """Refuse values that no decoder can have, before they fail deep inside one."""
    if config.num_heads % config.num_kv_heads or config.head_dim % 2 or config.head_dim < 1:
        raise UserError("num_attention_heads must be a multiple of num_key_value_heads, and head_dim of 2")
    if type(config.norm_eps) not in (int, float) or not 0 <= config.norm_eps < 1:
        raise UserError(f"rms_norm_eps: {config.norm_eps!r:.60} is not between 0 and 1")
    windows = [window for window in config.windows if window is not None]
    wrong = any(type(window) is not int or not 1 <= window <= 1 << 31 for window in windows)
    if wrong or len(config.windows) != config.num_layers:
        raise UserError(f"sliding_window, layer_types: give a window or none for each of {config.num_layers} layers")
    frequencies, factor = config.rope.angles(config.head_dim, config.rope.context + 1)
    if not frequencies.isfinite().all() or not math.isfinite(factor):
        raise UserError(f"rope: {config.rope.theta}, {dict(config.rope.parameters)!r:.200}: the angles are not finite")
