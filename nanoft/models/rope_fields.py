"""How a config.json says how positions become angles: in the classic form, in the current one, in part or twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nanoft import UserError
from nanoft.blocks.rope import Rope

Fields = Mapping[str, Any]  # of a config.json

# Fields of each type of rope besides those of all types: first the ones that it needs, then the others.
ROPE_FIELDS = {
    "default": ("", ""),
    "linear": ("factor", ""),
    "dynamic": ("factor", ""),
    "llama3": ("factor low_freq_factor high_freq_factor", ""),
    "yarn": (
        "factor",
        "beta_fast beta_slow mscale mscale_all_dim attention_factor truncate finetuned llama_4_scaling_beta "
        "max_position_embeddings",
    ),
    "longrope": ("short_factor long_factor", "factor attention_factor"),
}
OLD_ROPES = {"su": "longrope"}  # other names of the types
ALL_ROPES = "type rope_type rope_theta partial_rotary_factor original_max_position_embeddings".split()  # noqa: SIM905


def read_rope(hf: Fields, scaling: Fields | None = None) -> Rope:
    """Classic form: rope_theta and rope_scaling; current form: rope_parameters has both, and its theta counts."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {} if scaling is None else scaling
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    kind = OLD_ROPES.get(kind, kind)
    if kind not in ROPE_FIELDS:
        raise UserError(f"rope type {kind!r} is not supported: the supported ones are {', '.join(ROPE_FIELDS)}")
    needed, other = (names.split() for names in ROPE_FIELDS[kind])
    if missing := [name for name in needed if name not in scaling]:
        raise UserError(f"rope type {kind} needs the field {missing[0]}")
    if unknown := [name for name, value in scaling.items() if value and name not in [*ALL_ROPES, *needed, *other]]:
        value = scaling[unknown[0]]
        raise UserError(f"rope: {unknown[0]}: {value!r:.60} has no effect with type {kind}: remove it")
    given = [value for value in (scaling.get("rope_theta"), hf.get("rope_theta")) if value is not None]
    if wrong := [theta for theta in given if type(theta) not in (int, float) or not 0 < theta < 1e30]:
        raise UserError(f"rope_theta: {wrong[0]!r:.60} is not a positive number")
    theta, parameters, longest = (given or [10000.0])[0], dict(scaling), hf.get("max_position_embeddings") or 0
    outer, inner = hf.get("original_max_position_embeddings"), scaling.get("original_max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = outer or inner or longest
    context = longest if kind == "dynamic" else int(outer or inner or longest) if kind == "longrope" else 0
    if kind == "longrope" and scaling.get("attention_factor") is None:
        factor = longest / context if outer else scaling.get("factor") or longest / context
        parameters["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    shares = (scaling.get("partial_rotary_factor"), hf.get("partial_rotary_factor"))
    share = next((value for value in shares if value is not None), 1.0)
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise UserError(f"partial_rotary_factor: {share!r:.60} is not a share between 0 and 1")
    growth = float(scaling.get("llama_4_scaling_beta") or 0)
    context = int(parameters["original_max_position_embeddings"]) if growth else context
    return Rope(float(theta), kind, parameters, context, float(share), growth)


def current_form(rope: Rope) -> dict[str, Any]:
    """The entry of rope_parameters."""
    parameters = {key: value for key, value in rope.parameters.items() if key != "type"}
    share = {} if rope.share == 1 else {"partial_rotary_factor": rope.share}
    return {**parameters, **share, "rope_type": rope.kind, "rope_theta": rope.theta}
