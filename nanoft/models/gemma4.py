"""Gemma 4's config.json: layers of two kinds with heads of different sizes, and layers without keys of their own.

Layers with a window and those without have heads of their own sizes; in the larger models the values of the latter are
their keys. In the smaller models the last layers attend to the keys and values of the last layer of their kind that
has some, their MLPs may be twice as wide, and every layer reads the token once more (nanoft/blocks/per_layer.py).
26B-A4B has experts beside the MLP of each layer (nanoft/blocks/moe.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nanoft import UserError
from nanoft.models.expert_families import read_routing
from nanoft.models.layer_fields import KINDS, Fields, read_ropes, window_but_every

FIELDS = """
    attention_bias final_logit_softcapping sliding_window layer_types global_head_dim num_global_key_value_heads
    per_layer_config attention_k_eq_v num_kv_shared_layers use_double_wide_mlp hidden_size_per_layer_input
    vocab_size_per_layer_input enable_moe_block num_experts top_k_experts moe_intermediate_size
    """.split()  # noqa: SIM905
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": ("vision",),  # between the positions of an image
}
# Parts of names in files of layers with experts, and their names in the decoder.
BESIDE_MLP = (
    ("mlp", "mlp.dense"), ("router", "mlp.sparse.router"), ("experts", "mlp.sparse.experts"),
    *((norm, f"mlp.{norm}") for norm in ("pre_feedforward_layernorm", "pre_feedforward_layernorm_2",
      "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")),
)  # fmt: skip
ROPES: dict[str, Any] = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def read(hf: Fields, window: int, size: int) -> dict[str, Any]:
    """The switches; sliding_window and hidden_size_per_layer_input are `window` and `size` if they are missing."""
    size, vocabulary = hf.get("hidden_size_per_layer_input", size), hf.get("vocab_size_per_layer_input", 262_144)
    if size and vocabulary != hf["vocab_size"]:
        raise UserError(f"vocab_size_per_layer_input: {vocabulary} is not vocab_size, {hf['vocab_size']}")
    windows = (*window_but_every(6, hf, window)[:-1], None)  # the last layer sees everything
    layers = read_layers(hf, windows)
    ropes = read_ropes({**hf, "rope_parameters": hf.get("rope_parameters") or ROPES}, windows, {})
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


def read_layers(hf: Fields, windows: tuple[int | None, ...]) -> tuple[dict[str, Any], ...]:
    """In what each layer differs: sizes, what its values are, and whose keys and values it attends to."""
    shared, full, layers = hf.get("num_kv_shared_layers") or 0, _full_sizes(hf, windows), []
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


def _full_sizes(hf: Fields, windows: tuple[int | None, ...]) -> dict[str, Any]:
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
