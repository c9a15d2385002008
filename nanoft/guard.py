"""What to do when a step goes wrong.

One NaN in a gradient turns every parameter into NaN at the next optimizer step, and nothing brings them back. So each
step is judged before it is taken, from its loss and from the norm of its gradient before clipping:

    not finite          the window is left out: parameters, optimizer and schedule stay as they are
    far above the rest  warned, then left out, then taken back, as far as guard.on_spike allows

Far above is measured with numbers that an outlier cannot move: the distance from the median of the last steps in units
of their median absolute deviation (Hampel 1974; Leys et al. 2013). Of logarithms, because losses and gradient norms
vary by factors, the more so the smaller they are. Too many windows left out in a row mean that the weights are no good
any more: the run goes back to its last checkpoint, learns more slowly, and passes over the windows that did it (as
Chowdhery et al. 2022, section 5.1, did by hand); if that does not help, it ends, and says where the first NaN arises.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanoft.config import GuardConfig

Action = Literal["take", "skip", "roll back", "stop"]
ENOUGH = 20  # steps before a spike can be told from the run's own noise
LEAST = 0.05  # a deviation below this counts as this: a run of equal values has none


@dataclass
class History:
    """What the guard has seen; saved with the run, so that a resumed one judges alike."""

    losses: list[float] = field(default_factory=list)  # of the last steps taken
    norms: list[float] = field(default_factory=list)
    spikes: int = 0  # in a row
    skips: int = 0  # in a row
    rollbacks: int = 0  # of the whole run
    back_at: int = -1  # the step that the last rollback led to
    rate: float = 1.0  # factor on the schedule's learning rate
    suspects: list[list[int]] = field(default_factory=list)  # (epoch, window) of the skips in a row
    left_out: list[list[int]] = field(default_factory=list)  # (epoch, window) that the run passes over for good


@dataclass(frozen=True)
class Verdict:
    """What to do with a step, and what is wrong with it, if anything."""

    action: Action
    reason: str = ""


def check_step(config: GuardConfig, history: History, loss: float, grad_norm: float, where: list[int]) -> Verdict:
    """What to do with a step, from its loss (nats per target token) and the norm of its gradient before clipping.

    Args:
        history: of the steps before; this one is added.
        where: epoch and window of the step.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return _leave_out(config, history, f"loss {loss:.6g}, gradient norm {grad_norm:.6g}", where)
    spike = _spike(config, history, loss, grad_norm)
    history.spikes = history.spikes + 1 if spike else 0
    if history.spikes > 1 and config.on_spike != "warn":  # the first one is only warned of
        if config.on_spike == "rollback" or history.skips + 1 < config.max_skips:
            return _leave_out(config, history, spike, where)
        spike += "; it stays, and is taken for the new level"
        history.losses, history.norms, history.spikes = [], [], 0
    history.losses = [*history.losses, loss][-config.spike_window :]
    history.norms = [*history.norms, grad_norm][-config.spike_window :]
    history.skips, history.suspects = 0, [where] if spike else []  # where a spike goes on, it began here
    return Verdict("take", spike)


def rolled_back_history(config: GuardConfig, history: History) -> History:
    """The history to go on with from a checkpoint: a lower rate, and the windows that did it are passed over."""
    return History(
        rollbacks=history.rollbacks + 1,
        rate=history.rate * config.rollback_rate,
        left_out=[*history.left_out, *history.suspects],
    )


def restored_history(then: History, now: History) -> History:
    """The history to go on with where steps are taken back for another reason: their losses will be seen again."""
    return replace(then, rollbacks=now.rollbacks, back_at=now.back_at, rate=now.rate, left_out=now.left_out)


def _leave_out(config: GuardConfig, history: History, reason: str, where: list[int]) -> Verdict:
    history.skips += 1
    history.suspects.append(where)
    if history.skips < config.max_skips:
        return Verdict("skip", reason)
    return Verdict("roll back" if history.rollbacks < config.max_rollbacks else "stop", reason)


def _spike(config: GuardConfig, history: History, loss: float, grad_norm: float) -> str:
    """Which value is far above those before, and how far; empty if none is."""
    for name, value, before in (("loss", loss, history.losses), ("gradient norm", grad_norm, history.norms)):
        if len(before) >= ENOUGH and (score := robust_score(value, before)) > config.spike_score:
            middle = statistics.median(before)
            return f"{name} {value:.4g} is {score:.0f} deviations above the median {middle:.4g} of the last steps"
    return ""


def robust_score(value: float, before: list[float]) -> float:
    """(x - median) / (1.4826 MAD), x = log value: of normal numbers, standard deviations (Leys et al. 2013, eq. 1)."""
    x, *others = (math.log(max(number, 1e-12)) for number in (value, *before))
    median = statistics.median(others)
    deviation = 1.4826 * statistics.median([abs(other - median) for other in others])
    return (x - median) / max(deviation, LEAST)


# ---- Where does it come from?


@contextmanager
def first_bad_output(model: nn.Module) -> Iterator[list[str]]:
    """While it is open, a list of the modules whose output is not finite although their input is, in order."""
    found: list[str] = []

    def finite(part: Any) -> bool:
        if isinstance(part, Tensor):
            return not part.is_floating_point() or bool(part.isfinite().all())
        return all(map(finite, part)) if isinstance(part, (list, tuple)) else True

    def look(name: str) -> Any:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            if finite(inputs) and not finite(output):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name or "model")) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def diagnose(model: nn.Module, *inputs: Any, **options: Any) -> str:
    """Where the first number that is not finite arises: in a weight, in a module's output, or not in forward at all."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"the weight {name} holds numbers that are not finite"
    with first_bad_output(model) as found:
        model(*inputs, **options)
    if found:
        return f"the first output that is not finite is that of {found[0]}"
    return "weights and activations are finite, so it arises in the loss or in backward"
