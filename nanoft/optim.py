"""Optimizer and learning rate.

AdamW (Loshchilov & Hutter 2019) keeps two running means for each parameter: 8 bytes beside its 4. Where that is too
much, they are stored in 8 bits each (Dettmers et al. 2022), or in pages that move to the CPU's memory when the GPU's is
full (Dettmers et al. 2023, section 3); SGD keeps one running sum, or nothing. nanoft names state by parameter, never
by position, so that a checkpoint can be matched to a model. The learning rate is a pure function of the step: there is
no scheduler state that could be lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nanoft import UserError
from nanoft.config import TrainingConfig

RUNS_ON = {"adamw_8bit": ("cuda", "cpu"), "adamw_paged": ("cuda",), "adamw_8bit_paged": ("cuda",)}  # others: anywhere


def check_optimizer(kind: str, device: torch.device) -> None:
    """Refuse what bitsandbytes has no kernel for on this device.

    Raises:
        UserError: names the devices that it runs on.
    """
    devices = RUNS_ON.get(kind, (device.type,))
    if device.type not in devices:
        where, other = " or ".join(devices), "adamw_8bit" if "8bit" in kind and device.type == "cpu" else "adamw"
        raise UserError(
            f"training.optimizer: {kind} runs on {where}, and this is {device.type}: set training.optimizer={other}"
        )


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], t: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer over named parameters, with its state laid out: zeros, as before the first step.

    Weight decay is for matrices; vectors (norms, biases) have none. LoRA+ (Hayou et al. 2024): B, which starts at zero,
    learns `lora_plus_ratio` times as fast as A. A group's learning rate is the schedule's times its `scale`.
    """
    named = list(parameters)
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in named:
        decay = t.weight_decay if p.dim() >= 2 else 0.0
        scale = t.lora_plus_ratio if name.endswith("lora_B") else 1.0
        members.setdefault((decay, scale), []).append(p)
    groups = [{"params": ps, "weight_decay": decay, "scale": scale} for (decay, scale), ps in members.items()]
    optimizer = _make(groups, t)
    set_learning_rate(optimizer, t.learning_rate)
    _lay_out_state(optimizer, {p for name, p in named if name.endswith("embed_tokens.weight")})
    return optimizer


def _make(groups: list[dict[str, Any]], t: TrainingConfig) -> torch.optim.Optimizer:
    if t.optimizer == "sgd":  # m <- momentum * m + g + decay * w,   w <- w - rate * m
        fused = t.sharding == "none"  # PyTorch has the fused kernel of AdamW for split parameters, but not this one
        return torch.optim.SGD(groups, momentum=t.momentum, fused=fused)
    adam = {"betas": (t.beta1, t.beta2), "eps": t.epsilon}
    if t.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)  # type: ignore[arg-type]
    from bitsandbytes import optim

    kinds = {"adamw_8bit": "AdamW8bit", "adamw_paged": "PagedAdamW32bit", "adamw_8bit_paged": "PagedAdamW8bit"}
    return getattr(optim, kinds[t.optimizer])(groups, **adam)


def _lay_out_state(optimizer: Any, embeddings: set[nn.Parameter]) -> None:
    """Make now what the first step would make: what it takes shows before training, and loading only has to fill it."""
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if isinstance(optimizer, torch.optim.SGD):
                optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)} if group["momentum"] else {}
            elif isinstance(optimizer, torch.optim.AdamW):
                moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
            elif p in embeddings:  # rare tokens have rare, large gradients: 32 bits (Dettmers et al. 2022, section 2.3)
                optimizer.state[p] = {"step": 0, **{key: optimizer.get_state_buffer(p) for key in ("state1", "state2")}}
            else:  # 8 bits with a scale for each block of 256; 32 bits for tensors of less than 4096 values
                optimizer.init_state(group, p, g, i)


def warmup_length(steps: int | None, ratio: float, total_steps: int) -> int:
    """Steps of linear warm-up: as given, or a share of all steps."""
    return round(ratio * total_steps) if steps is None else steps


def learning_rate(
    step: int, total_steps: int, peak: float, warmup_steps: int, shape: str, min_ratio: float, power: float = 1.0
) -> float:
    """The rate for the step that follows `step` completed ones.

    Warm-up rises linearly and reaches the peak at its end; then, with t in [0, 1) over the remaining steps,
    cosine: (1 + cos(pi t)) / 2 (Loshchilov & Hutter 2017, eq. 5); linear: 1 - t; polynomial: (1 - t)^power;
    constant: 1, from 1 to `min_ratio`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    t = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    shapes = {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "polynomial": (1 - t) ** power, "constant": 1}
    return peak * (min_ratio + (1 - min_ratio) * shapes[shape])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `<parameter>.exp_avg`, ..., as the optimizer calls them.

    A copy is made of plain numbers only (bitsandbytes counts its steps in an int); tensors are the optimizer's own.
    """
    return {f"{name}.{key}": torch.as_tensor(value) for name, p in named for key, value in optimizer.state[p].items()}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]
) -> None:
    """Fill the laid-out state with what `optimizer_tensors` gave, matched by name.

    Raises:
        UserError: a parameter's state is missing, has another shape or type, or belongs to no parameter.
    """
    left = dict(tensors)
    for name, parameter in named:
        state = optimizer.state[parameter]
        for key, held in state.items():
            saved, wanted = left.pop(f"{name}.{key}", None), torch.as_tensor(held)
            if saved is None or (saved.shape, saved.dtype) != (wanted.shape, wanted.dtype):
                raise UserError(f"optimizer.safetensors: {name}.{key} is missing or does not fit: start a new run")
            if isinstance(held, Tensor):
                held.copy_(saved)
            else:
                state[key] = int(saved)
    if left:
        raise UserError(f"optimizer.safetensors: {next(iter(left))} belongs to no trained parameter: start a new run")
