"""Rollouts: answers to the prompts of a step, sampled from the weights in training, and their rewards.

There is no separate inference engine whose weights could be stale. Each answer has its own random numbers, a pure
function of (seed, position of the window, record, number of the answer), so it depends neither on the batch size of
sampling nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nanoft import UserError
from nanoft.batches import Array, Batch, Batches, Sample, TokenDataset
from nanoft.config import Config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset
from nanoft.data.filters import prompt_lengths
from nanoft.data.sources import Log
from nanoft.generation.generate import stream
from nanoft.generation.sampling import Sampling, completion_noise
from nanoft.metrics.rewards import Answered, Prompt, Rewards
from nanoft.model import Decoder
from nanoft.objectives.reward import TrainedReward
from nanoft.perplexity import evaluating
from nanoft.runtime import distributed
from nanoft.runtime.command import StopRequest
from nanoft.runtime.memory import OutOfMemory, release_memory


@dataclass(frozen=True)
class Rollout:
    """One sampled answer."""

    record: int
    prompt_ids: list[int]
    ids: list[int]  # of the answer, including the stop token if the model produced one
    logps: list[float]  # of these tokens, as they were sampled
    rewards: list[float]  # from each function of rl.reward; NaN: it failed
    reward: float  # their weighted sum
    stopped: bool  # whether the model produced a stop token

    def sample(self, label: float) -> Sample:
        """Prompt and answer, whose tokens are the targets."""
        ids = np.array([*self.prompt_ids, *self.ids], np.int32)
        return Sample(ids, np.arange(len(ids)) >= len(self.prompt_ids), self.record, label=label)


def check_answers_fit(field: str, tokens: int, length: int) -> None:
    if tokens >= length:
        raise UserError(f"{field}: {tokens} leaves no room for prompts in model.max_seq_length={length}: lower it")


def with_room_for_answers(corpus: PreparedDataset, room: int, say: Log = print) -> PreparedDataset:
    """The samples whose prompts have at most `room` tokens."""
    training, validation = (side[prompt_lengths(side) <= room] for side in (corpus.training, corpus.validation))
    if lost := len(corpus.training) + len(corpus.validation) - len(training) - len(validation):
        say(f"warning: {lost:,} prompts of more than {room} tokens leave no room for answers: skipped")
    if not len(training):
        raise UserError(f"model.max_seq_length: every prompt has more than {room} tokens: raise it to fit answers")
    return replace(corpus, training=training, validation=validation)


class Prompts:
    """The prompts of a data set, and the policy's answers to them."""

    def __init__(self, config: Config, corpus: PreparedDataset, chat: ChatTokenizer, log: Log = print):
        self.config, self.rl, self.chat, self.log = config, config.rl, chat, log
        self.max_new_tokens = config.sampled_tokens
        self.at_once = config.effective_batch_size()  # answers sampled together; fewer when memory runs out
        self.of_record: dict[int, Prompt] = {}
        for samples in (corpus.training, corpus.validation):
            prompts = (Prompt.of(c, c.answer_at) for c in corpus.conversations(samples))
            self.of_record |= zip(np.unique(samples.records).tolist(), prompts, strict=True)

    def begin(self, model: Decoder) -> None:
        """Open reward models, on the policy's device."""
        self.device = model.device
        self.rewards = Rewards(self.rl, self.log, lambda run: TrainedReward(run, model.device, model.dtype))

    def encode(self, record: int) -> list[int]:
        """The prompt's token ids, including the generation prompt."""
        prompt = self.of_record[record]
        return self.chat.encode_prompt(prompt.messages, prompt.tools, prompt.template_args)

    def sample(
        self, model: Decoder, records: Sequence[int], count: int, sampling: Sampling, position: Sequence[int],
        stop: StopRequest | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """`count` answers to each prompt, grouped by prompt; none if a signal arrives meanwhile.

        Every rank answers a share of the prompts and receives all answers.
        """
        encoded = [self.encode(record) for record in records]
        while True:
            try:
                with distributed.same_exception(model.device):
                    found = self._sample(model, records, encoded, count, sampling, position, stop)
                break
            except OutOfMemory as error:
                release_memory(model.device, error)
                if self.at_once == 1:
                    raise
                self.at_once = (self.at_once + 1) // 2
        if stop is not None and distributed.stop_requested(stop):
            return []
        found = distributed.all_gather_dict(found)
        return [Rollout(records[at // count], encoded[at // count], *found[at]) for at in sorted(found)]

    @torch.no_grad()
    def _sample(
        self, model: Decoder, records: Sequence[int], encoded: list[list[int]], count: int, sampling: Sampling,
        position: Sequence[int], stop: StopRequest | None,
    ) -> dict[int, Any]:  # fmt: skip
        """The fields of this rank's rollouts, by their place among all; fewer if a signal arrives."""
        share = sorted(distributed.split_work(range(len(records))), key=lambda at: -len(encoded[at]))
        own = [at * count + number for at in share for number in range(count)]  # longest first
        seeds = [[self.config.system.seed, *position, records[at // count], at % count] for at in own]
        prompts, noise = [encoded[at // count] for at in own], completion_noise(seeds, self.max_new_tokens)
        limits = self.chat.stop_ids, self.max_new_tokens, sampling
        ids: dict[int, list[int]] = {at: [] for at in own}
        logps: dict[int, list[float]] = {at: [] for at in own}
        with evaluating(model):
            for step in stream(model, prompts, *limits, noise=noise, batch_size=self.at_once):
                if stop and not distributed.is_sharded():
                    return {}
                for place, token, logp in step:
                    ids[own[place]].append(token)
                    logps[own[place]].append(logp)
        stops = set(self.chat.stop_ids)
        texts = [self.chat.decode([token for token in ids[at] if token not in stops]) for at in own]
        worth = self._score([self.of_record[records[at // count]] for at in own], texts).tolist()
        return {
            at: (ids[at], logps[at], each, total, ids[at][-1] in stops)
            for at, (total, *each) in zip(own, worth, strict=True)
        }

    def _score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Array:
        """The total reward of each answer, and its reward by each function, (answers, 1 + functions)."""
        references = [self.chat.control.remove(prompt.reference) for prompt in prompts]
        rewards = self.rewards.score(list(map(Answered, prompts, answers, references)))
        return np.column_stack([self.rewards.total(rewards), rewards])

    def rewards_of(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[dict[str, float]]:
        """The rewards of answers by name. Every rank scores a share of the answers and receives all rewards."""
        own = list(distributed.split_work(range(len(answers))))
        with distributed.same_exception(self.device):
            worth = self._score([prompts[at] for at in own], [answers[at] for at in own]).tolist()
        found = distributed.all_gather_dict(dict(zip(own, worth, strict=True)))
        return [dict(zip(self.rewards.columns, found[at], strict=True)) for at in sorted(found)]

    def cut(self, answers: Sequence[Rollout], rows: int, labels: Sequence[float] | None = None) -> list[Batch]:
        """Answers, each with a label, in micro-batches of `rows`, packed if data.packing is set."""
        pairs = zip(answers, labels or [0.0] * len(answers), strict=True)
        samples = TokenDataset.of([answer.sample(label) for answer, label in pairs])
        pack_length = self.config.model.max_seq_length if self.config.data.packing else None
        batches = Batches(samples, rows, len(samples), 0, self.chat.pad_id, pack_length, shuffle=False)
        return batches.window(0)

    def longest(self, batches: Batches) -> list[Rollout]:
        """A micro-batch of the longest possible answers to the longest prompt; nothing is sampled."""
        record = int(batches.samples.records[prompt_lengths(batches.samples).argmax()])
        prompt, tokens, config = self.encode(record), self.max_new_tokens, self.config
        answer = Rollout(record, prompt, prompt[-1:] * tokens, [0.0] * tokens, [], 0.0, True)
        in_a_row = config.model.max_seq_length // (len(prompt) + tokens) if config.data.packing else 1
        return [answer] * batches.micro_batch_size * max(1, in_a_row)

    def figures(self, answers: Sequence[Rollout]) -> dict[str, float]:
        """Means over answers; the mean of a reward ignores answers for which it failed."""
        rewards = np.array([[answer.reward, *answer.rewards] for answer in answers])
        known = zip(self.rewards.columns, (column[~np.isnan(column)] for column in rewards.T), strict=True)
        return {
            **{name: float(values.mean()) for name, values in known if len(values)},
            "reward_failures": float(np.isnan(rewards[:, 0]).mean()),
            "completion_tokens": float(np.mean([len(answer.ids) for answer in answers])),
            "stop_rate": float(np.mean([answer.stopped for answer in answers])),
        }
