"""The graphs of llama.cpp's architectures, and the metadata that describes a model to them.

A graph of llama.cpp is compiled code with a few parameters. A model that needs anything else is refused here: its file
would load, but llama.cpp would compute something different.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanoft import UserError
from nanoft.blocks.deltanet import DeltaNetSizes
from nanoft.model import DecoderConfig
from nanoft.models.families import FAMILIES, main_rope, standard_fields

Rule = tuple[str, Callable[[DecoderConfig], bool]]  # the message about a requirement of llama.cpp; whether it holds


def _period(c: DecoderConfig) -> int | None:
    """n > 1 if every n-th layer attends to everything and the others share one window; otherwise None."""
    n, window = c.windows.index(None) + 1 if None in c.windows else 1, c.windows[0]
    expected = tuple(window if layer % n else None for layer in range(1, c.num_layers + 1))
    return n if n > 1 and c.windows == expected else None


def _turns(p: Mapping[str, Any]) -> tuple[float, float, bool]:
    """Where YaRN blends, and whether the limits are rounded to whole dimensions."""
    return p.get("beta_fast") or 32, p.get("beta_slow") or 1, bool(p.get("truncate", True))


def _gemma_scale(largest: int) -> Rule:
    """1 / sqrt(head_dim), but 1 / sqrt(hidden_size / num_heads) for the model with `largest` layers."""

    def holds(c: DecoderConfig) -> bool:
        size = c.hidden_size // c.num_heads if c.num_layers == largest else c.head_dim
        return math.isclose(c.attention_scale or 0, size**-0.5)

    return "query_pre_attn_scalar: {} computes it from the sizes", holds


SQUARE: Rule = (
    "head_dim: {} requires hidden_size / num_attention_heads",
    lambda c: c.num_heads * c.head_dim == c.hidden_size,
)
NO_BIASES: Rule = ("attention_bias: {} has no biases", lambda c: not (c.qkv_bias or c.o_bias))
QKV_BIASES: Rule = ("attention_out_bias, mlp_bias: {} has no such biases", lambda c: not (c.o_bias or c.mlp_bias))
TIED: Rule = ("tie_word_embeddings: {} has no separate head", lambda c: c.tied)
UNTIED: Rule = ("tie_word_embeddings: {} needs a separate head", lambda c: not c.tied)
CAPS: Rule = ("attn_logit_softcapping: {} always has both caps", lambda c: bool(c.attention_cap and c.logit_cap))
NO_CAPS: Rule = ("attn_logit_softcapping: {} has no caps", lambda c: not (c.attention_cap or c.logit_cap))
PERIODIC: Rule = (
    "layer_types: {} supports only full attention in every n-th layer and one window in the others",
    lambda c: set(c.windows) == {None} or _period(c) is not None,
)
WINDOWS: Rule = ("sliding_window: {} requires layers with a window", lambda c: set(c.windows) != {None})
OF_32B: Rule = (
    "sliding_window: {} has a window of 4096 in three of four layers if there are 64, otherwise none",
    lambda c: c.windows == ((4096,) * 3 + (None,)) * 16 if c.num_layers == 64 else set(c.windows) == {None},
)
LOCAL_ROPE: Rule = (
    "rope_parameters: {} does not scale positions in layers with a window",
    lambda c: all(rope and rope.kind == "default" for rope, w in zip(c.ropes, c.windows, strict=True) if w),
)
ONE_THETA: Rule = ("rope_theta: {} has one value for all layers", lambda c: len({r.theta for r in c.ropes if r}) == 1)
ALL_ROTATE: Rule = ("no_rope_layers: {} rotates in all layers", lambda c: None not in c.ropes)
ALL_OR_NONE: Rule = ("no_rope_layers: {} rotates in all layers or in none", lambda c: len({*map(bool, c.ropes)}) == 1)
FOURTH_NOT: Rule = (
    "no_rope_layers: {} rotates in all layers but every fourth",
    lambda c: all((rope is None) == (layer % 4 == 0) for layer, rope in enumerate(c.ropes, start=1)),
)
WHOLE_HEAD: Rule = ("partial_rotary_factor: {} rotates whole heads", lambda c: main_rope(c).share == 1)
NO_GROWTH: Rule = ("llama_4_scaling_beta: {} does not scale queries", lambda c: not main_rope(c).query_growth)
# llama.cpp also has other variants of YaRN, but not in all architectures.
YARN: Rule = (
    "rope type yarn: {} supports only beta_fast 32, beta_slow 1 and truncate",
    lambda c: main_rope(c).kind != "yarn" or _turns(main_rope(c).parameters) == (32, 1, True),
)
# Without `truncate`, llama.cpp blends otherwise: see `_add_rope`.
YARN_TURNS: Rule = (
    "rope type yarn: {} supports only beta_fast 32 and beta_slow 1",
    lambda c: main_rope(c).kind != "yarn" or _turns(main_rope(c).parameters)[:2] == (32, 1),
)
EVERY_SECOND: Rule = ("layer_types: {} has a window in every second layer", lambda c: _period(c) == 2)
ALL_BIASES: Rule = ("attention_bias: {} has biases", lambda c: c.qkv_bias)
ALL_EXPERTS: Rule = (
    "mlp_only_layers, decoder_sparse_step: {} has experts in all layers",
    lambda c: c.routing is not None and all(c.routing.layers),
)
OVER_CHOSEN: Rule = (
    "norm_topk_prob: {} weights the chosen experts alone",
    lambda c: c.routing is None or c.routing.over_chosen,
)
SQUARE_STATE: Rule = (
    "linear_value_head_dim: {} requires linear_key_head_dim",
    lambda c: c.delta is None or c.delta.value_dim == c.delta.key_dim,
)
USUAL = (ALL_ROTATE, WHOLE_HEAD, NO_GROWTH, YARN)
GEMMA = (*USUAL, NO_BIASES, TIED, PERIODIC, WINDOWS)


@dataclass(frozen=True)
class Graph:
    """An architecture of llama.cpp."""

    requires: tuple[Rule, ...] = USUAL
    ropes: tuple[str, ...] = ("default", "dynamic", "linear", "yarn")  # types; dynamic is default within the context
    pairs: bool = False  # it rotates neighbors (x0, x1), (x2, x3), ... instead of (x0, x_{d/2}), ...
    windows: bool = False  # it supports layers with a window; if not, the context is limited to the window
    fused: bool = False  # gate and up are one tensor if they are one in the model
    scales: Mapping[str, Callable[[DecoderConfig], Any]] = field(default_factory=dict)  # metadata of its own


WITH_LLAMA3 = (*Graph.ropes, "llama3")
GRANITE: dict[str, Callable[[DecoderConfig], Any]] = {
    "embedding_scale": lambda c: c.embedding_scale,
    "residual_scale": lambda c: c.residual_scale,
    "attention.scale": lambda c: c.attention_scale,
    "logit_scale": lambda c: 1 / c.logit_scale,
}
SOFT_CAPS: dict[str, Callable[[DecoderConfig], Any]] = {
    "attn_logit_softcapping": lambda c: c.attention_cap,
    "final_logit_softcapping": lambda c: c.logit_cap,
}
FINAL_CAP: dict[str, Callable[[DecoderConfig], Any]] = {"final_logit_softcapping": lambda c: c.logit_cap or 0.0}
GROWTH: dict[str, Callable[[DecoderConfig], Any]] = {"attention.temperature_scale": lambda c: main_rope(c).query_growth}
GRAPHS: dict[str, Graph] = {  # by llama.cpp's names, those in FAMILIES
    "llama": Graph(ropes=WITH_LLAMA3, pairs=True),
    "qwen2": Graph((*USUAL, SQUARE)),
    "qwen3": Graph((*USUAL, NO_BIASES)),
    "qwen3moe": Graph((*USUAL, NO_BIASES, ALL_EXPERTS, OVER_CHOSEN)),
    "qwen35": Graph((ALL_ROTATE, NO_GROWTH, YARN, NO_BIASES, SQUARE_STATE)),
    "lfm2": Graph((*USUAL, NO_BIASES)),
    "gemma2": Graph((*GEMMA, CAPS, _gemma_scale(46)), windows=True, scales=SOFT_CAPS),
    "gemma3": Graph((*GEMMA, NO_CAPS, LOCAL_ROPE, _gemma_scale(62)), ("default", "linear"), windows=True),
    "gemma4": Graph((*GEMMA, LOCAL_ROPE), ("default", "proportional"), windows=True, fused=True, scales=FINAL_CAP),
    "phi3": Graph((ALL_ROTATE, NO_GROWTH, SQUARE), ("default", "longrope"), fused=True),
    "olmo2": Graph((*USUAL, NO_BIASES, UNTIED, SQUARE, PERIODIC, LOCAL_ROPE, ONE_THETA), windows=True),
    "exaone4": Graph((WHOLE_HEAD, NO_GROWTH, YARN, OF_32B), WITH_LLAMA3, windows=True),
    "smollm3": Graph((FOURTH_NOT, WHOLE_HEAD, NO_GROWTH, YARN), pairs=True),
    "granite": Graph((ALL_OR_NONE, WHOLE_HEAD, NO_GROWTH, YARN), WITH_LLAMA3, pairs=True, scales=GRANITE),
    "seed_oss": Graph((*USUAL, QKV_BIASES)),
    "gpt2": Graph(()),
    "gpt-oss": Graph((ALL_ROTATE, WHOLE_HEAD, NO_GROWTH, YARN_TURNS, ALL_BIASES, UNTIED, EVERY_SECOND), windows=True),
    "gptneox": Graph((NO_GROWTH, ALL_BIASES, UNTIED), ("default", "dynamic")),
    "mistral3": Graph((ALL_ROTATE, WHOLE_HEAD, YARN), pairs=True, scales=GROWTH),
}


def architecture(config: DecoderConfig) -> str:
    """llama.cpp's name of the architecture; a UserError if it lacks the family or a feature that the model uses."""
    name, missing = FAMILIES[config.family].gguf, f"llama.cpp has no architecture for {config.family}"
    if name is not None:
        graph, whose = GRAPHS[name], f"llama.cpp's {name}"
        broken = [text.format(whose) for text, holds in graph.requires if not holds(config)]
        if main_rope(config).kind not in graph.ropes:
            broken.append(f"rope type {main_rope(config).kind}: {whose} does not support it")
        if not broken:
            return name
        missing = broken[0]
    raise UserError(f"--format gguf: {missing}: use --format hf")


