"""KTO: learn from single answers labeled good or bad, which are easier to collect than pairs.

People perceive a reward as a gain or a loss relative to a reference point (Kahneman and Tversky 1979). The reward of an
answer is beta (log p(y|x) - log p_ref(y|x)), and the reference point is that of an average answer, beta KL(policy |
reference) (Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization"). The KL divergence is
estimated before each step, over its whole window and all ranks, on prompts paired with the answer to another prompt, so
micro-batches do not change it.

That answer depends on the data only, not on the window: it belongs to the nearest earlier sample with another prompt.
So in full training, log p_ref of these pairs is also computed once, before the first step.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanoft import UserError
from nanoft.batches import Array, Batch, Sample, TokenDataset, Window, eval_batches, share_of_rank
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.model import Decoder
from nanoft.objectives.preference import Figures, Preference
from nanoft.objectives.reference import sequence_logps
from nanoft.runtime import distributed


def kto_loss(gain: Tensor, is_desirable: Tensor, kl: float, beta: float, weights: tuple[float, float]) -> Tensor:
    """w+ (1 - sigmoid(beta (c - kl))) or w- (1 - sigmoid(beta (kl - r))) (Ethayarajh et al. 2024, eq. 8)."""
    above = beta * (gain - kl)  # by which an answer's reward exceeds that of an average one
    return torch.where(is_desirable, weights[0] * torch.sigmoid(-above), weights[1] * torch.sigmoid(above))


class KTO(Preference):
    """Kahneman-Tversky optimization: single answers, good or bad, relative to the KL divergence.

    KL(policy | reference) is estimated on the prompts of a window, paired with answers to other prompts.
    """

    unit = "samples"
    learns = "labels"
    settings = ("beta", "desirable_weight", "undesirable_weight")
    uses_reference = True

    def __init__(self, config: Config, adapters: dict[str, Adapter]):
        super().__init__(config, adapters)
        self.forms["mismatched"] = self.mismatched
        self.others, self.max_tokens = np.empty(0, np.int64), 0  # the sample whose answer replaces a sample's own
        self.kl = 0.0

    @classmethod
    def check(cls, config: Config) -> None:
        if config.effective_batch_size() == 1 and not config.data.packing:
            fix = "raise training.gradient_accumulation_steps"
            raise UserError(f"training.objective: kto: compares the answers of a step, but there is only one: {fix}")

    def begin(self, model: Decoder, sides: list[TokenDataset], directory: Path | None, batch_size: int) -> None:
        self.others = np.arange(len(sides[0].all_records))
        for side in sides:
            self.others[side.chosen] = side.chosen[answers_to_others(side)]
        self.max_tokens = max(int(side.lengths.max(initial=0)) for side in sides)
        super().begin(model, sides, directory, batch_size)

    def prepare(self, model: Decoder, window: Window) -> None:
        super().prepare(model, window)
        self.kl = self.estimate_kl(model, window)

    @torch.no_grad()
    def estimate_kl(self, model: Decoder, window: Window) -> float:
        """max(0, mean of log p(y'|x) - log p_ref(y'|x)) over a window, y' answering another prompt; nats per answer."""
        samples, rows, total = window.samples, max(len(batch.ids) for batch in window), 0.0
        with distributed.same_exception(model.device):
            for batch in share_of_rank(eval_batches(self.mismatched(samples), rows, 0)):
                made_of, batch = samples.chosen[batch.samples.chosen], batch.to(model.device)
                reference = self.reference.logps(model, batch, "mismatched", made_of)
                total += (sequence_logps(model, batch) - reference).double().sum().item()
        return max(0.0, distributed.all_reduce_sum(total)[0] / len(samples))

    def mismatched(self, samples: TokenDataset) -> TokenDataset:
        """Each prompt with the answer to another one, no longer than the longest sample of the data."""
        made = list[Sample]()
        for sample, other in zip(samples, samples.select(self.others[samples.chosen]), strict=True):
            prompt, start = prompt_of(sample), len(prompt_of(other))
            length = max(self.max_tokens, len(prompt) + 1)
            ids = np.concatenate([prompt, other.ids[start:]])[:length]
            is_target = np.concatenate([np.zeros(len(prompt), np.bool_), other.is_target[start:]])[:length]
            made.append(Sample(ids, is_target, sample.record))
        return TokenDataset.of(made)

    def measure(self, model: Decoder, batch: Batch) -> tuple[Tensor, Figures]:
        reference, policy = self.reference.logps(model, batch), sequence_logps(model, batch)
        good = batch.samples.labels > 0  # on the CPU, so that counting them does not synchronize
        parts = np.flatnonzero(good), np.flatnonzero(~good), good
        chosen, rejected, is_good = (torch.from_numpy(part).to(policy.device) for part in parts)
        weights = self.preference.desirable_weight, self.preference.undesirable_weight
        gain = policy - reference
        losses, rewards = kto_loss(gain, is_good, self.kl, self.beta, weights), self.beta * gain
        figures = {
            "rewards/chosen": rewards[chosen],
            "rewards/rejected": rewards[rejected],
            "logps/chosen": policy[chosen],
            "logps/rejected": policy[rejected],
            "rewards/accuracies": (rewards > self.beta * self.kl) == is_good,
            "kl": torch.full_like(rewards, self.kl),
        }
        return losses, figures

    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """As for pairs; an answer counts as correct if its reward is above beta KL, or below if it is undesirable."""
        held_out, before = list(batches), self.kl
        self.kl = self.estimate_kl(model, Window(held_out, [0, 0], [0, 0]))
        try:
            return super().evaluate(model, held_out)
        finally:
            self.kl = before


def prompt_of(sample: Sample) -> Array:
    return sample.ids[: int(sample.is_target.argmax())]


def answers_to_others(samples: TokenDataset) -> Array:
    """(n,): for each sample, the nearest earlier sample with another prompt, cyclically."""
    prompts, others = [hash(prompt_of(sample).tobytes()) for sample in samples], np.arange(len(samples)) - 1
    for at in [*range(len(samples))] * 2 if len(set(prompts)) > 1 else []:  # in the second pass, earlier ones are known
        others[at] = at - 1 if prompts[at] != prompts[at - 1] else others[at - 1]
    return others
