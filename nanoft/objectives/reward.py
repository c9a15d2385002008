"""Reward models: predict a score for an answer, learned from pairs in which one answer is better.

A scalar head w, `score`, replaces the head for logits and reads the last hidden state h of the last token: r = w . h.
The probability that y+ is better than y- is sigmoid(r+ - r-) (Bradley and Terry 1952), and its negative log-likelihood
is the loss. Only differences are learned; `preference.center` keeps rewards around zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoft import UserError
from nanoft.batches import Batch, eval_batches
from nanoft.metrics.rewards import Answered
from nanoft.model import Decoder
from nanoft.models.open import open_chat_tokenizer, open_model
from nanoft.objectives.preference import Figures, Preference


def answer_rewards(model: Decoder, batch: Batch) -> Tensor:
    """r of each of the s samples of a batch, (s,) float32, at the last token, as in transformers."""
    assert model.score is not None
    ends = torch.bincount(batch.sequence, minlength=len(batch.samples)).cumsum(0)  # (s,) of each sample's targets
    inside = batch.target_positions[ends - 1]  # (s,) a position in each sample
    lengths = torch.from_numpy(batch.samples.lengths).to(inside.device)
    place = inside % batch.ids.shape[1] if batch.positions is None else batch.positions.flatten()[inside]
    last = inside - place + lengths - 1  # a document begins where its place is 0
    hidden = model(batch.ids, batch.positions, batch.documents, last)[0]  # (s, hidden)
    return (hidden.float() * model.score.weight.float()).sum(-1)  # autocast would round a matrix product


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, center: float) -> Tensor:
    """-log sigmoid(r+ - r- - margin) (Touvron et al. 2023, eq. 2) + center (r+ + r-)^2 (Eisenstein et al. 2023)."""
    return -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected).square()


class TrainedReward:
    """The reward model of a run, as a reward function for objectives that sample."""

    def __init__(self, run: str, device: torch.device, dtype: torch.dtype):
        opened = open_model(run, device, dtype)
        if opened.model.score is None:
            raise UserError(f"rl.reward: run:{run}: not a reward model: name a run of training.objective=reward")
        self.model, self.chat = opened.model, open_chat_tokenizer(run, opened, as_trained=True)

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answered], batch_size: int = 16) -> list[float]:
        """The reward of each answer, at the end of its conversation."""
        rendered = [
            self.chat.render_samples(
                [*a.prompt.messages, {"role": "assistant", "content": a.answer}], at, a.prompt.tools,
                template_args=a.prompt.template_args,
            )[-1]
            for at, a in enumerate(answers)
        ]  # fmt: skip
        found: dict[int, float] = {}
        for batch in eval_batches(self.chat.encode_now(rendered), batch_size, self.chat.pad_id):
            found |= zip(batch.records, answer_rewards(self.model, batch.to(self.model.device)).tolist(), strict=True)
        return [found[at] for at in range(len(answers))]


class RewardModel(Preference):
    """A Bradley-Terry model of pairs; data.margin_field says how much better the chosen answer is."""

    settings: ClassVar[tuple[str, ...]] = ("center",)

    def measure(self, model: Decoder, batch: Batch) -> tuple[Tensor, Figures]:
        rewards = answer_rewards(model, batch)
        chosen, rejected = rewards[::2], rewards[1::2]
        margin = torch.from_numpy(batch.samples.labels[::2]).to(rewards.device)
        return reward_loss(chosen, rejected, margin, self.preference.center), {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": chosen > rejected,
        }
