"""What is logged of a save, and what becomes of the best step if its save failed; the rest: test_recovery.py."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoft.checkpoint import SaveResult
from nanoft.config import Config
from nanoft.objectives import OBJECTIVES
from nanoft.objectives.preference import Preference
from nanoft.training.progress import log_save, progress_bar, warn_of_ease, warn_of_falling
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


# --- signs that preferences are learned badly


def watched(objective: Any = None, steps: int = 100) -> tuple[Any, list[str]]:
    """A context, and the texts of the warnings that are logged and printed in it."""
    logged: list[str] = []
    printed: list[str] = []
    run = SimpleNamespace(log=lambda event, step, what, text: logged.append(text), print=printed.append)
    return SimpleNamespace(run=run, total_steps=steps, objective=objective), printed


def rewards(chosen: float, rejected: float, accuracy: float = 1.0) -> dict[str, float]:
    return {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracies": accuracy}


@pytest.mark.parametrize(
    ("step", "figures", "warns"),
    [
        (10, rewards(1.0, -0.5), True),
        (11, rewards(1.0, -0.5), False),  # no longer one of the first steps
        (10, rewards(0.1, -0.1), False),  # the sign of a difference that means nothing yet
        (10, rewards(1.0, -0.5, 0.95), False),
        (10, {}, False),
    ],
)
def test_answers_that_are_ranked_right_at_once_are_warned_of(step: int, figures: Any, warns: bool) -> None:
    ctx, printed = watched()
    state = TrainState(step=step)
    for _ in range(2):  # and once only
        warn_of_ease(ctx, state, figures)
    assert len(printed) == warns
    assert all("every answer is already ranked right" in line for line in printed)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chosen_answers_that_fall_with_the_rejected_are_warned_of_where_there_is_a_reference(name: str) -> None:
    objective: Any = object.__new__(OBJECTIVES[name])
    ctx, printed = watched(objective)
    state = TrainState(step=50, held_out=rewards(-1.5, -2.0))
    for chosen, rejected in ((-0.9, -9.0), (-1.4, -9.0), (-1.6, -1.9)):  # not far; not any more; rejected rise
        warn_of_falling(ctx, state, rewards(chosen, rejected))
    assert printed == []
    for _ in range(2):
        warn_of_falling(ctx, state, rewards(-1.6, -2.5))
    assert len(printed) == (isinstance(objective, Preference) and objective.uses_reference)
