"""The interface of an objective: what training minimizes.

The loop uses only these members. The loss of an optimizer step is

    sum over micro-batches and ranks of objective.loss(model, batch)  /  objective.count(window)

so a window has the same gradient however it is split into micro-batches. Most objectives define only `count`, `loss`
and `evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor

from nanoft.batches import Batch, Batches, TokenDataset, Window
from nanoft.config import Config
from nanoft.data.formats import Learns
from nanoft.metrics.rewards import Prompt
from nanoft.model import Decoder
from nanoft.runtime.command import StopRequest


class Objective(Protocol):
    """What the loop, preflight, validation and the self-test require of an objective."""

    unit: str  # what the loss is a mean of: "target tokens", "pairs", "samples", "completions"
    learns: ClassVar[Learns]  # which data it needs
    section: ClassVar[str] = "preference"  # its section of the config
    settings: ClassVar[tuple[str, ...]] = ()  # the fields of that section that it reads

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a config on which the objective cannot work, with a UserError."""

    def begin(self, model: Decoder, sides: list[TokenDataset], directory: Path | None, batch_size: int) -> None:
        """Computations that need every sample and the model before training; `directory`: the run's."""

    def windows(self, model: Decoder, window: Window, rows: int, stop: StopRequest | None = None) -> list[Window]:
        """The windows that replace this one, with one optimizer step each; none if a signal arrived first.

        Objectives that sample return answers to its prompts, in micro-batches of `rows`.
        """
        return [window]

    def prepare(self, model: Decoder, window: Window) -> None:
        """Computations over the whole window, without gradient, before its first micro-batch."""

    def count(self, window: Window) -> float:
        """Units of the whole window, over all micro-batches and ranks: the denominator of the loss."""
        ...

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        """The SUM of the loss over the units of a micro-batch on the model's device; differentiable, scalar."""
        ...

    def figures(self) -> dict[str, float]:
        """More figures of the last window, for its `train` event."""
        return {}

    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """Held-out figures for the `eval` event; `loss` among them: the best checkpoint has the lowest."""
        ...

    def rewards(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[dict[str, float]]:
        """The rewards of answers, in total and by function; empty for objectives without rewards."""
        return []

    @classmethod
    def tokens_per_step(cls, config: Config, batches: Batches) -> float:
        """The mean number of tokens of a step, without padding."""
        return float(batches.samples.lengths.sum() / batches.windows_in_epoch())

    def longest(self, batches: Batches) -> Batch:
        """The micro-batch that needs the most memory."""
        return batches.longest()
