"""The decoder: token ids in, hidden states out.

One class serves many families (nanoft/models/families.py), because they differ only in a few switches: a bias on some
projections, a norm on queries and keys or on a block's outputs, a sliding window, a few factors.

    x = embedding[ids]
    in every block:  x = x + attention(norm(x)),  x = x + mlp(norm(x))
    hidden = norm(x),  logits = hidden @ head^T

Every equation is written here once, for training, evaluation and generation. Everything that depends on positions is in
the context of a forward pass (attention.py); kernels/ has optimized forms of the same equations. Module names equal the
names of the tensors in most Hugging Face files; the families have a table for the others.

Notation in comments: b batch, q positions, h query heads, g key/value heads, d head size, n target positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft.attention import Documents, Rotation, Scores, SequenceContext, soft_cap
from nanoft.blocks import per_layer
from nanoft.blocks.deltanet import DeltaNetSizes, GatedDeltaNet
from nanoft.blocks.moe import Routing, feed_forward
from nanoft.blocks.norms import NORM_KINDS, RMSNorm
from nanoft.blocks.rope import Rope, document_lengths
from nanoft.blocks.short_conv import ShortConv
from nanoft.blocks.trained import Adapter
from nanoft.recompute import ActivationPolicy, run_block


@dataclass(frozen=True)
class DecoderConfig:
    """The switches and sizes of a decoder, which nanoft/models/families.py reads from a config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    ropes: tuple[Rope | None, ...]  # per layer; None: no rotation
    tied: bool  # the head is the embedding
    windows: tuple[int | None, ...]  # per layer: number of last positions that a position sees; None: all
    family: str  # its entry in FAMILIES (nanoft/models/families.py)
    has_score: bool = False  # a reward model: one number for each position instead of logits
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qkv: str = "separate"  # linears; rows of one: q, then k, then v, "fused" (Phi-3), or so in each head, "interleaved"
    mlp: str = "gated"  # of MLP_INPUTS
    routing: Routing | None = None  # of layers with experts
    activation: str = "silu"  # of ACTIVATIONS
    mlp_limit: float | None = None  # c: g sigmoid(1.702 g) (1 + clamp(up, -c, c)), g = min(gate, c) (gpt-oss)
    norm: str = "rms"  # of NORM_KINDS
    norms: str = "input"  # of NORMS: of what a block computes with, or of what it adds to x, or both
    parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x)): both halves see the same x (GPT-NeoX)
    norm_offset: float = 0.0  # norms multiply by offset + weight (Gemma: 1)
    qk_norm: str = ""  # norm of queries and keys: over each "head" (Qwen3), over all heads, the "width" (OLMo 2)
    v_norm: bool = False  # v / rms(v), without a weight (Gemma 4)
    keys_are_values: bool = False  # v is what k is before its norm and rotation (Gemma 4)
    source: int | None = None  # the earlier block whose keys and values a block attends to; None: it has its own
    gated_attention: bool = False  # y sigmoid(gate); q_proj has the gate's rows after those of each head (Qwen3.5)
    attention_scale: float | None = None  # of q k^T; None: 1 / sqrt(head_dim)
    attention_cap: float | None = None  # scores s become cap tanh(s / cap) (Gemma 2)
    sinks: bool = False  # the softmax has one more term for each head, which adds to no value (gpt-oss)
    embedding_scale: float = 1.0  # x = scale * embedding[ids]
    positions: int = 0  # how many are learned: x = embedding[ids] + embedding'[positions] (GPT-2)
    residual_scale: float = 1.0  # x + scale * attention(norm(x)) (Granite)
    logit_scale: float = 1.0  # logits = scale * hidden @ head^T
    logit_cap: float | None = None  # logits l become cap tanh(l / cap)
    per_layer_size: int = 0  # of what each block reads of a token: nanoft/blocks/per_layer.py
    layer_scalar: bool = False  # a number times the output of each block (Gemma 4)
    layers: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)  # of each block, the fields that differ
    mixers: tuple[str, ...] = ()  # of MIXERS, per layer; none: attention everywhere
    conv_kernel: int = 0  # positions that a convolution sees, its own among them
    delta: DeltaNetSizes | None = None  # of layers with the mixer "deltanet"
    wrapped: bool = False  # text is one tower of a larger model

    @property
    def by_layer(self) -> list[DecoderConfig]:
        """The config of each block."""
        return [replace(self, **own) for own in self.layers] or [self] * self.num_layers

    @property
    def distinct_ropes(self) -> list[Rope]:
        """The ropes of all layers, first that of the layers with the widest view."""
        by_window = sorted(zip(self.windows, self.ropes, strict=True), key=lambda pair: pair[0] is not None)
        found: list[Rope] = []
        for _, rope in by_window:
            found += [rope] if rope is not None and rope not in found else []
        return found

    def mixer(self, layer: int) -> str:
        return self.mixers[layer] if self.mixers else "attention"

    def make_norm(self, size: int) -> RMSNorm:
        return NORM_KINDS[self.norm](size, self.norm_eps, self.norm_offset)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
