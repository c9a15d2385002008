"""Prompts that several sequences continue: their keys and values are kept once, and read once per step.

The answers of a group have the same prompt, so their queries meet the same keys there. These stand apart from the keys
of the answers, and one softmax goes over both:

    p = softmax([q K_prompt^T, q K_answer^T] / sqrt(d)) = [p_prompt, p_answer]
    y = p_prompt V_prompt + p_answer V_answer

The queries of all sequences of a prompt are the rows of one matrix, so the first product reads K_prompt once for all of
them, not once for each (Hydragen, Juravsky et al. 2024, section 3).

Notation in comments: b sequences, p prompts, c the most sequences of a prompt, h query heads, g key/value heads,
r = h / g, d head size, n any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoft.attention import AttentionLayer, CacheContext, SequenceContext, attention_weights


class SharedPrompts:
    """Keys and values of distinct prompts, which end in the same slot, and the prompt of each sequence."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.keys, self.values = dict[int, Tensor](), dict[int, Tensor]()  # by layer, (p, g, slots, d)
        self.lengths: list[int] = []  # of the prompts, in tokens
        self.prompts: list[int] = []  # of each sequence; -1: it shares none

    def add(
        self, keys: dict[int, Tensor], values: dict[int, Tensor], lengths: Sequence[int], prompts: Sequence[int]
    ) -> None:
        """Add prompts, (new, g, slots, d) by layer, and sequences with the number of their prompt among these."""
        slots = max([*lengths, *self.lengths])

        def both(old: dict[int, Tensor], new: dict[int, Tensor]) -> dict[int, Tensor]:
            return {
                n: torch.cat([F.pad(part, (0, 0, slots - part.shape[2], 0)) for part in (old[n], new[n])]) for n in new
            }

        if self.lengths:
            keys, values = both(self.keys, keys), both(self.values, values)
        self.keys, self.values = keys, values
        self.prompts += [len(self.lengths) + prompt for prompt in prompts]
        self.lengths += lengths

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop the other sequences, and prompts without a sequence."""
        prompts = [self.prompts[sequence] for sequence in sequences]
        used = sorted(set(prompts) - {-1})
        if len(used) < len(self.lengths):
            self.lengths = [self.lengths[prompt] for prompt in used]
            slots = max(self.lengths, default=0)
            self.keys, self.values = (
                {layer: part[self._tensor(used), :, part.shape[2] - slots :] for layer, part in cache.items() if used}
                for cache in (self.keys, self.values)
            )
        self.prompts = [used.index(prompt) if prompt >= 0 else -1 for prompt in prompts]

    @property
    def prefix_lengths(self) -> list[int]:
        """Of each sequence, the tokens in the prompt that it shares."""
        return [self.lengths[prompt] if prompt >= 0 else 0 for prompt in self.prompts]

    def prepare(self, empty: Sequence[int]) -> None:
        """Tensors for steps with these sequences; `empty`: of each, the slots before its own first token."""
        prompts = [max(0, prompt) for prompt in self.prompts]  # sequences that share none see no slot of the first
        members = [[s for s, own in enumerate(prompts) if own == prompt] for prompt in range(len(self.lengths))]
        c = max(map(len, members))
        self.members = self._tensor([[*own, *own[:1] * (c - len(own))] for own in members]).flatten()  # (p c,)
        self.places = self._tensor([prompt * c + members[prompt].index(s) for s, prompt in enumerate(prompts)])  # (b,)
        slots = max(self.lengths)
        before = slots - torch.arange(slots, device=self.device)  # positions from a slot to the first one after it all
        self.filled = before <= self._tensor(self.prefix_lengths)[:, None]  # (b, slots)
        self.before = before - self._tensor(empty)[:, None]  # (b, slots): positions from there to slot 0 of the answers

    def _tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, device=self.device)

    def by_prompt(self, x: Tensor) -> Tensor:
        """(b, g, r, n) as (p, g, c r, n): the rows of all sequences of a prompt together."""
        return x.index_select(0, self.members).unflatten(0, (len(self.lengths), -1)).transpose(1, 2).flatten(2, 3)

    def by_sequence(self, x: Tensor) -> Tensor:
        """(p, g, c r, n) as (b, g, r, n)."""
        x = x.unflatten(2, (len(self.members) // len(x), -1)).transpose(1, 2)  # (p, c, g, r, n)
        return x.flatten(0, 1).index_select(0, self.places)


class SharedPromptContext(SequenceContext):
    """A step of generation with shared prompts: `context` does rotation and keeps what follows them."""

    def __init__(self, context: CacheContext, shared: SharedPrompts):
        super().__init__(context.rotations)
        self.context, self.shared, self.kept = context, shared, context.kept

    def rotate(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        return self.context.rotate(q, k, layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        keys, values, seen = self.context.write(k, v, layer)  # (b, g, k, d)
        shared, window, first = self.shared, layer.scores.window, 0
        if window is not None:  # the first slot of the prompts that a sequence sees
            first = max(0, shared.filled.shape[1] + self.context.slot - self.context.full - window + 1)
        prompt_keys, prompt_values = (c[layer.source][:, :, first:] for c in (shared.keys, shared.values))
        q_heads = q[:, 0].unflatten(1, (keys.shape[1], -1)) * layer.scores.scale  # (b, g, r, d)
        s = torch.cat((shared.by_sequence(shared.by_prompt(q_heads) @ prompt_keys.mT), q_heads @ keys.mT), dim=-1)
        if window not in self._masks:  # once for all layers with this window
            near = shared.before + self.context.slot < (window or torch.inf)
            mask = (shared.filled & near)[:, None, None, first:]
            self._masks[window] = torch.cat((mask, self.context.filled[..., seen]), dim=-1)
        p = attention_weights(s.flatten(1, 2)[:, :, None], self._masks[window], layer.scores.cap, layer.sinks)
        of_prompt, own = p.view_as(s).split([prompt_keys.shape[2], keys.shape[2]], dim=-1)
        y = shared.by_sequence(shared.by_prompt(of_prompt) @ prompt_values) + own @ values  # (b, g, r, d)
        return y.reshape(q.shape)
