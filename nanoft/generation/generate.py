"""Batched generation with a cache.

Prompts of different lengths are read like packed documents in training, so none is padded. After that, each forward
pass adds one token to every answer; finished answers leave the batch and waiting prompts take their places, so that a
long answer does not hold up the batch.

`generate` returns all answers when they are complete; `stream` yields the new tokens of each step. A prompt that
occurs several times among those that join together is read once, and its keys and values are kept once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nanoft.generation.decode import Decoding
from nanoft.generation.sampling import GREEDY, Sampler, Sampling, log_probs
from nanoft.io.bars import Bar
from nanoft.model import Decoder

REFILL = 0.75  # waiting prompts join once at most this share of the batch is active, because joining copies the cache


@dataclass(frozen=True)
class Answer:
    """Generated ids without the stop token, which is separate."""

    ids: list[int]
    stop_id: int | None = None  # the stop token, if the model produced one
    logps: list[float] = field(default_factory=list)  # of the ids and the stop token, with Sampling(log_probs=True)

    @property
    def stopped(self) -> bool:
        return self.stop_id is not None


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int,
    sampling: Sampling = GREEDY, noise: Tensor | None = None, batch_size: int | None = None,
) -> list[Answer]:  # fmt: skip
    """Continue every prompt (none may be empty) until a stop id or `max_new_tokens`.

    Args:
        noise: random numbers, (prompts, max_new_tokens) float32 in [0, 1): see `completion_noise`. None: new ones.
        batch_size: answers that are generated together; None: all.
    """
    stops, answers = set(stop_ids), [Answer([]) for _ in prompts]
    steps = stream(model, prompts, stop_ids, max_new_tokens, sampling, noise, batch_size)
    with Bar(desc="answering", total=len(prompts), unit="answers") as bar:
        for prompt, token, logp in itertools.chain.from_iterable(steps):
            if sampling.log_probs:
                answers[prompt].logps.append(logp)
            if token in stops:
                answers[prompt] = replace(answers[prompt], stop_id=token)
            else:
                answers[prompt].ids.append(token)
            bar.update(token in stops or len(answers[prompt].ids) == max_new_tokens)
    return answers


@torch.inference_mode()
def stream(
    model: Decoder, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int,
    sampling: Sampling = GREEDY, noise: Tensor | None = None, batch_size: int | None = None,
) -> Iterator[list[tuple[int, int, float]]]:  # fmt: skip
    """Yield for each step (index of the prompt, new token, its log-probability: NaN without `sampling.log_probs`).

    A stop id is the last token of its answer.
    """
    most = model.config.positions or max(map(len, prompts), default=0) + max_new_tokens
    budget = [min(max_new_tokens, most + 1 - len(prompt)) for prompt in prompts]  # tokens that an answer may still get
    stops, waiting = set(stop_ids), [prompt for prompt in range(len(prompts)) if budget[prompt] > 0]
    batch_size = batch_size or len(waiting)
    sampler = Sampler(sampling, prompts, model.config.vocab_size, max_new_tokens, model.device, noise)
    decoding = Decoding(model)
    batch: list[int] = []  # the prompt of each sequence in the batch; -1: its answer is finished
    hidden: list[Tensor] = []  # last hidden states, (some of batch, hidden) each
    while waiting or batch:
        if waiting and len(batch) <= REFILL * batch_size:
            free = batch_size - len(batch)
            joining, waiting = waiting[:free], waiting[free:]
            hidden.append(decoding.join([prompts[prompt] for prompt in joining], max_new_tokens))
            sampler.join(joining)
            batch += joining
        logits = decoding.logits(torch.cat(hidden))
        newest = sampler.choose(logits)  # (batch,)
        known = sampling.log_probs
        logps = log_probs(logits, newest, sampling.temperature).tolist() if known else [math.nan] * len(batch)
        step = [told for told in zip(batch, newest.tolist(), logps, strict=True) if told[0] >= 0]
        yield step
        for prompt, *_ in step:
            budget[prompt] -= 1
        finished = {prompt for prompt, token, _ in step if token in stops or not budget[prompt]}
        batch = [-1 if prompt in finished else prompt for prompt in batch]
        active = [index for index, prompt in enumerate(batch) if prompt >= 0]
        if len(active) <= REFILL * (batch_size if waiting else len(batch)):
            kept = torch.tensor(active, dtype=torch.long, device=newest.device)
            batch, newest = [batch[index] for index in active], newest[kept]
            decoding.keep(active)
            sampler.keep(kept)
        hidden = [decoding.step(newest)] if batch else []