ACTIVATIONS["gelu_tanh"] = partial(F.gelu, approximate="tanh")
# The linears of an MLP's input; "fused": gate and up are rows of one linear, gate first (Phi-3); "interleaved": they
# alternate (gpt-oss).
MLP_INPUTS = {"gated": ("gate_proj", "up_proj"), "fused": ("gate_up_proj",), "plain": ("up_proj",)}
MLP_INPUTS["interleaved"] = MLP_INPUTS["fused"]
# The norms of a block, by their names in files: before attention, after it, before the MLP, after it.
NORMS: dict[str, tuple[str, str, str, str]] = {
    "input": ("input_layernorm", "", "post_attention_layernorm", ""),
    "output": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "both": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
}  # fmt: skip
NORMS["both but mlp"] = (*NORMS["both"][:2], "", NORMS["both"][3])  # before the MLP in there: MLPAndExperts


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with fewer key/value heads than query heads (Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        c = config
        self.index, self.head_dim, rope = layer, c.head_dim, c.ropes[layer]
        self.source, self.keys_are_values = layer if c.source is None else c.source, c.keys_are_values
        names = [("keys", self.source), ("values", self.source)]  # in a context, of what blocks share
        self.takes = names if self.source != layer else []
        self.gives = names if any(own.get("source") == layer for own in c.layers) else []
        self.rope = None if rope is None else c.distinct_ropes.index(rope)
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        self.scores = Scores(scale, c.windows[layer], c.attention_cap, c.sinks)
        self.sinks: Tensor | None = nn.Parameter(torch.zeros(c.num_heads)) if c.sinks else None
        self.widths = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
        separate, self.interleaved = c.qkv == "separate", c.qkv == "interleaved"
        self.inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj") if separate else ("qkv_proj",)
        self.gated, own = c.gated_attention, [self.widths[0] * (1 + c.gated_attention), *self.widths[1:]]
        self.inputs = self.inputs[: 1 if self.takes else 2 if c.keys_are_values else 3]
        for name, width in zip(self.inputs, own if separate else [sum(self.widths)], strict=False):
            self.add_module(name, nn.Linear(c.hidden_size, width, bias=c.qkv_bias))
        self.o_proj = nn.Linear(self.widths[0], c.hidden_size, bias=c.o_bias)
        self.over_width = c.qk_norm == "width"
        sizes = self.widths if self.over_width else [c.head_dim, c.head_dim]
        self.q_norm: Any = c.make_norm(sizes[0]) if c.qk_norm else identity
        self.k_norm: Any = c.make_norm(sizes[1]) if c.qk_norm and not self.takes else identity
        self.v_norm: Any = partial(F.rms_norm, normalized_shape=(c.head_dim,), eps=c.norm_eps) if c.v_norm else identity

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        projected = [getattr(self, name)(x) for name in self.inputs]
        q, k, v = self.heads(projected, context)
        return self.o_proj(self.gate(context.attend(q, k, v, self).flatten(2), projected[0]))

    def heads(self, projected: list[Tensor], context: SequenceContext) -> tuple[Tensor, Tensor, Tensor]:
        """Projections (b, q, heads * d), split into heads, normalized and rotated: (b, q, h or g, d)."""
        if self.interleaved:  # (b, q, h, 3 d)
            parts = list(projected[0].unflatten(-1, (-1, 3 * self.head_dim)).chunk(3, dim=-1))
        else:
            parts = list(projected[0].split(self.widths, dim=-1)) if self.inputs == ("qkv_proj",) else projected
            parts = [*parts, parts[1]] if self.keys_are_values else parts
            parts = self.normalize(parts) if self.over_width else parts
            parts = [part.unflatten(-1, (-1, self.head_dim)) for part in parts]
        if self.gated:
            parts[0] = parts[0][:, :, ::2]  # between the heads of q are their gates
        if not self.over_width:
            parts = self.normalize(parts)
        q, k, v = parts + [context.tensors[name] for name in self.takes]  # k and v: its own, or an earlier block's
        context.tensors.update(zip(self.gives, (k, v), strict=False))
        q, k = context.rotate(q, k, self)
        dtype = projected[0].dtype  # under autocast a norm's float32 weight widens its input
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def normalize(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The norms of q, k and v, as far as there are such."""
        return [norm(part) for norm, part in zip((self.q_norm, self.k_norm, self.v_norm), parts, strict=False)]

    def gate(self, y: Tensor, projected: Tensor) -> Tensor:
        """y sigmoid(gate), (b, q, h * d), if q's projection has a gate after each head (Qiu et al. 2025)."""
        return y * projected.unflatten(-1, (-1, 2, self.head_dim))[..., 1, :].flatten(2).sigmoid() if self.gated else y


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU; with gelu GeGLU: Shazeer 2020), or without a gate down(gelu(up(x)))."""

    def __init__(self, config: DecoderConfig, width: int = 0):
        super().__init__()
        width = width or config.intermediate_size
        self.activation, self.limit = ACTIVATIONS[config.activation], config.mlp_limit
        self.inputs, self.is_plain = MLP_INPUTS[config.mlp], config.mlp == "plain"
        self.interleaved = config.mlp == "interleaved"
        rows = 2 * width if self.inputs == MLP_INPUTS["fused"] else width
        for name in self.inputs:
            self.add_module(name, nn.Linear(config.hidden_size, rows, bias=config.mlp_bias))
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activate(*[getattr(self, name)(x) for name in self.inputs]))

    def activate(self, *projected: Tensor) -> Tensor:
        if self.is_plain:
            return self.activation(projected[0])
        gate, up = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
        if self.interleaved:
            gate, up = projected[0][..., ::2], projected[0][..., 1::2]
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), 1 + up.clamp(-self.limit, self.limit)
            return gate * torch.sigmoid(1.702 * gate) * up
        return self.activation(gate) * up


# What lets positions see each other in a block: its name in files, and how it is made.
MIXERS: dict[str, tuple[str, Callable[[DecoderConfig, int], nn.Module]]] = {
    "attention": ("self_attn", SelfAttention),
    "deltanet": ("linear_attn", GatedDeltaNet),
    "short_conv": ("conv", ShortConv),
}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): a pre-norm transformer block, unless NORMS says otherwise."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.norm_names, self.scale, self.parallel = NORMS[config.norms], config.residual_scale, config.parallel
        self.mixer_name, make = MIXERS[config.mixer(layer)]
        self.add_module(self.mixer_name, make(config, layer))
        self.takes, self.gives = getattr(self.mixer, "takes", []), getattr(self.mixer, "gives", [])  # in the context
        per_layer.extend_block(self, config, layer)
        self.mlp: Any = feed_forward(MLP, config, layer)
        for name in filter(None, self.norm_names):
            self.add_module(name, config.make_norm(config.hidden_size))

    @property
    def mixer(self) -> Any:
        return getattr(self, self.mixer_name)

    def norm(self, place: int) -> Callable[[Tensor], Tensor]:
        """The norm at a place of NORMS; the identity if there is none."""
        return getattr(self, self.norm_names[place]) if self.norm_names[place] else identity

    def forward(self, x: Tensor, context: SequenceContext, target_positions: Tensor | None = None) -> Tensor:
        """The residual stream after this block, (b, q, hidden); at some positions only, (1, n, hidden)."""
        y = self.add(x, self.norm(1)(self.mixer(self.norm(0)(x), context)))
        x, y = select(x, target_positions), select(y, target_positions)  # from here on, positions are independent
        y = self.add(y, self.norm(3)(self.mlp(self.norm(2)(x if self.parallel else y))))
        return per_layer.finish(self, y, context, target_positions)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + scale * y."""
        return torch.add(x, y, alpha=self.scale)


def identity(x: Tensor) -> Tensor:
    return x


def select(x: Tensor, positions: Tensor | None) -> Tensor:
    """Positions b * seq + s of x, (b, seq, hidden), as (1, n, hidden); None: x."""
    return x if positions is None else x.flatten(0, 1).index_select(0, positions)[None]


def embedding(size: int, hidden: int) -> nn.Embedding:
    """Initialized uniformly: on the `meta` device, PyTorch's normal_ imports its compiler, which takes seconds."""
    return nn.Embedding.from_pretrained(torch.empty(size, hidden).uniform_(-1, 1), freeze=False)


class Trunk(nn.Module):
    """Embedding, blocks and final norm: the tensors whose names start with `model.`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(own, layer) for layer, own in enumerate(config.by_layer))
        self.norm = config.make_norm(config.hidden_size)
        per_layer.extend_trunk(self, config)
        if config.positions:
            self.embed_positions = embedding(config.positions, config.hidden_size)


class Decoder(nn.Module):
    """A causal language model up to its last hidden state; `head` is the matrix that turns it into logits."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.score = nn.Linear(config.hidden_size, 1, bias=False) if config.has_score else None
        self.activation_policy: list[ActivationPolicy] = ["all"] * config.num_layers  # what each block keeps
        self.context_class: type[SequenceContext] = SequenceContext
        self.neftune_alpha = 0.0

    @property
    def output(self) -> nn.Module:
        """The module of the output embedding, which may have an adapter."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def head(self) -> Tensor:
        """The output embedding, (vocab, hidden); wider with a low-rank adapter, like the hidden states."""
        return self.output.weight  # type: ignore[return-value]

    @property
    def _stored_head(self) -> Tensor:
        output: Any = self.output
        stored: Tensor = getattr(output, "base", output).weight
        return stored

    @property
    def device(self) -> torch.device:
        return self._stored_head.device

    @property
    def dtype(self) -> torch.dtype:
        return self._stored_head.dtype

    def untie(self) -> None:
        """Make the head a separate module, with the embedding's weight, so that only one of them has an adapter."""
        if self.lm_head is None:
            self.config = replace(self.config, tied=False)
            self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False, device="meta")
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        target_positions: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states, (batch, seq, hidden); at some positions only, (1, n, hidden).

        Args:
            ids: token ids, (batch, seq).
            positions: of each token in its document, (batch, seq); None: 0, 1, 2, ...
            documents: of a packed batch; None: each sequence is one, with padding only on the right (which needs no
                mask, because no token sees later ones).
            target_positions: flat positions b * seq + s whose hidden state is needed, (n,); None: all.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.embed(ids, positions)
        if self.training and self.neftune_alpha:
            bound = self.neftune_alpha / math.sqrt(x.shape[1] * x.shape[2])  # NEFTune (Jain et al. 2023, algorithm 1)
            x = x + torch.empty_like(x).uniform_(-bound, bound)
        context = self.context(positions, x.dtype, documents)
        context.tensors |= per_layer.embeddings(self.model, ids, x)
        last = len(self.model.layers) - 1
        for index, (block, policy) in enumerate(zip(self.model.layers, self.activation_policy, strict=True)):
            x = run_block(block, x, context, target_positions if index == last else None, policy)
        return self.finish(x)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """scale * embedding[ids], (b, q, hidden), the factor rounded as in pre-training; plus learned positions."""
        x, scale = self.model.embed_tokens(ids), self.config.embedding_scale
        x = x if scale == 1 else x * torch.full((), scale, dtype=x.dtype, device=x.device)
        return x + self.model.embed_positions(positions) if self.config.positions else x

    def finish(self, x: Tensor) -> Tensor:
        """The last hidden states, (..., hidden), from the residual stream; wider with an adapter on the head."""
        x = self.model.norm(x)
        x = x if self.config.logit_scale == 1 else x * self.config.logit_scale
        return self.output.widen(x) if isinstance(self.output, Adapter) else x

    def context(self, positions: Tensor, dtype: torch.dtype, documents: Documents | None = None) -> SequenceContext:
        """What the layers of one forward pass share; positions are (b, q)."""
        return self.context_class(self.rotations(positions, dtype, document_lengths(positions, documents)), documents)

    def rotations(self, positions: Tensor, dtype: torch.dtype, lengths: Tensor) -> list[Rotation]:
        """For each rope, cos and sin of position * frequency, in float32; lengths: of documents, (b, q or 1)."""
        found = []
        for rope in self.config.distinct_ropes:
            frequency, factor = rope.angles(self.config.head_dim, lengths[..., None, None])
            angles = positions[:, :, None, None].float() * frequency.to(positions.device)
            growth = None
            if rope.query_growth:
                turns = (positions[:, :, None, None] / rope.context).floor()
                growth = (1 + rope.query_growth * turns.log1p()).to(dtype)
            found.append(Rotation((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype), growth))
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden @ head^T in float32, (..., vocab), for generation; the loss never holds all logits."""
        return soft_cap(F.linear(hidden, self.head.to(hidden.dtype)).float(), self.config.logit_cap)
