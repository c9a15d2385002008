"""What is logged of a save, and what becomes of the best step if its save failed; the rest: test_recovery.py."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoft.checkpoint import SaveResult
from nanoft.config import Config
from nanoft.training.progress import log_save, progress_bar
from nanoft.training.state import TrainState


def test_the_bar_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    ctx: Any = SimpleNamespace(config=Config(), total_steps=12345)
    with progress_bar(ctx, TrainState(step=12000)) as bar:
        bar.start_t -= 100 * 3600
        bar.set_postfix_str("loss 10.123, lr 1.0e-04, 123,456 tok/s")
    (line,) = {part.rstrip() for part in shown.getvalue().split("\r") if "tok/s" in part}
    assert len(line) <= 80
    assert "12000/12345" in line
    assert line.endswith("loss 10.123, lr 1.0e-04, 123,456 tok/s]")


@pytest.mark.parametrize("failed", [False, True])
def test_a_best_step_that_was_not_saved_is_not_the_best(failed: bool, tmp_path: Path) -> None:
    logged: list[tuple[str, int]] = []
    run = SimpleNamespace(
        directory=tmp_path, log=lambda event, step, **_: logged.append((event, step)), print=lambda _: None
    )
    ctx: Any = SimpleNamespace(run=run, checkpoints=SimpleNamespace(best=lambda: (2, 1.5)))
    state = TrainState(step=5, best_step=4, best_loss=1.0)
    error = OSError(28, "No space left on device") if failed else None
    log_save(ctx, state, SaveResult(4, tmp_path / "checkpoints" / "step-000004", error))
    assert (state.best_step, state.best_loss) == ((2, 1.5) if failed else (4, 1.0))
    assert logged == [("warning", 5) if failed else ("checkpoint", 4)]
    log_save(ctx, state, None)
    assert len(logged) == 1
