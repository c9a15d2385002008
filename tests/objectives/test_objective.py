"""Defaults of an objective: the members that the loop uses and most objectives do not override."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from nanoft.batches import Batches, Sample, TokenDataset
from nanoft.config import Config
from nanoft.objectives.objective import Objective


class Least(Objective):
    """An objective with the required members only."""

    unit, learns = "samples", "turns"

    def count(self, window: Any) -> float:
        return window.units

    def loss(self, model: Any, batch: Any) -> Any:
        return model * batch.units

    def evaluate(self, model: Any, batches: Any) -> dict[str, float]:
        return {"loss": 0.0}


def test_a_window_is_trained_on_as_it_is_with_nothing_before_or_beside_it() -> None:
    ids = np.arange(1, 6, dtype=np.int32)
    samples = TokenDataset.of([Sample(ids[:n], ids[:n] > 2, n) for n in (3, 5, 4)])
    batches, least, model = Batches(samples, 1, 3, 0, 0, shuffle=False), Least(), SimpleNamespace()
    window = batches.next_window(0, 0)
    least.check(Config())
    least.begin(model, [samples], None, 1)
    assert least.windows(model, window, 1) == [window]
    least.prepare(model, window)
    assert (least.count(window), least.figures(), least.rewards([], [])) == (3, {}, [])
    assert least.tokens_per_step(Config(), batches) == 12
    assert least.longest(batches).records == [5]
