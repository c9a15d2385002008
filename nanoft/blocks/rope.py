"""Rotary positions: the angle by which each pair of dimensions turns per position, and its scaling for longer contexts.

angle = position * theta^(-2 i / d)  for the i-th of d / 2 pairs   (RoFormer, Su et al. 2021, eq. 15)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanoft.attention import Documents


@dataclass(frozen=True)
class Rope:
    """The mapping from positions to angles (RoFormer, Su et al. 2021), and its scaling for longer contexts."""

    theta: float = 10000.0
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn | longrope | proportional
    parameters: Mapping[str, Any] = field(default_factory=dict)
    context: int = 0  # positions of pre-training; beyond them, dynamic and longrope depend on the document's length
    share: float = 1.0  # share of each head's dimensions, the first ones, that is rotated
    query_growth: float = 0.0  # b: queries grow by 1 + b ln(1 + floor(position / context)) (Llama 4)
    head_dim: int = 0  # of the layers that it is for; 0: the model's

    @property
    def depends_on_length(self) -> bool:
        return self.kind in ("dynamic", "longrope")

    def changes_at(self, length: int) -> bool:
        """Whether the angles of a document's earlier positions change when it reaches this length."""
        return (
            length > self.context if self.kind == "dynamic" else self.depends_on_length and length == self.context + 1
        )

    def angles(self, head_dim: int, lengths: Tensor | int = 0) -> tuple[Tensor, float]:
        """Angular frequencies, (n / 2,) for n rotated dimensions, in radians per position; the factor on cos and sin.

        If they depend on the length: (..., n / 2), for each of `lengths`, (..., 1).
        """
        theta: Tensor | float
        theta, head_dim = self.theta, int((self.head_dim or head_dim) * self.share)
        if self.kind == "dynamic":  # theta grows with the document (dynamic NTK)
            factor = self.parameters["factor"]
            longer = torch.as_tensor(factor * lengths / self.context - (factor - 1)).clamp(min=1)
            theta = theta * longer ** (head_dim / (head_dim - 2))
        frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        if self.kind == "linear":  # positions are divided by `factor` (Chen et al. 2023)
            return frequency / self.parameters["factor"], 1.0
        if self.kind == "proportional":  # the slowest pairs do not turn (Gemma 4)
            frequency[int(self.parameters.get("partial_rotary_factor", 1.0) * head_dim // 2) :] = 0.0
            return frequency / (self.parameters.get("factor") or 1.0), 1.0
        if self.kind == "llama3":
            return _llama3_frequencies(frequency, self.parameters), 1.0
        if self.kind == "longrope":  # each frequency has its own divisor (LongRoPE, Ding et al. 2024)
            p, lengths = self.parameters, torch.as_tensor(lengths)
            long, short = (torch.tensor(p[name], device=lengths.device) for name in ("long_factor", "short_factor"))
            factors = torch.where(lengths > self.context, long, short)
            return frequency.to(factors.device) / factors, float(p["attention_factor"])
        if self.kind == "yarn":
            return _yarn_frequencies(frequency, self.theta, head_dim, self.parameters)
        return frequency, 1.0


def document_lengths(positions: Tensor, documents: Documents | None) -> Tensor:
    """The length of each position's document, (b, q); without documents, of each sequence with padding, (b, 1)."""
    if documents is None:
        return positions.amax(1, keepdim=True) + 1
    lengths = documents.bounds.diff()
    return lengths.repeat_interleave(lengths, output_size=positions.numel()).view_as(positions)


def _llama3_frequencies(frequency: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: divide slow frequencies by `factor`, keep fast ones, and blend linearly in between."""
    old_context = p["original_max_position_embeddings"]
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    turns = old_context * frequency / (2 * math.pi)  # full turns over the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, 1: fast
    return (1 - blend) * frequency / p["factor"] + blend * frequency


def _yarn_frequencies(frequency: Tensor, theta: float, head_dim: int, p: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, section 3.2-3.4): blend by the number of turns, and temper the attention."""
    factor, old_context = p["factor"], p["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:  # the frequency that makes this many turns over the old context
        return head_dim * math.log(old_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(p.get("beta_fast") or 32), dimension_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: keep, 1: divide
    stretched = frequency * (1 - ramp) + frequency / factor * ramp

    def magnitude(scale: float) -> float:  # eq. 22: sqrt(1/t) = 0.1 ln(s) + 1
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return stretched, float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return stretched, magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return stretched, magnitude(1.0)
