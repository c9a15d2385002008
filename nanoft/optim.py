"""Optimizer and learning rate.

AdamW (Loshchilov & Hutter 2019) keeps two running means for each parameter; nanoft names its state by parameter, never
by position, so that a checkpoint can be matched to a model. The learning rate is a pure function of the step: there is
no scheduler state that could be lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nanoft import UserError


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW over named parameters: decay on matrices, none on vectors; fused into one kernel."""
    named = list(parameters)
    matrices = [p for _, p in named if p.dim() >= 2]
    vectors = [p for _, p in named if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def warmup_length(steps: int | None, ratio: float, total_steps: int) -> int:
    """Steps of linear warm-up: as given, or a share of all steps."""
    return round(ratio * total_steps) if steps is None else steps


def learning_rate_at(
    step: int, total_steps: int, peak: float, warmup_steps: int, shape: str, min_ratio: float
) -> float:
    """The rate for the step that follows `step` completed ones.

    Warm-up rises linearly and reaches the peak at its end; then, with t in [0, 1) over the remaining steps,
    cosine: (1 + cos(pi t)) / 2 (Loshchilov & Hutter 2017, eq. 5); linear: 1 - t; constant: 1, from 1 to `min_ratio`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    t = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    fall = {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "constant": 1.0}[shape]
    return peak * (min_ratio + (1 - min_ratio) * fall)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`."""
    return {f"{name}.{key}": value for name, p in named for key, value in optimizer.state.get(p, {}).items()}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, matched by name.

    Raises:
        UserError: a parameter's state is missing, has another shape, or belongs to no parameter.
    """
    left = dict(tensors)
    for name, parameter in named:
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = left.pop(f"{name}.{key}", None)
            if value is None or value.shape != (() if key == "step" else parameter.shape):
                raise UserError(f"optimizer.safetensors: {name}.{key} is missing or does not fit: start a new run")
            state[key] = value.to(parameter.device).clone()
        optimizer.state[parameter] = state
    if left:
        raise UserError(f"optimizer.safetensors: {next(iter(left))} belongs to no trained parameter: start a new run")
