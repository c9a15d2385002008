"""TODO."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nanoft import UserError
from nanoft.batches import Sample, eval_batches, pad_to_multiple
from nanoft.loss import token_nll
from nanoft.model import Decoder
from nanoft.runtime import distributed


def safe_exp(nats: float) -> float:
    """exp that gives infinity where Python would raise."""
    return math.exp(nats) if not nats >= 700 else math.inf


# ---- How likely is what is known


@torch.no_grad()
def validation_loss(model: Decoder, samples: Sequence[Sample], batch_size: int, pad_id: int) -> tuple[float, int]:
    """(nats per target token, target tokens) over all samples; sums in float64, on the CPU.

    Raises:
        UserError: no sample has a target.
    """
    training, device = model.training, model.head.device
    model.eval()
    nats, count = 0.0, 0
    try:
        with distributed.same_exception(device):
            for batch in distributed.shard(
                pad_to_multiple(eval_batches(samples, batch_size, pad_id), distributed.world_size())
            ):
                placed = batch.to(device)
                hidden = model(placed.ids, placed.positions, placed.documents, placed.target_positions)
                nats += token_nll(hidden, model.head, placed.targets).cpu().double().sum().item()
                count += batch.target_tokens
    finally:
        model.train(training)  # also when memory runs out: whoever tries again, and training, find the mode they left
    nats, tokens = distributed.all_reduce_sum(nats, count)
    if not tokens:
        raise UserError("validation data: it has no target token, so there is nothing to measure: see data.train_on")
    return nats / tokens, int(tokens)