def add_shape(writer: Any, c: DecoderConfig, hf: dict[str, Any]) -> list[str]:
    """Add the metadata of the model, without its tokenizer; return notes."""
    writer.add_block_count(c.num_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(_of_layers(c, "intermediate_size"))
    writer.add_head_count(c.num_heads)
    attends = [c.mixer(layer) == "attention" for layer in range(c.num_layers)]
    heads = _of_layers(c, "num_kv_heads")
    writer.add_head_count_kv([heads * one for one in attends] if "short_conv" in c.mixers else heads)
    writer.add_key_length(c.by_layer[-1].head_dim)
    writer.add_value_length(c.by_layer[-1].head_dim)
    (writer.add_layer_norm_eps if c.norm == "layer" else writer.add_layer_norm_rms_eps)(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    graph = GRAPHS[writer.arch]
    for key, value in graph.scales.items():
        writer.add_float32(f"{writer.arch}.{key}", float(value(c)))
    if writer.arch == "gptneox":
        writer.add_parallel_residual(c.parallel)
    if writer.arch == "lfm2":
        writer.add_shortconv_l_cache(c.conv_kernel)
    if c.delta is not None:
        writer.add_array(f"{writer.arch}.attention.recurrent_layers", [not one for one in attends])
        _add_deltanet(writer, c, c.delta)
    if c.routing is not None:
        writer.add_expert_count(c.routing.experts)
        writer.add_expert_used_count(c.routing.chosen)
        writer.add_expert_feed_forward_length(c.routing.width)
    if writer.arch == "gemma4":
        for add in (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa):
            add(c.head_dim)
        writer.add_shared_kv_layers(sum("source" in own for own in c.layers))
        writer.add_embedding_length_per_layer_input(c.per_layer_size)
    notes = _add_rope(writer, c) if c.distinct_ropes else []
    if writer.arch == "granite":
        writer.add_rope_scaling_finetuned(bool(c.distinct_ropes))  # its name for: rotates at all
    length = int(standard_fields(hf).get("max_position_embeddings") or 4096)
    windows = [window for window in c.windows if window is not None]
    if graph.windows and windows:
        writer.add_sliding_window(windows[0])
        writer.add_sliding_window_pattern([w is not None for w in c.windows] if c.layers else _period(c))
        writer.add_rope_freq_base_swa(
            next(rope.theta for rope, w in zip(c.ropes, c.windows, strict=True) if rope and w)
        )
    elif windows and min(windows) < length:
        length = min(windows)
        notes.append(
            f"llama.cpp has no sliding window for this architecture: the file limits the context to {length} tokens, "
            "so that the window has no effect"
        )
    if not graph.windows and len(set(c.windows)) == 1 and windows:
        writer.add_sliding_window(windows[0])
    writer.add_context_length(length)
    return notes


def _add_deltanet(writer: Any, c: DecoderConfig, sizes: DeltaNetSizes) -> None:
    writer.add_ssm_conv_kernel(c.conv_kernel)
    writer.add_ssm_state_size(sizes.key_dim)
    writer.add_ssm_group_count(sizes.key_heads)
    writer.add_ssm_time_step_rank(sizes.value_heads)
    writer.add_ssm_inner_size(sizes.value_heads * sizes.value_dim)
    pairs = int(c.head_dim * main_rope(c).share) // 2
    writer.add_rope_dimension_sections([(pairs + 2 - axis) // 3 for axis in range(3)] + [0])  # of text all axes agree


def _of_layers(c: DecoderConfig, name: str) -> Any:
    """A size, if all layers have the same; else that of each."""
    sizes = [getattr(layer, name) for layer in c.by_layer]
    return sizes if len({*sizes}) > 1 else sizes[0]


def _add_rope(writer: Any, c: DecoderConfig) -> list[str]:
    """Add the metadata of the rope, except for `rope_tensors`; return notes."""
    rope = main_rope(c)
    writer.add_rope_dimension_count(int((rope.head_dim or c.head_dim) * rope.share))
    writer.add_rope_freq_base(rope.theta)
    if rope.kind in ("linear", "yarn"):
        writer.add_string(f"{writer.arch}.rope.scaling.type", rope.kind)
        writer.add_rope_scaling_factor(float(rope.parameters["factor"]))
    if rope.kind in ("yarn", "longrope") or rope.query_growth:
        writer.add_rope_scaling_orig_ctx_len(int(rope.parameters["original_max_position_embeddings"]))
    if rope.kind in ("yarn", "longrope"):
        factor = rope.angles(c.head_dim)[1]  # llama.cpp's yarn also multiplies by its own factor
        own = 0.1 * math.log(rope.parameters["factor"]) + 1.0 if rope.kind == "yarn" else 1.0
        writer.add_rope_scaling_attn_factors(factor / own)
    if rope.kind == "yarn" and not _turns(rope.parameters)[2]:
        rounded = replace(rope, parameters={**rope.parameters, "truncate": True})
        change = float((rounded.angles(c.head_dim)[0] / rope.angles(c.head_dim)[0] - 1).abs().max())
        return [f"rope type yarn: llama.cpp rounds its limits (truncate): frequencies change by up to {change:.0%}"]
    if rope.kind != "longrope":
        return []
    return [f"rope type longrope: llama.cpp uses the long factors if its context (-c) exceeds {rope.context} tokens"]


def rope_tensors(c: DecoderConfig) -> dict[str, Tensor]:
    """The divisors of the angular frequencies by GGUF's names, if llama.cpp does not compute them: (rotated / 2,)."""
    rope = main_rope(c)
    if rope.kind == "longrope":
        return {f"rope_factors_{n}.weight": torch.tensor(rope.parameters[f"{n}_factor"]) for n in ("long", "short")}
    if rope.kind not in ("llama3", "proportional"):
        return {}
    size = rope.head_dim or c.head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    divisors = rope.theta**-exponents / rope.angles(size)[0]
    return {"rope_freqs.weight": divisors.clamp(max=1e30)}  # of pairs that do not turn: infinity


def stacked_name(name: str) -> str:
    """The name of an expert's tensor with {} in the place of the expert's number."""
    return re.sub(r"(\.experts\.)\d+\.", r"\1{}.", name)


def to_llama_cpp(tensor: Tensor, name: str, config: DecoderConfig, back: bool = False) -> Tensor:
    """Convert a tensor of Hugging Face files, (heads * head_dim, ...), to llama.cpp's convention, or back.

    Weights of norms include their offset. Within each head, the rows of q and k change from (first half, second half)
    to pairs of neighbors if the graph rotates these. Interleaved q, k, v become all q, all k, all v; so do gate and up.
    """
    if tensor.dim() == 3 or (back and re.search(r"\.conv(1d|\.conv)\.", name)):  # a convolution of each channel
        tensor = tensor[:, None] if back else tensor[:, 0]
    if ".linear_attn." in name and config.delta:
        return _deltanet(tensor, name, config.delta, back)
    if config.qkv == "interleaved" and ".qkv_proj." in name:
        sizes = (3, config.num_heads) if back else (config.num_heads, 3)
        return tensor.unflatten(0, (*sizes, config.head_dim)).transpose(0, 1).flatten(0, 2)
    if config.mlp == "interleaved" and ".gate_up_proj." in name:
        return tensor.unflatten(0, (2, -1) if back else (-1, 2)).transpose(0, 1).flatten(0, 1)
    if config.norm_offset and name.endswith("norm.weight"):
        return tensor + (-config.norm_offset if back else config.norm_offset)
    is_rotated = ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
    if not is_rotated or not GRAPHS[architecture(config)].pairs:
        return tensor
    halves = (config.head_dim // 2, 2) if back else (2, config.head_dim // 2)
    return tensor.unflatten(0, (-1, *halves)).transpose(1, 2).flatten(0, 2)


def _deltanet(tensor: Tensor, name: str, sizes: DeltaNetSizes, back: bool) -> Tensor:
    """The value heads of each key head, which lie together, in turns, as llama.cpp repeats keys; -exp(A_log)."""
    if name.endswith("norm.weight"):
        return tensor
    if name.endswith("A_log"):
        tensor = (-tensor).log() if back else -tensor.exp()
    copies, dim = sizes.value_heads // sizes.key_heads, int(".out_proj." in name)
    heads = (copies, sizes.key_heads) if back else (sizes.key_heads, copies)
    keys = 2 * sizes.key_heads * sizes.key_dim if "qkv" in name or "conv1d" in name else 0  # rows of queries and keys
    values = tensor[keys:].unflatten(dim, (*heads, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)
    return torch.cat((tensor[:keys], values))
