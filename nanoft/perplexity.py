"""Perplexity: exp of the mean negative log-likelihood, over all tokens at once.

    perplexity = exp(sum of -log p(token)  /  number of tokens)

The sums run over every token of every batch and rank, in float64. A mean of the batches' means would give the tokens
of a fuller batch less weight, and would change with the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from nanoft import UserError
from nanoft.batches import Batch, share_of_rank
from nanoft.loss import token_nll
from nanoft.model import Decoder
from nanoft.runtime import distributed


def safe_exp(nats: float) -> float:
    """exp that returns infinity where Python would raise."""
    return math.exp(nats) if not nats >= 700 else math.inf


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """The model in evaluation mode; its mode is restored even after an exception, since the caller may try again."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def validation_loss(model: Decoder, batches: Iterable[Batch]) -> tuple[float, int]:
    """(nats per target token, target tokens) over all batches, split over the ranks; a UserError without targets."""
    nats, count = 0.0, 0
    with evaluating(model), distributed.same_exception(model.device):
        for batch in share_of_rank(batches):
            placed = batch.to(model.device)
            hidden = model(placed.ids, placed.positions, placed.documents, placed.target_positions)
            nll = token_nll(hidden, model.head, placed.targets, cap=model.config.logit_cap)
            nats += nll.cpu().double().sum().item()
            count += batch.target_tokens
    nats, tokens = distributed.all_reduce_sum(nats, count)
    if not tokens:
        raise UserError("validation data: no sample has target tokens: check data.train_on")
    return nats / tokens, int(tokens)
