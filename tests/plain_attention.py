"""Reference attention: the formula over all pairs of positions, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch


def tensors(lengths: tuple[int, ...], dtype: torch.dtype, heads: int = 4, groups: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*lengths, count, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]


def plainly(q: Any, k: Any, v: Any, seen: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    """Attention by the formula over all pairs; seen is the mask, (b, 1, q, k); cap: soft cap of the scores."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeats, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = scores if cap is None else cap * (scores / cap).tanh()
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def places(documents: tuple[int, ...], batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, segments), (b, q), of documents that fill the sequences one after another."""
    numbers = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).view(batch, length)
    positions = torch.cat([torch.arange(n) for n in documents]).view(batch, length)
    return positions, numbers


def who_sees_whom(positions: torch.Tensor, documents: torch.Tensor, window: int | None) -> torch.Tensor:
    """(b, 1, q, k): the same document, not the future, not further back than the window."""
    past = positions[:, :, None] - positions[:, None, :]
    seen = (past >= 0) & (documents[:, :, None] == documents[:, None, :])
    return (seen if window is None else seen & (past < window))[:, None]
