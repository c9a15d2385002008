"""Recovery of train.py from a failed step, evaluation or save: nothing is lost, and the result is the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    NO_EVALUATION,
    Capture,
    Patch,
    equal,
    events,
    in_the_loop,
    losses,
    nan_in,
    no_memory,
    quick,
    result,
    steps_are_all_there,
)
from tiers import rest_is_slow

import train
from nanoft import TrainingFailed, UserError, perplexity
from nanoft.checkpoint import CheckpointManager
from nanoft.kernels import sharding
from nanoft.objectives import sft
from nanoft.runtime import memory
from nanoft.training import progress, recovery

# --- not finite


def test_after_too_many_bad_windows_it_goes_back_learns_more_slowly_and_passes_them_over(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Windows 5 to 7 are bad; the last checkpoint is that of step 3; so 3, 4, then 8, 9, ... make steps 4, 5, 6, ..."""
    in_the_loop(monkeypatch, "accumulate", nan_in(6, 7, 8))
    directory = tmp_path / "run"
    assert train.main(quick(directory, **NO_EVALUATION, guard__max_skips=3, training__lr_scheduler="constant")) == 0
    said = capsys.readouterr().out
    assert "rolled back from step 5 to the checkpoint of step 3, at 0.5 of the learning rate" in said
    steps_are_all_there(directory, 8)
    skipped = [(w["step"], w["window"]) for w in events(directory) if w["what"] == "step skipped"]
    places = [window for _, window in skipped]
    assert [step for step, _ in skipped] == [5, 5, 5]
    rates = [line["learning_rate"] for line in events(directory, "train")]
    assert rates[4] == pytest.approx(rates[2] / 2)
    assert rates[3] == pytest.approx(rates[2] / 2), "step 4 was done again"
    saved = json.loads((directory / "checkpoints" / "step-000008" / "state.json").read_text())
    assert saved["guard"]["skipped_windows"] == places
    assert (saved["guard"]["rollbacks"], saved["guard"]["lr_scale"]) == (1, 0.5)
    windows = 5  # of an epoch: 40 records less those held out, 8 a window
    assert saved["epoch"] * windows + saved["window"] == 8 + 3, "three windows were passed over"


def test_going_back_and_resumed_equals_going_back(tmp_path: Path, monkeypatch: Patch) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changes = {**NO_EVALUATION, "guard__max_skips": 3, "training__max_steps": 12}
    with monkeypatch.context() as patch:
        in_the_loop(patch, "accumulate", nan_in(6, 7, 8))
        assert train.main(quick(whole, **changes)) == 0
    with monkeypatch.context() as patch:  # 3 + 2 windows, 3 bad ones, back at 3; stopped with step 7, the 12th call

        def stopping(number: int, real: Any, *args: Any) -> Any:
            if number == 12:
                os.kill(os.getpid(), 15)
            return nan_in(6, 7, 8)(number, real, *args)

        in_the_loop(patch, "accumulate", stopping)
        assert train.main(quick(killed, **changes)) == train.STOPPED_BY_SIGNAL
    assert losses(killed)[-1][0] == 7
    assert train.main(quick(killed, **changes)) == 0
    assert losses(killed) == losses(whole)
    assert equal(result(killed), result(whole))
    assert [w["window"] for w in events(killed) if "window" in w] == [
        w["window"] for w in events(whole) if "window" in w
    ]


def far_too_high(_: int, real: Any, *args: Any) -> float:
    """A learning rate that no config may set, at least 1e29, so that the run diverges at once."""
    return float(1e30 * real(*args))


