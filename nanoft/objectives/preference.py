"""Preferences: make the better of two answers more likely than the other, without a reward model (DPO and relatives).

Let log p(y|x) be the log-probability of an answer y to a prompt x, a sum over its |y| tokens. The policy is the model
that is trained; the reference is the policy at step 0, from which it should not move far (`reference.py`). With

    c = log p(y+|x) - log p_ref(y+|x)        how much more likely the chosen answer is than under the reference,
    r = log p(y-|x) - log p_ref(y-|x)        and the rejected answer,

beta c and beta r are implicit rewards: the policy is the optimum of those rewards less beta times its KL divergence
from the reference (Rafailov et al. 2023, "Direct Preference Optimization", section 4). The loss of a step is a mean
over the pairs of its window, however they are split into micro-batches. The answers of a pair are two documents in one
row of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoft.batches import Batch, TokenDataset, Window, share_of_rank
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.data.formats import Learns
from nanoft.model import Decoder
from nanoft.objectives.objective import Objective
from nanoft.objectives.reference import Form, Reference, answer_tokens, sequence_logps
from nanoft.perplexity import evaluating
from nanoft.runtime import distributed

Figures = dict[str, Tensor]  # one value for each pair or answer


@dataclass(frozen=True)
class Answers:
    """log p of n chosen and n rejected answers, and their lengths in tokens; (n,) each."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @classmethod
    def of(cls, logps: Tensor, tokens: Tensor) -> Answers:
        """From the values of a batch, (2n,), in which chosen and rejected answers alternate."""
        return cls(logps[::2], logps[1::2], tokens[::2], tokens[1::2])

    def per_token(self) -> tuple[Tensor, Tensor]:
        """log p(y|x) / |y|, the geometric mean of the tokens' probabilities as a logarithm."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens

    def gained_over(self, reference: Answers) -> Answers:
        """c and r."""
        return replace(self, chosen=self.chosen - reference.chosen, rejected=self.rejected - reference.rejected)


# ---- Losses of n pairs, (n,); `gain` holds c and r; e is the share of wrong labels


def sigmoid_loss(gain: Answers, beta: float, e: float) -> Tensor:
    """-(1 - e) log sigmoid(beta (c - r)) - e log sigmoid(-beta (c - r)); e > 0: Mitchell 2023, "conservative DPO"."""
    margin = beta * (gain.chosen - gain.rejected)
    return -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)


def robust_loss(gain: Answers, beta: float, e: float) -> Tensor:
    """[-(1 - e) log sigmoid(beta (c - r)) + e log sigmoid(-beta (c - r))] / (1 - 2e) (Chowdhury et al. 2024)."""
    margin = beta * (gain.chosen - gain.rejected)
    return (-(1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)) / (1 - 2 * e)


def ipo_loss(gain: Answers, beta: float, e: float) -> Tensor:
    """(c/|y+| - r/|y-| - 1/(2 beta))^2, which has a finite optimal margin (Azar et al. 2023, eq. 17)."""
    chosen, rejected = gain.per_token()
    return (chosen - rejected - 1 / (2 * beta)).square()


DPO_LOSSES: dict[str, Callable[[Answers, float, float], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "ipo": ipo_loss,
}


def orpo_loss(policy: Answers, beta: float) -> Tensor:
    """-log p+ - beta log sigmoid(log odds(p+) - log odds(p-)); p per token, odds(p) = p/(1 - p) (Hong et al. 2024)."""
    chosen, rejected = policy.per_token()
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds)


def simpo_loss(policy: Answers, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (log p+ - log p-) - gamma), p per token (Meng et al. 2024, eq. 6)."""
    chosen, rejected = policy.per_token()
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0 without losing digits (Maechler 2012); for 0, to which x may round, a finite value."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -0.6931472, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


# ---- Objectives


