"""Model families: what a Hugging Face `config.json` says, as the switches of the one decoder in `nanoft/model.py`.

A field that is not known here is refused: a setting that is silently ignored is a model that is silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.io.untrusted import read_json, refuse_code
from nanoft.model import DecoderConfig, Rope

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# Fields of a config.json that this module reads ...
READ_FIELDS = frozenset(
    """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings
    tie_word_embeddings attention_bias mlp_bias sliding_window use_sliding_window max_window_layers layer_types
    hidden_act attention_dropout quantization_config pretraining_tp partial_rotary_factor
    """.split()  # noqa: SIM905
)
# ... and fields that say nothing about the logits.
HARMLESS_FIELDS = frozenset(
    """
    _name_or_path bos_token_id eos_token_id pad_token_id unk_token_id initializer_range torch_dtype dtype
    transformers_version use_cache tokenizer_class is_encoder_decoder return_dict output_attentions
    output_hidden_states chunk_size_feed_forward id2label label2id problem_type use_return_dict sep_token_id
    decoder_start_token_id task_specific_params model_max_length
    """.split()  # noqa: SIM905
)


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read a Hugging Face `config.json`.

    Raises:
        UserError: unknown architecture, or a field that may change the logits and is not known here.
    """
    family = _family(hf)
    _refuse_unknown(hf)
    try:
        hidden, heads, layers = hf["hidden_size"], hf["num_attention_heads"], hf["num_hidden_layers"]
        bias = bool(hf.get("attention_bias", False))
        return DecoderConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=hidden,
            intermediate_size=hf["intermediate_size"],
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or (128 if family == "qwen3" else hidden // heads),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope=_read_rope(hf),
            tied=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or (bias and family != "mistral"),
            o_bias=bias and family in ("llama", "qwen3"),
            mlp_bias=bool(hf.get("mlp_bias", False)) and family == "llama",
            qk_norm=family == "qwen3",
            windows=_read_windows(hf, family, layers),
        )
    except KeyError as error:
        raise UserError(f"config.json: the field {error} is missing") from None


def _family(hf: Mapping[str, Any]) -> str:
    names = hf.get("architectures") or []
    known = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    if not known and not names and hf.get("model_type") in ARCHITECTURES.values():
        known = [hf["model_type"]]
    if not known:
        raise UserError(
            f"config.json: architectures: {', '.join(names) or 'none'} is not supported: "
            f"there are {', '.join(ARCHITECTURES)}"
        )
    return known[0]


def _refuse_unknown(hf: Mapping[str, Any]) -> None:
    """Only what is understood may pass: every other field could change the logits."""
    expected = {"hidden_act": "silu", "pretraining_tp": 1, "partial_rotary_factor": 1.0}
    for name, wanted in expected.items():
        if hf.get(name, wanted) not in (wanted, None):
            raise UserError(f"config.json: {name}: {hf[name]!r} is not supported: only {wanted!r} is")
    if hf.get("attention_dropout"):
        raise UserError(f"config.json: attention_dropout: {hf['attention_dropout']} is not supported: set it to 0.0")
    if (quantized := hf.get("quantization_config")) and quantized.get("quant_method") != "bitsandbytes":
        raise UserError(
            "config.json: quantization_config: weights quantized by another tool than bitsandbytes are not supported: "
            "name the original model and set quantization.bits=4"
        )
    for name, value in hf.items():
        if name not in READ_FIELDS | HARMLESS_FIELDS and value is not None:
            raise UserError(
                f"config.json: {name}: {value!r} is a field that nanoft does not know and that may change the model: "
                "if it does not, remove it from config.json"
            )


def _read_rope(hf: Mapping[str, Any]) -> Rope:
    """Classic form: rope_theta + rope_scaling; current form: rope_parameters holds both."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"config.json: rope type {kind!r} is not supported: there are default, linear, llama3, yarn")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: rope: a partial_rotary_factor other than 1 is not supported")
    theta = hf.get("rope_theta") or scaling.get("rope_theta") or 10000.0
    parameters = dict(scaling)
    if kind == "yarn" and not parameters.get("original_max_position_embeddings"):
        parameters["original_max_position_embeddings"] = hf["max_position_embeddings"]
    needed = {"linear": ["factor"], "yarn": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
    for name in needed.get(kind, []):
        if name not in parameters:
            raise UserError(f"config.json: rope type {kind} needs the field {name}")
    return Rope(theta=float(theta), kind=kind, parameters=parameters)


def _read_windows(hf: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """Mistral: 4096 unless the field says otherwise. Qwen: only if asked, from max_window_layers on. Llama: never."""
    if family == "llama":
        return (None,) * layers
    if family == "mistral":
        return (hf.get("sliding_window", 4096),) * layers
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    if hf.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in hf["layer_types"])
    first = hf.get("max_window_layers", 28)
    return tuple(window if index >= first else None for index in range(layers))


# The most that a config.json may ask for: several times the largest model there is.
MOST = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 18, "intermediate_size": 1 << 20, "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "head_dim": 1 << 13,
}  # fmt: skip
WIDEST_WINDOW = 1 << 31


def read_shape(directory: Path) -> DecoderConfig:
    """The decoder's shape from the directory's config.json."""
    path = directory / "config.json"
    return parse_shape(read_json(path), path)


def parse_shape(stored: dict[str, Any], path: Path) -> DecoderConfig:
    """The decoder's shape from a parsed config.json; `path` is where it was read, for messages."""
    try:
        refuse_code(stored)
        _check_sizes(stored)
        config = decoder_config(stored)
        _check_shape(config)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('config.json: ')}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: a field is missing or of the wrong kind ({error}): fetch the file again") from None
    return config


def _check_sizes(stored: dict[str, Any]) -> None:
    """Sizes that no model has, found before anything of that size is made."""
    for name, most in MOST.items():
        value = stored.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise UserError(f"{name}: {value!r:.60} is not a whole number from 1 to {most:,}")


def _check_shape(config: DecoderConfig) -> None:
    """Values that no decoder can have, found before they fail deep inside one."""
    if config.num_heads % config.num_kv_heads or config.head_dim % 2 or config.head_dim < 1:
        raise UserError("the heads do not divide: num_attention_heads by num_key_value_heads, and head_dim by 2")
    if type(config.norm_eps) not in (int, float) or not 0 <= config.norm_eps < 1:
        raise UserError(f"rms_norm_eps: {config.norm_eps!r:.60} is not a small number")
    windows = [window for window in config.windows if window is not None]
    wrong = any(type(window) is not int or not 1 <= window <= WIDEST_WINDOW for window in windows)
    if wrong or len(config.windows) != config.num_layers:
        raise UserError(f"sliding_window, layer_types: not a window, or none, for each of {config.num_layers} layers")
    frequencies, factor = config.rope.angles(config.head_dim)
    if not frequencies.isfinite().all() or not math.isfinite(factor):
        raise UserError(f"rope: {config.rope.theta}, {dict(config.rope.parameters)!r:.200} give no finite angles")
