"""Objectives: what training minimizes. A new one is one file here, an entry in OBJECTIVES, and its record format.

The loop knows nothing of an objective but these five members. The loss of an optimizer step is

    sum over micro-batches and ranks of objective.loss(model, batch)  /  objective.count(window)

so a window has the same gradient however it is split into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor

from nanoft.batches import Batch, Window
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.model import Decoder
from nanoft.objectives.sft import SFT


class Objective(Protocol):
    """What the loop, preflight, validation and the self-test ask of an objective."""

    unit: str  # what the loss is a mean of: "target tokens", "pairs", "samples", "completions"

    def prepare(self, model: Decoder, window: Window) -> None:
        """What needs the whole window, without gradient, before its first micro-batch."""

    def count(self, window: Window) -> float:
        """Units of the whole window, over all micro-batches and ranks: the denominator of the loss."""

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        """The SUM of the loss over the units of a micro-batch on the model's device; differentiable, scalar."""

    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """Held-out figures for the `eval` event; `loss` among them: the best checkpoint has the lowest."""


Adapters = dict[str, Adapter]  # by name; disabled, they leave the reference model; empty in full training
OBJECTIVES: dict[str, Callable[[Config, Adapters], Objective]] = {"sft": lambda config, _: SFT(config)}


def build_objective(config: Config, adapters: Adapters) -> Objective:
    """The objective that `training.objective` names."""
    return OBJECTIVES[config.training.objective](config, adapters)
