"""What changes while training: the loss that is logged, and checkpoints of earlier versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanoft.batches import Batch, TokenDataset, Window
from nanoft.checkpoint import Checkpoint
from nanoft.runtime.device import rng_state
from nanoft.training.state import TrainState, read_state


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


def test_a_checkpoint_of_an_earlier_version_is_read() -> None:
    meter = {"nats": 6.0, "tokens": 9, "target_tokens": 3, "seconds": 1.0, "total_tokens": 9, "total_seconds": 1.0}
    guard = {"losses": [2.0], "rate": 0.5, "left_out": [[0, 1]]}
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state = read_state(Checkpoint(Path(), {"step": 1, "rng": rng_state(), "meter": meter, "guard": guard}), scaler)
    assert (state.guard.lr_scale, state.guard.skipped_windows) == (0.5, [[0, 1]])
    assert state.meter.flush()["loss"] == 2.0
    assert scaler.get_scale() == 4.0, "it has none"