class Preference(Objective):
    """The common part of the objectives; each defines `measure`."""

    unit = "pairs"
    learns: ClassVar[Learns] = "pairs"
    default_beta: ClassVar[float] = 0.1
    settings: ClassVar[tuple[str, ...]] = ("beta",)  # the fields of `preference` that it reads
    uses_reference = False

    def __init__(self, config: Config, adapters: dict[str, Adapter]):
        self.preference, self.beta = config.preference, config.preference.beta or self.default_beta
        self.reference = Reference(config, adapters)
        self.forms: dict[str, Form] = {"logps": lambda samples: samples}  # forms of the samples that need log p_ref
        self.sums: dict[str, Tensor] = {}

    def measure(self, model: Decoder, batch: Batch) -> tuple[Tensor, Figures]:
        """The loss of each unit, (n,), differentiable; and figures, whose means are logged."""
        raise NotImplementedError

    def begin(self, model: Decoder, sides: list[TokenDataset], directory: Path | None, batch_size: int) -> None:
        if self.uses_reference and not self.reference.adapters:
            self.reference.precompute(model, sides, directory, batch_size, self.forms)

    def prepare(self, model: Decoder, window: Window) -> None:
        self.sums = {}

    def count(self, window: Window) -> float:
        return window.units

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        """Sum over the units of a micro-batch."""
        losses, figures = self.measure(model, batch)
        add(self.sums, figures)
        return losses.sum()

    def figures(self) -> dict[str, float]:
        return means(self.sums)

    @torch.no_grad()
    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss, rewards (chosen, rejected, margin, share of positive margins), log-probabilities, KL per token."""
        sums = dict[str, Tensor]()
        with evaluating(model), distributed.same_exception(model.device):
            for batch in share_of_rank(batches):
                batch = batch.to(model.device)
                losses, figures = self.measure(model, batch)
                if self.uses_reference:
                    figures |= {"kl_per_token": self.reference.kl_divergence(model, batch)}
                add(sums, {"loss": losses, **figures})
        return means(sums)


class DPO(Preference):
    """Direct preference optimization; preference.sft_weight adds the chosen answers' NLL per token."""

    settings = ("loss", "beta", "label_smoothing", "sft_weight")
    uses_reference = True

    def measure(self, model: Decoder, batch: Batch) -> tuple[Tensor, Figures]:
        tokens = answer_tokens(batch)
        reference = Answers.of(self.reference.logps(model, batch), tokens)  # first, so that its activations are freed
        policy = Answers.of(sequence_logps(model, batch), tokens)
        gain = policy.gained_over(reference)
        losses = DPO_LOSSES[self.preference.loss](gain, self.beta, self.preference.label_smoothing)
        figures = pair_figures(policy, self.beta * gain.chosen, self.beta * gain.rejected)
        return losses - self.preference.sft_weight * policy.per_token()[0], figures


class ORPO(Preference):
    """Supervised fine-tuning on the chosen answers, with an odds ratio against the rejected ones; no reference."""

    def measure(self, model: Decoder, batch: Batch) -> tuple[Tensor, Figures]:
        policy = Answers.of(sequence_logps(model, batch), answer_tokens(batch))
        rewards = (self.beta * logp for logp in policy.per_token())
        return orpo_loss(policy, self.beta), pair_figures(policy, *rewards)


class SimPO(Preference):
    """The log-probability per token is the reward, and the chosen answer's must be gamma larger; no reference."""

    default_beta = 2.0
    settings = ("beta", "gamma", "sft_weight")

    def measure(self, model: Decoder, batch: Batch) -> tuple[Tensor, Figures]:
        policy = Answers.of(sequence_logps(model, batch), answer_tokens(batch))
        rewards = (self.beta * logp for logp in policy.per_token())
        losses = simpo_loss(policy, self.beta, self.preference.gamma)
        return losses - self.preference.sft_weight * policy.per_token()[0], pair_figures(policy, *rewards)


def pair_figures(policy: Answers, chosen: Tensor, rejected: Tensor) -> Figures:
    """The logged figures of pairs; chosen, rejected: their rewards, (n,)."""
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }


def add(sums: dict[str, Tensor], figures: Figures) -> None:
    """Accumulate the sum of each figure, and the number of its values."""
    for name, values in figures.items():
        total = values.detach().float().sum()
        found = torch.stack([total, torch.full_like(total, len(values))])  # filled on the device, without a wait
        sums[name] = sums[name] + found if name in sums else found


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each figure over all ranks; figures without values are omitted."""
    totals = distributed.all_reduce_sum(*torch.cat([*sums.values()]).tolist()) if sums else []
    pairs = zip(sums, totals[::2], totals[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count}
