"""What a bad step leads to, and what is said when memory runs out."""

from __future__ import annotations

import math

import pytest
import torch

from nanoft import TrainingFailed
from nanoft.guard import Guard, explain_out_of_memory

NAN, INFINITE = math.nan, math.inf


@pytest.mark.parametrize("bad", [(NAN, 1.0), (1.0, NAN), (INFINITE, 1.0), (1.0, INFINITE), (-INFINITE, 1.0)])
def test_a_loss_or_gradient_that_is_not_finite_is_skipped(bad: tuple[float, float]) -> None:
    assert Guard(2).judge(*bad) == "skip"


def test_any_finite_step_is_taken() -> None:
    guard = Guard(1)
    assert [guard.judge(*step) for step in ((0.0, 0.0), (1e30, 1e30), (-1.0, 5.0))] == ["ok"] * 3


def test_only_bad_steps_in_a_row_stop_the_run() -> None:
    guard = Guard(3)
    losses = [NAN, NAN, 1.0, NAN, NAN, NAN]
    assert [guard.judge(loss, 1.0) for loss in losses] == ["skip", "skip", "ok", "skip", "skip", "stop"]


def test_one_bad_step_may_be_one_too_many() -> None:
    assert Guard(1).judge(1.0, NAN) == "stop"


def test_out_of_memory_becomes_advice() -> None:
    failed = explain_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"), 8, 2048)
    assert isinstance(failed, TrainingFailed)
    text = str(failed)
    assert "micro-batch 8" in text
    for advice in ("training.micro_batch_size=4", "model.max_seq_length=1024", "quantization.bits=4"):
        assert advice in text
    assert "\n" not in text


def test_a_micro_batch_of_one_cannot_be_smaller() -> None:
    text = str(explain_out_of_memory(MemoryError(), 1, 512))
    assert "model.max_seq_length=256" in text
    assert "micro_batch_size" not in text


def test_another_error_is_left_alone() -> None:
    assert explain_out_of_memory(RuntimeError("shapes cannot be multiplied"), 8, 512) is None
