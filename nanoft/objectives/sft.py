"""Supervised fine-tuning: make the assistant's tokens likely, all with the same weight.

    loss of a step = sum over target tokens of -log p(token | tokens before it)  /  target tokens of the window

Prompt tokens are read but never predicted: their positions have no logits and no loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from nanoft import perplexity
from nanoft.batches import Batch, Window
from nanoft.config import Config
from nanoft.data.formats import Learns
from nanoft.loss import token_nll
from nanoft.model import Decoder
from nanoft.objectives.objective import Objective


class SFT(Objective):
    """The sum of the negative log-likelihood over target tokens, with optional label smoothing and z-loss."""

    unit = "target tokens"
    learns: ClassVar[Learns] = "turns"

    def __init__(self, config: Config, adapters: object = None):
        self.label_smoothing, self.z_loss = config.training.label_smoothing, config.training.z_loss

    def count(self, window: Window) -> float:
        return window.target_tokens

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        """Sum over the target tokens of a micro-batch, in nats."""
        hidden = model(batch.ids, batch.positions, batch.documents, batch.target_positions)  # (1, targets, hidden)
        more = self.label_smoothing, self.z_loss, model.config.logit_cap
        return token_nll(hidden, model.head, batch.targets, *more).sum()

    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """Loss in nats per target token (never smoothed), its perplexity, and the number of target tokens."""
        loss, target_tokens = perplexity.validation_loss(model, batches)
        return {"loss": loss, "perplexity": perplexity.safe_exp(loss), "target_tokens": target_tokens}
