"""Supervised fine-tuning of a model with experts, which are kept equally busy.

    loss of a step = sum over target tokens of (-log p(token | tokens before it) + alpha L(its document))
                     /  target tokens of the window

L is the balance loss (`Balance` in nanoft/blocks/moe.py) over all tokens of a document, its prompt included. As a term
of each target token it is the same however a window is split, packed or padded; the form of Switch and Mixtral, a
product of means over all tokens of a forward pass, is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanoft.batches import Batch, Window
from nanoft.blocks.moe import Balance, Experts
from nanoft.config import Config
from nanoft.loss import token_nll
from nanoft.model import Decoder, select
from nanoft.objectives.preference import add, means
from nanoft.objectives.sft import SFT


class BalancedSFT(SFT):
    """SFT with alpha L, where alpha is training.balance_loss."""

    def __init__(self, config: Config, adapters: object = None):
        super().__init__(config)
        self.alpha, self.sums = config.training.balance_loss, dict[str, Tensor]()

    def prepare(self, model: Decoder, window: Window) -> None:
        self.sums = {}

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        halves: list[Any] = [block.mlp for block in model.model.layers]
        layers = [part for half in halves for part in (half, *half.children()) if isinstance(part, Experts)]
        balance = Balance(document_lengths(batch), layers, batch.ids.device)
        hidden = model(batch.ids, batch.positions, batch.documents)  # everywhere: the last router needs all tokens
        more = self.label_smoothing, self.z_loss, model.config.logit_cap
        nll = token_nll(select(hidden, batch.target_positions), model.head, batch.targets, *more)
        document = balance.document[batch.target_positions]  # (targets,)
        own = balance.losses[document]
        add(self.sums, {"balance_loss": own})
        weights = self.alpha * torch.zeros_like(balance.losses).index_add(0, document, torch.ones_like(own))
        loss = nll.sum() + self.alpha * own.sum()
        loss.register_hook(lambda gradient: setattr(balance, "gradient", gradient * weights))
        return loss

    def figures(self) -> dict[str, float]:
        return means(self.sums)


def document_lengths(batch: Batch) -> list[int]:
    """Tokens of each document of a batch, in order; padding, in which nothing is a target, counts as documents."""
    padded = [n for length in batch.samples.lengths.tolist() for n in (length, batch.ids.shape[1] - length)]
    lengths = padded if batch.documents is None else batch.documents.lengths
    return [*lengths, batch.ids.numel() - sum(lengths)]  # the rest: everything, if there are no samples
