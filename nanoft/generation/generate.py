"""Batched generation with a cache.

Prompts of different lengths are read as training reads packed documents, so none is padded. After that, each forward
pass adds one token to every answer; finished answers leave the batch and waiting prompts take their places, so one long
answer does not hold up a batch.

`generate` returns all answers, complete; `stream` yields the new tokens of each step, as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from nanoft.generation.decode import Decoding
from nanoft.generation.sampling import GREEDY, Sampler, Sampling
from nanoft.model import Decoder

REFILL = 0.75  # waiting prompts join when at most this share of the batch is active: joining copies the cache


@dataclass(frozen=True)
class Answer:
    """Generated ids without the stop token, and whether the model produced one."""

    ids: list[int]
    stopped: bool


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int,
    sampling: Sampling = GREEDY, generator: torch.Generator | None = None, batch_size: int | None = None,
    only: Sequence[int] | None = None,
) -> list[Answer]:  # fmt: skip
    """Continue every prompt, of which none is empty, until a stop id or `max_new_tokens`.

    Args:
        generator: on the CPU; None: torch's default.
        batch_size: answers that are generated together; None: all.
        only: indices of the prompts to answer, with the random numbers they have among all prompts. None: all.
    """
    stops, answers = set(stop_ids), [Answer([], False) for _ in prompts]
    for step in stream(model, prompts, stop_ids, max_new_tokens, sampling, generator, batch_size, only):
        for prompt, token in step:
            if token in stops:
                answers[prompt] = Answer(answers[prompt].ids, True)
            else:
                answers[prompt].ids.append(token)
    return answers


@torch.inference_mode()
def stream(
    model: Decoder, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int,
    sampling: Sampling = GREEDY, generator: torch.Generator | None = None, batch_size: int | None = None,
    only: Sequence[int] | None = None,
) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """Yields for each step the (index of the prompt, new token) pairs; a stop id is the last token of its answer."""
    most = model.config.positions or max(map(len, prompts), default=0) + max_new_tokens
    budget = [min(max_new_tokens, most + 1 - len(prompt)) for prompt in prompts]  # tokens that an answer may still get
    stops, chosen = set(stop_ids), range(len(prompts)) if only is None else only
    waiting = [prompt for prompt in chosen if budget[prompt] > 0]
    batch_size = batch_size or len(waiting)
    sampler = Sampler(sampling, prompts, model.config.vocab_size, max_new_tokens, model.device, generator)
    decoding = Decoding(model)
    batch: list[int] = []  # the prompt of each sequence in the batch; -1: its answer is finished
    hidden: list[torch.Tensor] = []  # last hidden states, (some of batch, hidden) each
    while waiting or batch:
        if waiting and len(batch) <= REFILL * batch_size:
            free = batch_size - len(batch)
            joining, waiting = waiting[:free], waiting[free:]
            hidden.append(decoding.join([prompts[prompt] for prompt in joining], max_new_tokens))
            sampler.join(joining)
            batch += joining
        newest = sampler.choose(decoding.logits(torch.cat(hidden)))  # (batch,)
        step = [(prompt, token) for prompt, token in zip(batch, newest.tolist(), strict=True) if prompt >= 0]
        yield step
        for prompt, _ in step:
            budget[prompt] -= 1
        finished = {prompt for prompt, token in step if token in stops or not budget[prompt]}
        batch = [-1 if prompt in finished else prompt for prompt in batch]
        active = [index for index, prompt in enumerate(batch) if prompt >= 0]
        if len(active) <= REFILL * (batch_size if waiting else len(batch)):
            kept = torch.tensor(active, dtype=torch.long, device=newest.device)
            batch, newest = [batch[index] for index in active], newest[kept]
            decoding.keep(active)
            sampler.keep(kept)
        hidden = [decoding.step(newest)] if batch else []
