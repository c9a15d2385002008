"""GRPO: learn from rewards, by comparing the answers to one prompt with each other (Shao et al. 2024, "DeepSeekMath").

A step samples G answers y_1 ... y_G to each of its prompts x from the policy, and a function gives each a reward R_i.
No value model is needed, because an answer is compared with the other answers to its prompt:

    A_i = (R_i - mean(R)) / (std(R) + 1e-4)                                  the advantage of all tokens of y_i
    ratio = p(token | x, tokens before it) / p_old(token | x, tokens before it)   how much the policy has changed
    loss = -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta KL         per token (Schulman et al. 2017, eq. 7)

p_old is the policy that sampled. With one update per step it is the policy itself: the ratio is 1, and its gradient is
that of log p, so the loss is REINFORCE with the group's mean as the baseline. With several updates (`rl.updates`),
clipping keeps a token's probability from changing by more than a factor of 1 + high or 1 - low.

The loss of a step is a mean over all its answers, however they are split into micro-batches; LOSS_NORMALIZATIONS has
the choices of its denominator. Answers of groups with equal rewards have no gradient, but count in the denominator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from nanoft import UserError
from nanoft.batches import Array, Batch, Batches, Window
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.config.functions import RUN
from nanoft.config.settings import RLConfig, TrainingConfig
from nanoft.data.filters import prompt_lengths
from nanoft.data.formats import Learns
from nanoft.generation.sampling import GREEDY, Sampling
from nanoft.loss import token_nll
from nanoft.metrics.rewards import Prompt, reward_function
from nanoft.model import Decoder
from nanoft.models.open import is_run
from nanoft.objectives.objective import Objective
from nanoft.objectives.preference import add, means
from nanoft.objectives.reference import Reference, answer_tokens
from nanoft.objectives.rollouts import Prompts, Rollout, check_answers_fit
from nanoft.runtime.command import StopRequest

SMALL = 1e-4  # added to the standard deviation of a group's rewards


def group_advantages(rewards: Array, scale: str = "group") -> Array:
    """A of the answers to n prompts, (n, G), from their rewards, (n, G); a failed reward, NaN, is ignored and gets 0.

    `scale`: group, or none to omit the division (Liu et al. 2025, "Dr. GRPO").
    """
    known = ~np.isnan(rewards)
    count = known.sum(axis=1, keepdims=True)
    mean = np.where(known, rewards, 0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centered = np.where(known, rewards - mean, 0)
    std = np.sqrt((centered**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    return centered / (std + SMALL) if scale == "group" else centered


def clipped_loss(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) of each token, (n,); high > low: Yu et al. 2025, "DAPO"."""
    return -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def kl_estimate(logps: Tensor, reference: Tensor) -> Tensor:
    """e^(r - l) - (r - l) - 1 >= 0 of each token, (n,): unbiased for KL(policy | reference) on the policy's samples.

    Schulman 2020, "Approximating KL divergence" (k3).
    """
    difference = reference - logps
    return difference.exp() - difference - 1


def sequence_mean(values: Tensor, batch: Batch) -> Tensor:
    """For each token, the mean over its answer, (n,): a geometric mean of ratios (Zheng et al. 2025, "GSPO")."""
    tokens = answer_tokens(batch)
    sums = values.new_zeros(len(tokens)).index_add(0, batch.sequence, values)
    return (sums / tokens)[batch.sequence]


# The weight of each token in an answer of n tokens, and the denominator of the weighted sum, from the answers' lengths
# and their limit (rl.max_new_tokens).
LOSS_NORMALIZATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Array, int], float]]] = {
    "dapo": (torch.ones_like, lambda lengths, limit: lengths.sum()),  # every token has the same weight
    "grpo": (torch.reciprocal, lambda lengths, limit: len(lengths)),  # every answer has the same weight
    "dr_grpo": (torch.ones_like, lambda lengths, limit: len(lengths) * limit),  # independent of the answers' lengths
}


