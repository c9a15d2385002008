"""What to do when a step goes wrong.

One NaN in a gradient turns every parameter into NaN at the next optimizer step, for good. So each step is checked
before it is taken, by its loss and by the norm of its gradient before clipping:

    not finite          the window is skipped: parameters, optimizer and schedule stay unchanged
    a spike             a warning, then a skip, then a rollback, as far as guard.on_spike allows

A gradient that overflows only because of float16's loss scale is neither: `check_overflow` comes first, and the window
is skipped without counting as a fault.

A spike is far from the median of the last steps, in units of their median absolute deviation, on which an outlier has
no influence (Hampel 1974); on logarithms, because losses and norms vary by factors. After too many consecutive skips,
the run rolls back to its last checkpoint, lowers the learning rate, and skips the windows that caused it (as Chowdhery
et al. 2022, section 5.1, did by hand). If that does not help, it ends and reports where the first NaN arises.
"""

from __future__ import annotations

import math
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanoft import TrainingFailed
from nanoft.batches import Window
from nanoft.config import GuardConfig

MIN_HISTORY = 20  # steps before a spike can be distinguished from noise
MIN_DEVIATION = 0.05  # lower bound, because a run of equal values has none


class SkipStep(Exception):
    """A window whose step must not be taken."""

    def __init__(self, reason: str, loss: float, grad_norm: float, window: Window):
        super().__init__(reason)
        self.reason, self.loss, self.grad_norm, self.window = reason, loss, grad_norm, window


class GradientOverflow(SkipStep):
    """A gradient that overflows float16 at the loss scale of its window; the scale has been halved."""


class RollBack(SkipStep):
    """Too many consecutive skipped windows: the weights must be restored from a checkpoint."""


class Diverged(TrainingFailed):
    """Rollbacks did not help."""


@dataclass
class History:
    """The guard's state; saved with the run, so that a resumed run makes the same decisions."""

    losses: list[float] = field(default_factory=list)  # of the last steps taken
    norms: list[float] = field(default_factory=list)
    spikes: int = 0  # consecutive
    skips: int = 0  # consecutive
    rollbacks: int = 0  # of the whole run
    back_at: int = -1  # the step that the last rollback returned to
    lr_scale: float = 1.0  # factor on the schedule's learning rate
    suspects: list[list[int]] = field(default_factory=list)  # [epoch, index] of consecutive skipped windows
    skipped_windows: list[list[int]] = field(default_factory=list)  # [epoch, index], permanently, after rollbacks


def check_overflow(loss_scale: float, loss: float, grad_norm: float, window: Window) -> None:
    """Raise GradientOverflow if the loss is finite but its gradient, computed at `loss_scale`, is not.

    At a scale of 1 or less, the gradient itself is too large; then, and if the loss is not finite, `check` decides.
    """
    if loss_scale > 1 and math.isfinite(loss) and not math.isfinite(grad_norm):
        reason = f"the gradient overflows float16 at loss scale {loss_scale:g}, now {loss_scale / 2:g}"
        raise GradientOverflow(reason, loss, grad_norm, window)


def check(config: GuardConfig, history: History, loss: float, grad_norm: float, window: Window) -> str:
    """Decide from loss and gradient norm (before clipping) whether a step may be taken; add it to the history.

    Returns:
        A warning about a spike that is tolerated, or "".
    Raises:
        SkipStep: the window must be skipped; RollBack: it is the last of too many consecutive ones.
    """

    def skip(reason: str) -> SkipStep:
        history.skips, history.suspects = history.skips + 1, [*history.suspects, window.position]
        return (SkipStep if history.skips < config.max_skips else RollBack)(reason, loss, grad_norm, window)

    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise skip(f"loss {loss:.6g}, gradient norm {grad_norm:.6g}")
    spike = _spike(config, history, loss, grad_norm)
    history.spikes = history.spikes + 1 if spike else 0
    if history.spikes > 1 and config.on_spike != "warn":  # the first one is a warning only
        if config.on_spike == "rollback" or history.skips + 1 < config.max_skips:
            raise skip(spike)
        spike += "; it persists, so it is accepted as the new level"
        history.losses, history.norms, history.spikes = [], [], 0
    history.losses = [*history.losses, loss][-config.spike_window :]
    history.norms = [*history.norms, grad_norm][-config.spike_window :]
    history.skips, history.suspects = 0, [window.position] if spike else []  # a spike that persists began here
    return spike


def after_rollback(config: GuardConfig, history: History) -> History:
    """The history for resuming from a checkpoint: a lower learning rate, and the suspected windows are skipped."""
    return History(
        rollbacks=history.rollbacks + 1,
        lr_scale=history.lr_scale * config.rollback_rate,
        skipped_windows=[*history.skipped_windows, *history.suspects],
    )


def after_restore(then: History, now: History) -> History:
    """The history when steps are undone for another reason: it will see their losses again."""
    names = ("rollbacks", "back_at", "lr_scale", "skipped_windows")
    return replace(then, **{name: getattr(now, name) for name in names})


def _spike(config: GuardConfig, history: History, loss: float, grad_norm: float) -> str:
    """A description of the value that is far above earlier ones; empty if none is."""
    for name, value, before in (("loss", loss, history.losses), ("gradient norm", grad_norm, history.norms)):
        if len(before) >= MIN_HISTORY and (score := robust_score(value, before)) > config.spike_score:
            middle = statistics.median(before)
            return f"{name} {value:.4g} is {score:.0f} deviations above the median {middle:.4g} of the last steps"
    return ""


def robust_score(value: float, before: list[float]) -> float:
    """(x - median) / (1.4826 MAD), x = log value: standard deviations if x is normal (Leys et al. 2013, eq. 1)."""
    x, *others = (math.log(max(number, 1e-12)) for number in (value, *before))
    median = statistics.median(others)
    deviation = 1.4826 * statistics.median([abs(other - median) for other in others])
    return (x - median) / max(deviation, MIN_DEVIATION)


@torch.no_grad()
def diagnose(model: nn.Module, *inputs: Any) -> str:
    """Where the first non-finite number arises: in a weight, in a module's output, or not in the forward pass."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not _is_finite(tensor):
            return f"the weight {name} contains numbers that are not finite"
    found: list[str] = []

    def hook(name: str, _module: nn.Module, inputs: Any, output: Any) -> None:
        if _is_finite(inputs) and not _is_finite(output):
            found.append(name)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(hook, name or "model")))
        model(*inputs)
    where = "weights and activations are finite, so the fault is in the loss or in backward"
    return f"the first output that is not finite is that of {found[0]}" if found else where


def _is_finite(part: Any) -> bool:
    """Whether a tensor, or each tensor in a list, is finite."""
    if isinstance(part, Tensor):
        return not part.is_floating_point() or bool(part.isfinite().all())
    return all(map(_is_finite, part)) if isinstance(part, (list, tuple)) else True
