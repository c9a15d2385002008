"""Objectives: what training minimizes. A new one is one file here, an entry in OBJECTIVES, and its record format.

The loop knows nothing of an objective but these members. The loss of an optimizer step is

    sum over micro-batches and ranks of objective.loss(model, batch)  /  objective.count(window)

so a window has the same gradient however it is split into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from nanoft.batches import Batch, TokenDataset, Window
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.data.formats import Learns
from nanoft.model import Decoder
from nanoft.objectives.kto import KTO
from nanoft.objectives.preference import DPO, ORPO, SimPO
from nanoft.objectives.reward import RewardModel
from nanoft.objectives.sft import SFT


class Objective(Protocol):
    """What the loop, preflight, validation and the self-test ask of an objective."""

    unit: str  # what the loss is a mean of: "target tokens", "pairs", "samples", "completions"
    learns: ClassVar[Learns]  # which data it needs
    settings: ClassVar[tuple[str, ...]]  # the fields of the section `preference` that it reads

    def begin(self, model: Decoder, sides: list[TokenDataset], directory: Path | None, batch_size: int) -> None:
        """What needs every sample and the model as it was before training; `directory`: the run's."""

    def prepare(self, model: Decoder, window: Window) -> None:
        """What needs the whole window, without gradient, before its first micro-batch."""

    def count(self, window: Window) -> float:
        """Units of the whole window, over all micro-batches and ranks: the denominator of the loss."""

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        """The SUM of the loss over the units of a micro-batch on the model's device; differentiable, scalar."""

    def figures(self) -> dict[str, float]:
        """More figures of the last window, for its `train` event."""

    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """Held-out figures for the `eval` event; `loss` among them: the best checkpoint has the lowest."""


# Each is built from the config and the adapters by name, which are empty in full training.
OBJECTIVES: dict[str, Any] = {"sft": SFT, "dpo": DPO, "kto": KTO, "orpo": ORPO, "simpo": SimPO, "reward": RewardModel}


def trains_score(config: Config) -> bool:
    """Whether the model that is trained has a scalar head instead of one for logits."""
    return issubclass(OBJECTIVES[config.training.objective], RewardModel)


def build_objective(config: Config, adapters: dict[str, Adapter]) -> Objective:
    """The objective that `training.objective` names."""
    objective: Objective = OBJECTIVES[config.training.objective](config, adapters)
    return objective
