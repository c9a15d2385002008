"""Fields of a config.json that families share: types of values, each layer's attention window, and the rope."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nanoft import UserError
from nanoft.blocks.rope import Rope

Fields = Mapping[str, Any]  # of a config.json

# Fields that must be positive numbers if present; those of the second list cannot be null.
CAPS = "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping".split()  # noqa: SIM905
MULTIPLIERS = "embedding_multiplier residual_multiplier attention_multiplier logits_scaling".split()  # noqa: SIM905
YES_OR_NO = "tie_word_embeddings attention_bias attention_out_bias mlp_bias use_sliding_window".split()  # noqa: SIM905
# Fields of each rope type besides those of all types: required ones first, then optional ones.
ROPE_FIELDS = {
    "default": ("", ""),
    "linear": ("factor", ""),
    "proportional": ("", "factor"),
    "dynamic": ("factor", ""),
    "llama3": ("factor low_freq_factor high_freq_factor", ""),
    "yarn": (
        "factor",
        "beta_fast beta_slow mscale mscale_all_dim attention_factor truncate finetuned llama_4_scaling_beta "
        "max_position_embeddings",
    ),
    "longrope": ("short_factor long_factor", "factor attention_factor"),
}
KINDS = ("full_attention", "sliding_attention")  # of layers, in layer_types
MIXERS = {"full_attention": "attention", "linear_attention": "deltanet", "conv": "short_conv"}  # by layer_types
OLD_ROPES = {"su": "longrope"}  # other names of the types
# Of text, all three positions of Qwen's ropes for images are the same.
ALL_ROPES = """
    type rope_type rope_theta partial_rotary_factor original_max_position_embeddings mrope_section mrope_interleaved
