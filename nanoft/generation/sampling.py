"""Sampling: from logits to the next token.

Temperature 0 takes the most likely token. Otherwise the logits are changed in the order that transformers uses:

    repetition penalty   tokens of the prompt or the answer become less likely (CTRL, Keskar et al. 2019, section 4.1)
    temperature          logits / T: below 1 sharper, above 1 flatter
    top-k                keep the k most likely (Fan et al. 2018)
    top-p                keep the most likely with a total probability of p (Holtzman et al. 2020)
    min-p                keep those at least min_p times as likely as the most likely (Nguyen et al. 2024)

and a token is sampled from the softmax. All random numbers of an answer are generated before its first token, so the
answer depends on the seed and the index of its prompt, not on when other answers finish.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoft import UserError
from nanoft.runtime.device import running_sum


class NotFinite(UserError):
    """The weights are damaged, or activations overflow: no token can be chosen."""


BELOW_ONE = 1 - 2**-23  # scales [0, 1) so that noise * total stays below total in float32


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    log_probs: bool = False  # also compute `log_probs` of the chosen tokens


GREEDY = Sampling()


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits, (batch, vocab), over the penalty if positive, else times it, where `seen`, (batch, vocab) bool."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits, (batch, vocab), at a temperature above 0; -inf for tokens that are filtered out, but never for all."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort()
        outside = running_sum(ascending.softmax(-1), -1) <= 1 - sampling.top_p  # the rest already reaches p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    if sampling.min_p > 0:
        likely = logits.softmax(-1)
        logits = logits.masked_fill(likely < sampling.min_p * likely.amax(-1, keepdim=True), -torch.inf)
    return logits


def sample(logits: Tensor, noise: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the noise, (batch,), from (batch, vocab) and (batch,)."""
    cumulative = running_sum(logits.softmax(-1), -1)
    target = noise[:, None] * cumulative[:, -1:]  # the total is 1 up to rounding
    sampled = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return sampled.clamp(max=logits.shape[-1] - 1)  # exceeded only if all values are NaN


def log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / T) of each row's token, (batch,), over the whole vocabulary; T = 1 for greedy choices."""
    logits = logits / (temperature or 1.0)
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)


def completion_noise(seeds: Sequence[Sequence[int]], steps: int) -> Tensor:
    """`noise` of completions, (seeds, steps); each row depends only on its own seed."""
    rows = [np.random.default_rng(seed).random(steps, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.array(rows).reshape(-1, steps)) * BELOW_ONE


class Sampler:
    """Chooses the next token of each sequence in a batch; remembers the tokens in each sequence."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocab: int, steps: int, device: torch.device,
        noise: Tensor | None = None,
    ):  # fmt: skip
        """`prompts`: of all answers; `steps`: most tokens of an answer; `noise`: (prompts, steps); None: new."""
        self.sampling, self.prompts, self.device = sampling, prompts, device
        self.noise: Tensor | None = None  # (prompts, steps)
        if sampling.temperature > 0:
            self.noise = (torch.rand(len(prompts), steps) * BELOW_ONE if noise is None else noise).to(device)
        self.batch = torch.zeros(0, dtype=torch.long, device=device)  # (batch,): the prompt of each sequence
        self.lengths = torch.zeros_like(self.batch)  # (batch,): tokens of its answer so far
        self.seen: Tensor | None = None  # (batch, vocab)
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(0, vocab, dtype=torch.bool, device=device)

    def join(self, joining: Sequence[int]) -> None:
        """Add the answers to the prompts with these indices to the batch."""
        self.batch = torch.cat((self.batch, torch.tensor(joining, device=self.device)))
        self.lengths = F.pad(self.lengths, (0, len(joining)))
        if self.seen is not None:
            seen = torch.zeros(len(joining), self.seen.shape[1], dtype=torch.bool)
            for own, prompt in zip(seen, joining, strict=True):
                own[torch.tensor(self.prompts[prompt])] = True
            self.seen = torch.cat((self.seen, seen.to(self.device)))

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each sequence, (batch,), from logits, (batch, vocab); NotFinite if one is NaN or inf."""
        if odd := [value for value in logits.amax(-1).tolist() if not math.isfinite(value)]:
            cause = "the weights are damaged, or activations overflow in model.dtype"
            raise NotFinite(f"model: its logits are {odd[0]}: {cause}: download, train or export it again")
        if self.seen is not None:
            logits = penalize(logits, self.seen, self.sampling.repetition_penalty)
        if self.noise is None:
            newest = logits.argmax(-1)
        else:
            last = self.noise.shape[1] - 1  # a finished answer may still be in the batch
            newest = sample(warp(logits, self.sampling), self.noise[self.batch, self.lengths.clamp(max=last)])
        if self.seen is not None:
            self.seen.scatter_(1, newest[:, None], True)
        self.lengths += 1
        return newest

    def keep(self, kept: Tensor) -> None:
        """Keep these sequences of the batch, (n,) int64, and drop the others."""
        self.batch, self.lengths = self.batch[kept], self.lengths[kept]
        if self.seen is not None:
            self.seen = self.seen[kept]