class GRPO(Objective):
    """Group relative policy optimization: answers sampled from the policy, scored by reward functions.

    A step of the run is `rl.prompts` prompts with `rl.group_size` answers each, and `rl.updates` optimizer steps.
    """

    unit = "completions"
    learns: ClassVar[Learns] = "prompts"
    section = "rl"
    settings: ClassVar[tuple[str, ...]] = tuple(f.name for f in fields(RLConfig))

    def __init__(self, config: Config, adapters: dict[str, Adapter], prompts: Prompts):
        self.rl, self.prompts, self.reference = config.rl, prompts, Reference(config, adapters)
        self.sampling = Sampling(config.rl.temperature, top_p=config.rl.top_p, log_probs=True)
        self.weight, self.denominator = LOSS_NORMALIZATIONS[config.rl.loss_normalization]
        self.units, self.beta = 1.0, config.rl.beta  # of the step
        self.sampled_at, self.trained_tokens = 0.0, 0  # when training on the answers began, and its number of tokens
        self.of_step, self.sums = dict[str, float](), dict[str, Tensor]()
        self.update = 0  # number of the update within the step, from 1
        self.answers: list[Rollout] = []  # the step's answers with a gradient: sample n of its windows is answer n
        self.old, self.start = dict[int, Tensor](), dict[int, Tensor]()  # log p of their tokens: p_old, p_reference

    @classmethod
    def check(cls, config: Config) -> None:
        rl, t = config.rl, config.training
        if not rl.reward:
            raise UserError("rl.reward: empty: name a metric, such as exact_match, package.module:function, or run:DIR")
        for name in rl.reward:  # mistakes show before anything is loaded
            if name.startswith(RUN) and not is_run(name.removeprefix(RUN)):
                raise UserError(f"rl.reward: {name}: no such run: name one of training.objective=reward")
            if not name.startswith(RUN):
                reward_function(name)
        if rl.reward_weights and len(rl.reward_weights) != len(rl.reward):
            raise UserError(
                f"rl.reward_weights: {len(rl.reward_weights)} weights for {len(rl.reward)} rewards: give one for each"
            )
        if t.gradient_accumulation_steps != TrainingConfig.gradient_accumulation_steps:
            what = f"a step has rl.prompts x rl.group_size = {config.effective_batch_size()} answers"
            raise UserError(f"training.gradient_accumulation_steps: has no effect with grpo, where {what}: remove it")
        if rl.beta and t.method == "full":
            raise UserError("rl.beta: training.method=full does not keep the policy at step 0: set rl.beta=0")
        check_answers_fit("rl.max_new_tokens", rl.max_new_tokens, config.model.max_seq_length)

    def begin(self, model: Decoder, *_: object) -> None:
        self.prompts.begin(model)

    def windows(self, model: Decoder, window: Window, rows: int, stop: StopRequest | None = None) -> list[Window]:
        """The answers to a window's prompts, once for each update, in micro-batches of `rows`; none after a signal."""
        started, group, updates = time.perf_counter(), self.rl.group_size, self.rl.updates
        records = window.samples.records.tolist()
        found = self.prompts.sample(model, records, group, self.sampling, window.position, stop)
        if not found:
            return []
        rewards = np.array([answer.reward for answer in found]).reshape(-1, group)
        if np.isnan(rewards).all():
            why = "failed for every answer of a step (see the warning about the first): fix the function"
            raise UserError(f"rl.reward: {', '.join(self.rl.reward)}: {why}")
        advantages = group_advantages(rewards, self.rl.advantage_scale)
        tokens = sum(len(answer.ids) for answer in found)
        self.sampled_at = time.perf_counter()
        self.of_step = self.prompts.figures(found) | {
            "groups_without_spread": float((advantages == 0).all(axis=1).mean()),
            "sampling_tokens_per_second": tokens / (self.sampled_at - started),
        }
        labels = self.select(found, advantages.ravel())
        window = replace(window, micro_batches=self.prompts.cut(self.answers, rows, labels))
        self.trained_tokens = window.tokens * updates
        return [window] * updates

    def select(self, found: list[Rollout], advantages: Array) -> list[float]:
        """Keep the answers that have a gradient, and return their advantages; the others only count.

        Answers with a failed reward do not count.
        """
        is_known = np.array([not math.isnan(answer.reward) for answer in found])
        is_masked = np.array([self.rl.mask_truncated and not answer.stopped for answer in found])
        lengths = np.array([len(answer.ids) for answer in found])
        self.units = max(1.0, self.denominator(np.where(is_masked, 0, lengths)[is_known], self.rl.max_new_tokens))
        moves = is_known & ~is_masked & ((advantages != 0) | (self.rl.beta > 0))
        self.beta = self.rl.beta if moves.any() else 0.0
        if not moves.any():  # a step without a gradient
            advantages, moves = np.zeros_like(advantages), np.arange(len(found)) == lengths.argmin()
        self.answers, self.update, self.sums = [found[at] for at in np.flatnonzero(moves)], 0, {}
        return advantages[moves].tolist()

    def prepare(self, model: Decoder, window: Window) -> None:
        self.update += 1

    def count(self, window: Window) -> float:
        return self.units

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        """Sum over the tokens of a micro-batch, with the weights of `rl.loss_normalization`."""
        rl, is_first = self.rl, self.update == 1
        if self.beta and is_first:
            with self.reference.weights(), torch.no_grad():
                keep(self.start, batch, self.token_logps(model, batch))
        logps = self.token_logps(model, batch)
        if is_first:
            keep(self.old, batch, logps.detach())
        change = logps - recall(self.old, batch)
        ratio = (sequence_mean(change, batch) if rl.ratio == "sequence" else change).exp()
        advantages = torch.from_numpy(batch.samples.labels).to(logps)[batch.sequence]
        loss = clipped_loss(ratio, advantages, rl.clip_low, rl.clip_high)
        figures = {
            "entropy": -logps,  # its mean over sampled tokens is an unbiased estimate
            "clip_ratio/low": (ratio < 1 - rl.clip_low) & (advantages < 0),
            "clip_ratio/high": (ratio > 1 + rl.clip_high) & (advantages > 0),
        }
        if self.beta:
            figures["kl"] = kl_estimate(logps, recall(self.start, batch))
            loss = loss + self.beta * ratio * figures["kl"]
        if is_first:  # sampling and training compute the same log p, up to rounding
            sampled = [logp for number in batch.samples.chosen.tolist() for logp in self.answers[number].logps]
            figures["sampling_error"] = (logps - torch.tensor(sampled).to(logps)).abs()
        add(self.sums, figures)
        return (self.weight(answer_tokens(batch).to(loss.dtype))[batch.sequence] * loss).sum()

    def token_logps(self, model: Decoder, batch: Batch) -> Tensor:
        """log p of each target token at the temperature of sampling, in nats, (targets,)."""
        hidden = model(batch.ids, batch.positions, batch.documents, batch.target_positions)  # (1, targets, hidden)
        t, cap = self.rl.temperature, model.config.logit_cap
        # a capped logit over T, c tanh(h w / c) / T, is (c / T) tanh((h / T) w / (c / T))
        return -token_nll(hidden / t, model.head, batch.targets, cap=None if cap is None else cap / t)

    def figures(self) -> dict[str, float]:
        speed = self.trained_tokens / (time.perf_counter() - self.sampled_at)
        return {**self.of_step, "training_tokens_per_second": speed, **means(self.sums)}

    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """The reward of greedy answers to the prompts of samples; `loss` is its negative."""
        records = [record for batch in batches for record in batch.records]
        figures = self.prompts.figures(self.prompts.sample(model, records, 1, GREEDY, [0, 0]))
        if "reward" not in figures:
            raise UserError(f"{self.prompts.rewards.first_failure}: no held-out answer has a reward")
        return {"loss": -figures["reward"], **figures}

    def rewards(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[dict[str, float]]:
        return self.prompts.rewards_of(prompts, answers)

    @classmethod
    def tokens_per_step(cls, config: Config, batches: Batches) -> float:
        """An upper limit, reached if every answer has `rl.max_new_tokens`."""
        answers = config.rl.prompts * config.rl.group_size * config.rl.updates
        return answers * float(prompt_lengths(batches.samples).mean() + config.rl.max_new_tokens)

    def longest(self, batches: Batches) -> Batch:
        answers = self.prompts.longest(batches)
        labels = self.select(answers, np.ones(len(answers)))
        return self.prompts.cut(answers, len(answers), labels)[0]


def keep(kept: dict[int, Tensor], batch: Batch, values: Tensor) -> None:
    """Store a value for each target token of a batch, (targets,), by sample."""
    lengths = [int(sample.is_target[1:].sum()) for sample in batch.samples]  # on the CPU, without synchronization
    kept |= zip(batch.samples.chosen.tolist(), values.split(lengths), strict=True)


def recall(kept: dict[int, Tensor], batch: Batch) -> Tensor:
    """The values that `keep` stored for the samples of a batch, (targets,)."""
    none = torch.empty(0, device=batch.targets.device)
    return torch.cat([none, *(kept[number] for number in batch.samples.chosen.tolist())])