""".split()  # noqa: SIM905


def is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def refuse_wrong_types(hf: Fields) -> None:
    """Refuse values that would otherwise fail, or give wrong results, only when the model runs."""
    for name in (*CAPS, *MULTIPLIERS, "original_max_position_embeddings"):
        value = hf.get(name, 1)
        if not is_positive(value) and (value is not None or name in MULTIPLIERS):
            raise UserError(f"{name}: {value!r:.60} is not a positive number")
    for name in YES_OR_NO:
        if hf.get(name) not in (True, False, None):
            raise UserError(f"{name}: {hf[name]!r:.60} is neither true nor false")


def read_rope(hf: Fields, scaling: Fields | None = None) -> Rope:
    """Classic form: rope_theta and rope_scaling; current form: rope_parameters has both, and its theta wins."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {} if scaling is None else scaling
    if not isinstance(scaling, Mapping):
        raise UserError(f"rope_parameters: {scaling!r:.60} is not an object with a rope type and its fields")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    kind = OLD_ROPES.get(str(kind), kind)
    if kind not in list(ROPE_FIELDS):
        raise UserError(f"rope type {kind!r} is not supported: the supported ones are {', '.join(ROPE_FIELDS)}")
    needed, other = (names.split() for names in ROPE_FIELDS[kind])
    if missing := [name for name in needed if name not in scaling]:
        raise UserError(f"rope type {kind} needs the field {missing[0]}")
    if unknown := [name for name, value in scaling.items() if value and name not in [*ALL_ROPES, *needed, *other]]:
        value = scaling[unknown[0]]
        raise UserError(f"rope: {unknown[0]}: {value!r:.60} has no effect with type {kind}: remove it")
    for name in (*needed, *other):
        value, of_pairs = scaling.get(name), name in ("short_factor", "long_factor")
        numbers = value if of_pairs and isinstance(value, list) else [value]
        if (of_pairs and numbers is not value) or not all(n is None or isinstance(n, (int, float)) for n in numbers):
            raise UserError(f"rope: {name}: {value!r:.60} is not {'a list of numbers' if of_pairs else 'a number'}")
    given = [value for value in (scaling.get("rope_theta"), hf.get("rope_theta")) if value is not None]
    if wrong := [theta for theta in given if not is_positive(theta) or theta > 1e30]:
        raise UserError(f"rope_theta: {wrong[0]!r:.60} is not a positive number")
    theta, parameters, longest = (given or [10000.0])[0], dict(scaling), hf.get("max_position_embeddings") or 0
    outer, inner = hf.get("original_max_position_embeddings"), scaling.get("original_max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = outer or inner or longest
    context = longest if kind == "dynamic" else int(outer or inner or longest) if kind == "longrope" else 0
    if kind == "longrope" and context < 2:
        raise UserError(f"original_max_position_embeddings: {context} is not a context length of pre-training")
    if kind == "longrope" and scaling.get("attention_factor") is None:
        factor = longest / context if outer else scaling.get("factor") or longest / context
        parameters["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    shares = (scaling.get("partial_rotary_factor"), hf.get("partial_rotary_factor"))
    share = next((value for value in shares if value is not None), 1.0)
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise UserError(f"partial_rotary_factor: {share!r:.60} is not between 0 and 1")
    if kind == "proportional":  # of pairs, among those of the whole head
        parameters["partial_rotary_factor"], share = share, 1.0
    growth = float(scaling.get("llama_4_scaling_beta") or 0)
    context = int(parameters["original_max_position_embeddings"]) if growth else context
    return Rope(float(theta), kind, parameters, context, float(share), growth)


def current_form(rope: Rope) -> dict[str, Any]:
    """The entry of rope_parameters."""
    parameters = {key: value for key, value in rope.parameters.items() if key != "type"}
    share = {} if rope.share == 1 else {"partial_rotary_factor": rope.share}
    return {**parameters, **share, "rope_type": rope.kind, "rope_theta": rope.theta}


def read_windows(hf: Fields, window: int | None, first: int = 0) -> tuple[int | None, ...]:
    """The window of each layer: according to layer_types, or without that field from layer `first` on."""
    by_type = dict(zip(KINDS, (None, window), strict=True))
    kinds = hf.get("layer_types")
    if not kinds:
        return tuple(window if index >= first else None for index in range(hf["num_hidden_layers"]))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"layer_types: {unknown[0]!r:.60} is not supported: only {', '.join(by_type)}")
    return tuple(by_type[kind] for kind in kinds)


def read_mixers(hf: Fields, other: str, is_full: Sequence[bool]) -> tuple[str, ...]:
    """What mixes positions in each layer, by layer_types: attention or that of the `other` kind."""
    known = (KINDS[0], other)
    kinds = hf.get("layer_types") or [KINDS[0] if full else other for full in is_full]
    if unknown := [kind for kind in kinds if kind not in known]:
        raise UserError(f"layer_types: {unknown[0]!r:.60} is not supported: only {', '.join(known)}")
    return tuple(MIXERS[kind] for kind in kinds)


def window_but_every(n: int, hf: Fields, window: int) -> tuple[int | None, ...]:
    """The window of each layer but every n-th, unless layer_types says otherwise."""
    window = hf.get("sliding_window") or window
    if hf.get("layer_types"):
        return read_windows(hf, window)
    if not is_positive(n):
        raise UserError(f"sliding_window_pattern: {n!r:.60} is not a number of layers: give layer_types")
    return tuple(None if (layer + 1) % n == 0 else window for layer in range(hf["num_hidden_layers"]))


def read_ropes(hf: Fields, windows: tuple[int | None, ...], local: Fields) -> tuple[Rope, ...]:
    """The rope of each layer by its kind; in older files, rope_parameters has only one, and layers with a window use
    `local`."""
    both = hf.get("rope_parameters") or {}
    if "full_attention" in both:
        if "sliding_attention" not in both:
            raise UserError("rope_parameters: sliding_attention: missing")
        full, sliding = (read_rope({**hf, "rope_theta": None}, both[kind]) for kind in KINDS)
    else:
        full, sliding = read_rope(hf), read_rope({}, local)
    return tuple(full if window is None else sliding for window in windows)


def rope_in_some(rope: Rope, has_rope: Sequence[Any]) -> tuple[Rope | None, ...]:
    """The rope of each layer, None for layers that do not rotate; at least one must."""
    if not any(has_rope) or any(own not in (0, 1) for own in has_rope):
        raise UserError(f"no_rope_layers, layer_types: {has_rope!r:.60}: at least one layer must rotate (1), others 0")
    return tuple(rope if own else None for own in has_rope)
