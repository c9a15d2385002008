"""From logits to the next token: what may be said, and a draw from it.

Temperature 0 takes the likeliest token. Otherwise the logits are changed in this order, which is transformers':

    repetition penalty   what was said or asked before gets less likely (CTRL, Keskar et al. 2019, section 4.1)
    temperature          l / T: below 1 sharper, above 1 flatter
    top-k                only the k likeliest (Fan et al. 2018)
    top-p                only the likeliest that together have probability p (Holtzman et al. 2020)
    min-p                only what is at least min_p times as likely as the likeliest (Nguyen et al. 2024)

and a token is drawn by its probability. Every draw of an answer has a random number of its own, made from the seed
before the first one, so an answer depends on the seed and on which prompt it is, not on when other answers end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BELOW_ONE = 1 - 2**-23  # times a number in [0, 1): then also its product with a total is below the total


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; as it stands, the likeliest."""

    temperature: float = 0.0  # 0: no draw
    top_k: int = 0  # 0: any number
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


GREEDY = Sampling()


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits, (b, vocab), of tokens that were seen, (b, vocab) bool: over the penalty if positive, else times it."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits, (b, vocab), at a temperature above 0, and -inf for what may not be said; at least one token may."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort()
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p  # all up to here is not needed to reach p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    if sampling.min_p > 0:
        likely = logits.softmax(-1)
        logits = logits.masked_fill(likely < sampling.min_p * likely.amax(-1, keepdim=True), -torch.inf)
    return logits


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the noise: (b,), from (b, vocab) and (b,)."""
    cumulative = logits.softmax(-1).cumsum(-1)
    target = noise[:, None] * cumulative[:, -1:]  # the sum is 1 but for rounding
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return drawn.clamp(max=logits.shape[-1] - 1)  # of a model that says NaN only


class Sampler:
    """Chooses the tokens of a batch of answers, step by step; remembers what each row has seen."""

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        vocab: int,
        steps: int,
        device: torch.device,
        generator: torch.Generator | None,
    ):
        """
        Args:
            prompts: of all answers there will be; those of a batch are said by `join`.
            generator: on the CPU, so that a seed means the same on every device; None: torch's own.
        """
        self.sampling, self.prompts, self.device = sampling, prompts, device
        self.noise: Tensor | None = None  # (prompts, steps)
        if sampling.temperature > 0:
            self.noise = (torch.rand(len(prompts), steps, generator=generator) * BELOW_ONE).to(device)
        self.rows = torch.zeros(0, dtype=torch.long, device=device)  # (b,): the prompt of each row of the batch
        self.said = torch.zeros_like(self.rows)  # (b,): tokens of its answer so far
        self.seen: Tensor | None = None  # (b, vocab)
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(0, vocab, dtype=torch.bool, device=device)

    def join(self, rows: Sequence[int]) -> None:
        """Answers to these prompts begin, behind the rows that are there."""
        self.rows = torch.cat((self.rows, torch.tensor(rows, device=self.device)))
        self.said = F.pad(self.said, (0, len(rows)))
        if self.seen is not None:
            asked = torch.zeros(len(rows), self.seen.shape[1], dtype=torch.bool)
            for row, prompt in zip(asked, rows, strict=True):
                row[torch.tensor(self.prompts[prompt])] = True
            self.seen = torch.cat((self.seen, asked.to(self.device)))

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row, (b,), from logits (b, vocab)."""
        if self.seen is not None:
            logits = penalize(logits, self.seen, self.sampling.repetition_penalty)
        if self.noise is None:
            newest = logits.argmax(-1)
        else:
            last = self.noise.shape[1] - 1  # an answer that has ended may still be in the batch
            newest = draw(warp(logits, self.sampling), self.noise[self.rows, self.said.clamp(max=last)])
        if self.seen is not None:
            self.seen.scatter_(1, newest[:, None], True)
        self.said += 1
        return newest

    def keep(self, places: Tensor) -> None:
        """Leave the other rows behind."""
        self.rows, self.said = self.rows[places], self.said[places]
        if self.seen is not None:
            self.seen = self.seen[places]
