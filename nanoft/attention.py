"""Causal attention: which positions attend to which, and how positions enter the model.

    y_i = sum_j softmax_j(q_i k_j^T / sqrt(d)) v_j     over j in the same document, not after i, within the window

Everywhere else, a layer works on each position separately. So everything that depends on positions is in one object,
the `SequenceContext` of a forward pass: it rotates queries and keys, and lets each position attend to the others that
it may see. Training, reading prompts and a step with a cache differ only in their context; an optimized attention
(nanoft/kernels/attention.py) is another context with the same results.

Notation in comments: b batch, q and k positions of queries and keys, h query heads, g key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoft.blocks.recurrence import Kept, Recurrence


class AttentionLayer(Protocol):
    """What a context needs to know about the layer that calls it."""

    index: int  # of the block, from 0
    source: int  # the block whose keys and values it attends to: selects its part of a cache
    rope: int | None  # index of its rotation; None: no rotation
    scores: Scores
    sinks: Tensor | None  # logits of the term that adds to no value, (h,)


class Scores(NamedTuple):
    """How a layer turns q k^T into scores, and which keys a query sees."""

    scale: float  # usually 1 / sqrt(d)
    window: int | None = None  # number of last positions that a query sees, including its own; None: all
    cap: float | None = None  # scores s become cap tanh(s / cap)
    sinks: bool = False  # the softmax has one more term for each head, which adds to no value


class Rotation(NamedTuple):
    """The angles of each position, and the factor on its queries."""

    cos: Tensor  # (b or 1, q, 1, n / 2), n <= d: the first n dimensions of a head are rotated
    sin: Tensor
    growth: Tensor | None = None  # (b or 1, q, 1, 1)

    def at(self, positions: slice) -> Rotation:
        cos, sin, growth = self
        return Rotation(cos[:, positions], sin[:, positions], None if growth is None else growth[:, positions])


@dataclass(frozen=True)
class Documents:
    """The documents of a packed batch, in order, with its sequences concatenated; lengths are known on the CPU."""

    lengths: tuple[int, ...]  # in tokens; the padding of a sequence counts as a document
    bounds: Tensor  # (documents + 1,) int32, on the model's device: 0, and the end of each document


class SequenceContext(Recurrence):
    """What the layers of one forward pass share: the rotation of each position, and which positions it sees."""

    recomputing = False  # whether a block is called in backward (recompute.py), once more, for its gradients alone

    def __init__(self, rotations: Sequence[Rotation], documents: Documents | None = None):
        """`rotations`: one for each rope of the model; without documents, each sequence is one document."""
        self.rotations, self.documents = rotations, documents
        self.tensors: dict[tuple[str, int], Tensor] = {}  # what blocks read besides x, by what and of which block
        self._masks: dict[int | None, Tensor] = {}

    def rotate(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        """Rotary position embedding of q, (b, q, h, d), and k, (b, q, g, d)."""
        if layer.rope is None:
            return q, k
        cos, sin, growth = self.rotations[layer.rope]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q if growth is None else q * growth, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        """The attention output of each position, (b, q, h, d)."""
        window = layer.scores.window
        if window not in self._masks:  # once for all layers with this window
            self._masks[window] = causal_mask(q.shape[0], q.shape[1], q.device, window, self.documents)
        return attention(q, k, v, self._masks[window], layer.scores, layer.sinks)


class CacheContext(SequenceContext):
    """A step of generation: one new position per sequence, which sees the keys and values in a cache.

    All sequences end in the same slot of the cache, and the slots before a shorter one are empty. Within a sequence
    slots differ by as much as positions do, so a window of positions is one of slots.
    """

    def __init__(
        self,
        tables: tuple[Sequence[Rotation], Tensor],  # from `tables`
        keys: dict[int, Tensor],  # by layer, (b, g, slots, d), like values; the new ones are written into them
        values: dict[int, Tensor],
        slot: int,  # of the new positions
        full: int,  # the first slot that is not empty in any sequence
        kept: Kept | None = None,  # of layers without attention
    ):
        rotations, self.filled = tables
        here = slice(slot, slot + 1)
        super().__init__([r.at(here) for r in rotations])
        self.keys, self.values, self.slot, self.full, self.kept = keys, values, slot, full, kept

    @classmethod
    def tables(cls, rotations: Sequence[Rotation], filled: Tensor) -> tuple[Sequence[Rotation], Tensor]:
        """Tables that all steps share: the rotations of all slots, and whether a slot holds a token, (b, slots)."""
        return rotations, filled[:, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        keys, values, seen = self.write(k, v, layer)
        mask = self.filled[..., seen]
        return attention(q, keys.transpose(1, 2), values.transpose(1, 2), mask, layer.scores, layer.sinks)

    def write(self, k: Tensor, v: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor, slice]:
        """Write k and v, (b, 1, g, d), into the cache; return all visible ones, (b, g, k, d), and their slots."""
        keys, values, end = self.keys[layer.source], self.values[layer.source], self.slot + 1
        keys[:, :, self.slot], values[:, :, self.slot] = k[:, 0], v[:, 0]
        window = layer.scores.window
        seen = slice(0 if window is None else max(0, end - window), end)
        return keys[:, :, seen], values[:, :, seen], seen


def causal_mask(
    batch: int, length: int, device: torch.device, window: int | None = None, documents: Documents | None = None
) -> Tensor:
    """Whether a query sees a key, (b or 1, 1, q, k) bool: not the future, not past the window, the same document."""
    position = torch.arange(length, device=device)
    past = position[:, None] - position  # (q, k): how far back the key is
    seen = (past >= 0) if window is None else (past >= 0) & (past < window)
    if documents is None:
        return seen[None, None]
    lengths = documents.bounds.diff()
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths).view(batch, 1, length)
    return seen & (document[..., :, None] == document[..., None, :])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores, sinks: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v (Vaswani et al. 2017, eq. 1), (b, q, h, d).

    q is (b, q, h, d), k and v are (b, k, g, d), where h / g query heads share a key head (Ainslie et al. 2023); mask,
    (b or 1, 1, q, k) bool, says whether a query sees a key. PyTorch's kernels do not support a cap of the scores, or
    sinks, (h,): exp(s_j) / (sum_k exp(s_k) + exp(sink)) (Xiao et al. 2023, eq. 2).
    """
    scale, _, cap, _ = scores
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, positions, d)
    if cap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    return (attention_weights(scale * (q @ k.transpose(2, 3)), mask, cap, sinks) @ v).transpose(1, 2)


def attention_weights(s: Tensor, mask: Tensor, cap: float | None, sinks: Tensor | None) -> Tensor:
    """The softmax of scores s = scale q k^T, (b, h, q, k), with mask, cap and sinks as above."""
    s, keys = soft_cap(s, cap).masked_fill(~mask, -torch.inf), s.shape[3]
    if sinks is not None:
        s = torch.cat((s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)), dim=-1)
    return s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)[..., :keys]


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap): nearly x for small x, and never beyond the cap (Bello et al. 2017; Gemma 2)."""
    return x if cap is None else cap * torch.tanh(x / cap)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + n/2}) of the first n dimensions of x, (b, q, heads, d) (RoFormer, eq. 34)."""
    n = 2 * cos.shape[-1]
    first, second = x[..., :n].chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., n:]), dim=-1)
