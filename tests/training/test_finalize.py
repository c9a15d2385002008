"""The end of a run: the result stands whatever becomes of the report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Capture, Patch, equal, events, in_the_loop, quick, result, sentences, steps_are_all_there
from safetensors.torch import load_file

import train
from nanoft.tracking import rank_usage
from nanoft.training import finalize


def test_a_best_checkpoint_that_was_damaged_is_told_and_the_last_one_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = {"training__early_stopping_threshold": 1e-9, "training__eval_steps": 2, "training__save_steps": 1}
    patience |= {"data__validation_file": sentences(tmp_path), "training__learning_rate": 5e-3}
    real = train.finalize

    def damaging(ctx: Any, state: Any, stop: Any) -> int:
        assert 0 < state.best_step < state.step
        (ctx.checkpoints.path(state.best_step) / "state.json").write_bytes(b"{}")
        return real(ctx, state, stop)

    monkeypatch.setattr(train, "finalize", damaging)
    assert train.main(quick(tmp_path / "run", **patience)) == 0
    assert "the result is not the best checkpoint, but the last" in capsys.readouterr().out
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000008" / "adapter.safetensors")
    assert equal(result(tmp_path / "run"), saved)


def test_a_signal_while_the_report_is_made_ends_with_75_and_the_same_command_makes_it(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    measure = finalize.measure

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), 15)
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finalize, "measure", interrupted)
        assert train.main(quick(tmp_path / "run")) == train.STOPPED_BY_SIGNAL
    assert "stopped   by SIGTERM before the report" in capsys.readouterr().out
    assert not (tmp_path / "run" / "report.json").exists()
    before = (tmp_path / "run" / "checkpoints" / "step-000008").stat().st_ino
    assert train.main(quick(tmp_path / "run")) == 0
    assert (tmp_path / "run" / "report.json").exists()
    steps_are_all_there(tmp_path / "run", 8)
    assert (tmp_path / "run" / "checkpoints" / "step-000008").stat().st_ino == before, (
        "what is there is not saved again"
    )


def test_a_last_step_that_diverges_is_no_result(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """No step follows that could be judged."""
    in_the_loop(monkeypatch, "learning_rate", lambda number, real, *args: 1e38 * real(*args))
    changes = {"training__learning_rate": 1.0, "training__max_steps": 1, "training__warmup_ratio": 0.0}
    assert train.main(quick(tmp_path / "run", **changes)) == 3
    assert "is not finite: lower training.learning_rate (1)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()


def test_ranks_that_cannot_be_computed_cost_no_report(tmp_path: Path, monkeypatch: Patch) -> None:
    def not_converging(*_: Any) -> Any:
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    monkeypatch.setattr(rank_usage, "rank_report", not_converging)
    assert train.main(quick(tmp_path / "run")) == 0
    assert [w["what"] for w in events(tmp_path / "run")] == ["the adapters' report failed"]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["training"]["steps"] == 8


def test_a_base_that_cannot_be_measured_costs_no_report(tmp_path: Path, monkeypatch: Patch) -> None:
    def gone(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(finalize, "base_model", gone)
    assert train.main(quick(tmp_path / "run")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "perplexity" in report["tuned"]
    assert "perplexity" not in report.get("base", {})
    assert [w["what"] for w in events(tmp_path / "run")] == ["evaluation of the base failed"]
