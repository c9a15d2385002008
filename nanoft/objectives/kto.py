"""KTO: learn from single answers that are good or bad, which are easier to collect than pairs.

A reward is felt as a gain or a loss against a point of origin (Kahneman and Tversky 1979). The reward of an answer is
beta (log p(y|x) - log p_ref(y|x)), and the origin that of an average one, beta KL(policy | reference) (Ethayarajh et
al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization"). The KL divergence is estimated before each step,
over its whole window and all ranks, on prompts with the answer to another prompt: micro-batches do not change it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from nanoft import UserError
from nanoft.batches import Batch, Sample, TokenDataset, Window, eval_batches, share_of_rank
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.model import Decoder
from nanoft.objectives.preference import Figures, Preference
from nanoft.objectives.reference import sequence_logps
from nanoft.runtime import distributed


def kto_loss(gain: Tensor, is_desirable: Tensor, kl: float, beta: float, weights: tuple[float, float]) -> Tensor:
    """w+ (1 - sigmoid(beta (c - kl))) or w- (1 - sigmoid(beta (kl - r))) (Ethayarajh et al. 2024, eq. 8)."""
    above = beta * (gain - kl)  # how far an answer's reward is above that of an average one
    return torch.where(is_desirable, weights[0] * torch.sigmoid(-above), weights[1] * torch.sigmoid(above))


class KTO(Preference):
    """Kahneman-Tversky optimization: single answers, good or bad, against the KL divergence as the point of origin.

    KL(policy | reference) is estimated on prompts with an answer to another prompt of the same window.
    """

    unit = "samples"
    learns = "labels"
    settings = ("beta", "desirable_weight", "undesirable_weight")
    uses_reference = True

    def __init__(self, config: Config, adapters: dict[str, Adapter]):
        super().__init__(config, adapters)
        self.kl = 0.0

    @classmethod
    def check(cls, config: Config) -> None:
        if config.training.method == "full":
            why = "needs the reference at every step, for answers to other prompts"
            raise UserError(f"training.method: full: training.objective=kto {why}: set training.method=lora")
        if config.effective_batch_size() == 1 and not config.data.packing:
            fix = "raise training.gradient_accumulation_steps"
            raise UserError(f"training.objective: kto: compares the answers of a step, and this run has one: {fix}")

    def prepare(self, model: Decoder, window: Window) -> None:
        super().prepare(model, window)
        self.kl = self.estimate_kl(model, window)

    @torch.no_grad()
    def estimate_kl(self, model: Decoder, window: Window) -> float:
        """max(0, mean of log p(y'|x) - log p_ref(y'|x)) over a window, y' answering another prompt; nats per answer."""
        samples, rows = mismatched(window.samples), max(len(batch.ids) for batch in window)
        total = 0.0
        for batch in share_of_rank(eval_batches(samples, rows, 0)):
            batch = batch.to(model.device)
            total += (sequence_logps(model, batch) - self.reference.logps(model, batch)).double().sum().item()
        return max(0.0, distributed.all_reduce_sum(total)[0] / len(samples))

    def measure(self, model: Decoder, batch: Batch) -> tuple[Tensor, Figures]:
        reference, policy = self.reference.logps(model, batch), sequence_logps(model, batch)
        is_good = torch.from_numpy(batch.samples.labels > 0).to(policy.device)
        weights = self.preference.desirable_weight, self.preference.undesirable_weight
        gain = policy - reference
        losses, rewards = kto_loss(gain, is_good, self.kl, self.beta, weights), self.beta * gain
        figures = {
            **{f"rewards/{name}": rewards[own] for name, own in (("chosen", is_good), ("rejected", ~is_good))},
            **{f"logps/{name}": policy[own] for name, own in (("chosen", is_good), ("rejected", ~is_good))},
            "rewards/accuracies": (rewards > self.beta * self.kl) == is_good,
            "kl": torch.full_like(rewards, self.kl),
        }
        return losses, figures

    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """As of pairs; an answer is on the right side if its reward is above beta KL or, undesirable, below."""
        held_out, before = list(batches), self.kl
        with distributed.same_exception(model.device):
            self.kl = self.estimate_kl(model, Window(held_out, [0, 0], [0, 0]))
        try:
            return super().evaluate(model, held_out)
        finally:
            self.kl = before


def mismatched(samples: TokenDataset) -> TokenDataset:
    """Each prompt with the answer of the sample before it, the first one's with the last's; not of its own record."""
    made, longest, all_samples = list[Sample](), int(samples.lengths.max()), list(samples)
    for at, sample in enumerate(all_samples):
        others = (all_samples[at - back] for back in range(1, len(all_samples)))
        other = next((s for s in others if s.record != sample.record), all_samples[at - 1])
        prompt = sample.ids[: int(sample.is_target.argmax())]
        ids = np.concatenate([prompt, other.ids[int(other.is_target.argmax()) :]])[: max(longest, len(prompt) + 1)]
        is_target = np.append(np.zeros(len(prompt), np.bool_), other.is_target[int(other.is_target.argmax()) :])
        made.append(Sample(ids, is_target[: len(ids)], sample.record))
    return TokenDataset.of(made)
