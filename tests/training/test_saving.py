"""What a save that failed in the background does to the state; in whole runs: test_recovery.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nanoft.checkpoint import SaveResult
from nanoft.training.saving import report_save
from nanoft.training.state import TrainState


def context(best: tuple[int, float] | None) -> Any:
    """As much of a TrainContext as a report needs, and what it logged."""
    logged: list[tuple[str, int, dict[str, Any]]] = []
    run = SimpleNamespace(log=lambda event, step, **values: logged.append((event, step, values)), print=lambda _: None)
    return SimpleNamespace(run=run, logged=logged, checkpoints=SimpleNamespace(best=lambda: best))


@pytest.mark.parametrize(("best", "expected"), [((2, 0.5), (2, 0.5)), (None, (0, float("inf")))])
def test_a_best_checkpoint_that_was_not_saved_is_not_the_best(best: Any, expected: Any) -> None:
    job, state = context(best), TrainState(step=5, best_step=4, best_loss=0.1)
    report_save(job, state, SaveResult(4, error=OSError("full")))
    assert (state.best_step, state.best_loss) == expected
    assert job.logged == [("warning", 5, {"what": "saving step 4 failed", "error": "OSError: full"})]


def test_another_save_that_failed_leaves_the_best(tmp_path: Any) -> None:
    job, state = context((2, 0.5)), TrainState(step=5, best_step=2, best_loss=0.5)
    report_save(job, state, SaveResult(4, error=OSError("full")))
    report_save(job, state, None)
    assert (state.best_step, state.best_loss) == (2, 0.5)
    assert len(job.logged) == 1