@pytest.mark.parametrize("allowed", [0, 2])
def test_what_rollbacks_do_not_help_ends_with_3_and_a_diagnosis(
    allowed: int, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    in_the_loop(monkeypatch, "learning_rate", far_too_high)
    changes = {"training__learning_rate": 1.0, "training__max_steps": 20, "guard__max_rollbacks": allowed}
    assert train.main(quick(tmp_path / "run", **changes, guard__rollback_rate=1.0)) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("failed: 5 consecutive windows failed after step")
    assert f"even after {allowed} rollbacks: the " in captured.err
    assert "lower training.learning_rate (1)" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out.count("warning: rolled back from step") == allowed
    assert "conversations.jsonl:" in captured.out


def test_no_rollback_may_be_allowed(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    in_the_loop(monkeypatch, "accumulate", nan_in(3, 4))
    assert train.main(quick(tmp_path / "run", guard__max_skips=2, guard__max_rollbacks=0)) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("failed: 2 consecutive windows failed after step 2, even after 0 rollbacks")
    assert "rolled back" not in captured.out


def test_a_rollback_gets_over_a_learning_rate_that_was_too_high(tmp_path: Path, monkeypatch: Patch) -> None:
    """1e30 diverges at once, and at some rate below only after a checkpoint; far below that it does not."""
    in_the_loop(monkeypatch, "learning_rate", far_too_high)
    changes = {"training__learning_rate": 1.0, "guard__rollback_rate": 0.001, "guard__max_rollbacks": 12}
    assert train.main(quick(tmp_path / "run", **changes, training__max_steps=20, guard__max_skips=1)) == 0
    steps_are_all_there(tmp_path / "run", 20)
    assert all(tensor.isfinite().all() for tensor in result(tmp_path / "run").values())


def test_a_nan_in_a_weight_is_found(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def poisoning(number: int, real: Any, ctx: train.TrainContext, window: Any) -> Any:
        if number == 1:
            with torch.no_grad():
                ctx.model.model.layers[1].mlp.down_proj.base.weight[3, 5] = float("nan")
        return real(ctx, window)

    in_the_loop(monkeypatch, "accumulate", poisoning)
    assert train.main(quick(tmp_path / "run", guard__max_skips=2)) == 3
    assert "the weight model.layers.1.mlp.down_proj" in capsys.readouterr().err


def test_a_spike_is_warned_of_and_by_policy_left_out(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def spiking(number: int, real: Any, *args: Any) -> Any:
        loss, norm = real(*args)
        return (loss * 1e9, norm) if number in (25, 26) else (loss, norm)

    in_the_loop(monkeypatch, "accumulate", spiking)
    changes = {"training__max_steps": 28, "guard__on_spike": "skip", "training__eval_steps": 0}
    assert train.main(quick(tmp_path / "run", **changes)) == 0
    assert [(w["what"], w["step"]) for w in events(tmp_path / "run")] == [("spike", 24), ("step skipped", 25)]
    assert "deviations above the median" in capsys.readouterr().out
    steps_are_all_there(tmp_path / "run", 28)


# --- out of memory


SMALL_WINDOW = {"lora__dropout": 0.0}
PARTS = {"prepare": sft.SFT, "token_nll": sft, "backward": torch.Tensor, "clip_grad_norm": sharding}


@pytest.mark.parametrize("part", rest_is_slow(PARTS, "token_nll", "prepare", "clip_grad_norm"))
def test_out_of_memory_in_a_window_takes_the_same_window_again_in_halves(
    part: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """prepare: of an objective; token_nll: in forward, with a graph half built; backward: with the gradient there."""
    whole, short = tmp_path / "whole", tmp_path / "short"
    assert train.main(quick(whole, **SMALL_WINDOW)) == 0

    def failing(number: int, real: Any, *args: Any) -> Any:
        done = real(*args)
        return no_memory() if number in (4, 7) else done

    with monkeypatch.context() as patch:
        in_the_loop(patch, part, failing, PARTS[part])
        assert train.main(quick(short, **SMALL_WINDOW)) == 0
    assert "out of memory after step" in capsys.readouterr().out
    rows = [w["micro_batch_rows"] for w in events(short) if w["what"] == "out of memory"]
    assert rows == [2, 1]
    for (step, loss), (same, expected) in zip(losses(short), losses(whole), strict=True):
        assert (step, loss) == (same, pytest.approx(expected, rel=1e-5))
    state = json.loads((short / "checkpoints" / "step-000008" / "state.json").read_text())
    assert state["micro_batch_rows"] == 1, "a resumed run begins with what fits"


def test_out_of_memory_with_one_row_ends_with_3_and_what_would_help_most(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    in_the_loop(monkeypatch, "token_nll", no_memory, sft)
    assert train.main(quick(tmp_path / "run")) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("failed: out of memory with micro-batch size 1: try ")
    assert captured.err.count(" (saves about ") == 3
    assert captured.out.count("warning: out of memory after step 0") == 2  # 4 rows, 2 rows


def test_out_of_memory_in_the_optimizer_step_leaves_no_half_step(tmp_path: Path, monkeypatch: Patch) -> None:
    """Some parameters are changed already when it fails."""
    whole, short = tmp_path / "whole", tmp_path / "short"
    assert train.main(quick(whole, **SMALL_WINDOW)) == 0
    build, calls = train.build, [0]

    def building(*args: Any) -> train.TrainContext:
        ctx = build(*args)
        step = ctx.optimizer.step

        def half() -> Any:
            calls[0] += 1
            if calls[0] == 5:
                with torch.no_grad():
                    ctx.trained[0][1].add_(1.0)
                return no_memory()
            return step()

        monkeypatch.setattr(ctx.optimizer, "step", half)
        return ctx

    monkeypatch.setattr(train, "build", building)
    assert train.main(quick(short, **SMALL_WINDOW)) == 0
    for (step, loss), (same, expected) in zip(losses(short), losses(whole), strict=True):
        assert (step, loss) == (same, pytest.approx(expected, rel=1e-5))
    assert [w["what"] for w in events(short)] == ["rolled back", "out of memory"]
    histories = [json.loads((d / "checkpoints" / "step-000008" / "state.json").read_text()) for d in (whole, short)]
    seen, expected = ([len(h["guard"][name]) for name in ("losses", "norms")] for h in reversed(histories))
    assert seen == expected, "what was done again counts once"


def test_out_of_memory_in_evaluation_takes_smaller_batches(tmp_path: Path, monkeypatch: Patch) -> None:
    whole, short = tmp_path / "whole", tmp_path / "short"
    dropout = {"lora__dropout": 0.1}  # stays on afterwards
    assert train.main(quick(whole, **dropout)) == 0
    sizes: list[int] = []

    def failing(_: int, real: Any, samples: Any, size: int, pad_id: int) -> Any:
        sizes.append(size)
        return no_memory() if size > 4 else real(samples, size, pad_id)

    with monkeypatch.context() as patch:
        in_the_loop(patch, "eval_batches", failing, progress)
        assert train.main(quick(short, **dropout)) == 0
    assert sizes[:4] == [32, 16, 8, 4]
    assert [loss for _, loss in losses(short, "eval")] == pytest.approx([loss for _, loss in losses(whole, "eval")])


def test_out_of_memory_inside_an_evaluation_leaves_the_mode_as_it_was(tmp_path: Path, monkeypatch: Patch) -> None:
    """Dropout shows whether the model trains on in training mode."""
    whole, short, calls = tmp_path / "whole", tmp_path / "short", [0]
    assert train.main(quick(whole, lora__dropout=0.2)) == 0
    real = perplexity.token_nll

    def failing(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return no_memory() if calls[0] == 1 else real(*args, **options)

    def evaluating(_: int, validate: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(perplexity, "token_nll", failing)
            return validate(*args)

    in_the_loop(monkeypatch, "validate", evaluating, progress)
    assert train.main(quick(short, lora__dropout=0.2)) == 0
    assert calls[0] > 1
    assert losses(short) == losses(whole)


# --- evaluation and saves that fail


def test_an_evaluation_that_fails_is_an_event(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def failing(number: int, real: Any, *args: Any) -> Any:
        if number == 1:
            raise ValueError("no such thing")
        return real(*args)

    in_the_loop(monkeypatch, "validate", failing, progress)
    assert train.main(quick(tmp_path / "run")) == 0
    assert "warning: evaluation failed after step 4: ValueError: no such thing" in capsys.readouterr().out
    assert [(w["what"], w["error"]) for w in events(tmp_path / "run")] == [
        ("evaluation failed", "ValueError: no such thing")
    ]
    assert [step for step, _ in losses(tmp_path / "run", "eval")] == [8]


def refuse_saves(patch: Patch, *steps: int) -> None:
    save = CheckpointManager.save

    def failing(self: CheckpointManager, step: int, *rest: Any) -> Path:
        if step in steps:
            raise OSError(28, "No space left on device")
        return save(self, step, *rest)

    patch.setattr(CheckpointManager, "save", failing)


def test_training_goes_on_after_a_save_that_failed(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    whole, short = tmp_path / "whole", tmp_path / "short"
    assert train.main(quick(whole)) == 0
    refuse_saves(monkeypatch, 0, 3, 4)  # 4 is the best so far
    assert train.main(quick(short)) == 0
    said = capsys.readouterr().out
    assert "warning: saving step 3 failed after step 4: OSError: [Errno 28] No space left on device" in said
    assert equal(result(short), result(whole))
    assert [w["what"] for w in events(short)] == [f"saving step {step} failed" for step in (0, 3, 4)]
    assert json.loads((short / "best.json").read_text())["step"] == 8


def test_the_best_so_far_is_not_forgotten_when_a_better_one_cannot_be_saved(tmp_path: Path, monkeypatch: Patch) -> None:
    found = iter([2.2, 2.0, 2.5, 2.4])  # after steps 2, 4, 6, 8
    in_the_loop(monkeypatch, "validate", lambda *_: {"loss": next(found)}, progress)
    refuse_saves(monkeypatch, 4)
    assert train.main(quick(tmp_path / "run", training__eval_steps=2, training__keep_checkpoints=1)) == 0
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == 2
    steps = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert steps == ["step-000002", "step-000008"]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["training"]["best_step"] == 2


def test_if_the_last_save_never_worked_the_exit_code_says_so(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    refuse_saves(monkeypatch, 8)
    assert train.main(quick(tmp_path / "run")) == 2
    assert capsys.readouterr().err == ("error: No space left on device: fix that and run the same command again\n")
    monkeypatch.undo()
    assert train.main(quick(tmp_path / "run")) == 0
    steps_are_all_there(tmp_path / "run", 8)


def test_going_back_with_nothing_to_go_back_to_ends_with_3(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    refuse_saves(monkeypatch, 0)
    in_the_loop(monkeypatch, "accumulate", nan_in(1, 2))
    assert train.main(quick(tmp_path / "run", guard__max_skips=2)) == 3
    assert "there is no earlier checkpoint" in capsys.readouterr().err


# --- memory is watched


def test_memory_is_told_at_every_stage_and_warned_of(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(memory.MemoryMonitor, "LEVELS", (1e-4,))
    assert train.main(quick(tmp_path / "run")) == 0
    stages = [line["stage"] for line in events(tmp_path / "run", "memory") if "stage" in line]
    assert stages == ["prepared", "evaluated", "evaluated", "finished"]
    assert all(0.05 < line["host_held_gb"] < line["host_limit_gb"] for line in events(tmp_path / "run", "train"))
    (warning,) = events(tmp_path / "run")
    assert (warning["what"], warning["step"]) == ("memory", 1)
    assert "of its host memory limit" in warning["text"]
    assert "warning: memory after step 1: the process holds" in capsys.readouterr().out


# --- on CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("bits", "temperature"), [(16, 0), (4, 0), (16, 0.7)])
def test_on_cuda_two_deterministic_runs_are_one(bits: int, temperature: float, tmp_path: Path) -> None:
    changes = {"system__device": "cuda", "system__deterministic": True, "quantization__bits": bits}
    changes |= {"evaluation__temperature": temperature}
    for name in ("a", "b"):
        assert train.main(quick(tmp_path / name, **changes, lora__dropout=0.1)) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert equal(result(tmp_path / "a"), result(tmp_path / "b"))
    one, other = (json.loads((tmp_path / name / "report.json").read_text())["tuned"]["stop_rate"] for name in "ab")
    assert one == other is not None  # a failed evaluation does not end a run


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_memory_that_really_runs_out_halves_the_micro_batch(tmp_path: Path, capsys: Capture) -> None:
    changes = {"system__device": "cuda", "training__micro_batch_size": 32, "training__gradient_accumulation_steps": 1}
    peaks = {}
    for rows in (4, 32):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        split = {"training__micro_batch_size": rows, "training__gradient_accumulation_steps": 32 // rows}
        assert train.main(quick(tmp_path / str(rows), **{**changes, **split})) == 0
        peaks[rows] = torch.cuda.max_memory_reserved()
    capsys.readouterr()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((peaks[4] + peaks[32]) / 2 / total)
    try:
        assert train.main(quick(tmp_path / "short", **changes)) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in capsys.readouterr().out
    same = [loss for _, loss in losses(tmp_path / "4")]
    assert [loss for _, loss in losses(tmp_path / "short")] == pytest.approx(same, rel=1e-2)


def test_the_clauses_of_the_ladder_are_those_of_recovery() -> None:
    """OutOfMemory, SkipStep and RollBack are not errors that a command reports; Diverged is."""
    assert issubclass(recovery.RollBack, recovery.SkipStep)
    assert issubclass(recovery.Diverged, TrainingFailed)
    assert not issubclass(recovery.SkipStep, (TrainingFailed, UserError))
    assert not issubclass(recovery.OutOfMemory, (TrainingFailed, UserError))
