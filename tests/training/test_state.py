"""The training state: the logged loss, and checkpoints of earlier versions."""

from __future__ import annotations

import pytest
import torch

from nanoft.batches import Batch, TokenDataset, Window
from nanoft.training.state import TrainState


def window(targets: int, index: int) -> Window:
    numbers = torch.zeros(targets, dtype=torch.int64)
    samples = TokenDataset.of([])
    batch = Batch(numbers[None], None, None, numbers, numbers, numbers, 2 * targets, samples)
    return Window([batch], [0, index], [0, index + 1])


def test_the_logged_loss_is_the_mean_over_the_units_of_the_objective() -> None:
    """Pairs, for example: a window of 3 and one of 1, whose numbers of target tokens are the other way round."""
    state = TrainState()
    state.advance(window(10, 0), 2.0, units=3, seconds=1.0, joules=0.0)
    state.advance(window(90, 1), 6.0, units=1, seconds=1.0, joules=0.0)
    assert (state.step, state.epoch, state.window) == (2, 0, 2)
    figures = {"loss": 3.0, "tokens_per_second": 100.0, "target_tokens_per_second": 50.0}
    assert state.meter.flush() == pytest.approx(figures)
