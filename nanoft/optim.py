"""Optimizers and learning-rate schedules: one table each, next to the mathematics.

AdamW (Loshchilov & Hutter 2019) keeps two running means for each parameter: 8 bytes in addition to its 4. Where that is
too much, they are stored in 8 bits each (Dettmers et al. 2022), or in pages that move to the CPU's memory when the GPU
is full (Dettmers et al. 2023, section 3); SGD keeps one running sum, or nothing. State is named by parameter, never by
position, so that a checkpoint can be matched to a model. The learning rate is a pure function of the step: there is
no scheduler state that could be lost. A new optimizer or schedule is an entry of `OPTIMIZERS` or `SCHEDULES`.
Float16 also needs a loss scale: `build_scaler`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanoft import UserError
from nanoft.config import TrainingConfig
from nanoft.runtime.device import without_compiler

Groups = list[dict[str, Any]]  # params, weight_decay, and scale: a factor on the learning rate
State = dict[str, Any]  # of one parameter


@dataclass(frozen=True)
class Optimizer:
    """What the rest of nanoft knows about an optimizer."""

    build: Callable[[Groups, TrainingConfig], torch.optim.Optimizer]
    init_state: Callable[[Any, dict[str, Any], nn.Parameter, str], State]  # (optimizer, group, p, its name) -> zeros
    bytes_per_parameter: Callable[[TrainingConfig], float]  # of that state
    devices: tuple[str, ...] = ("cuda", "mps", "cpu")
    needs_bitsandbytes: bool = False
    shardable: bool = True  # whether its state can be split over ranks (FSDP2)


def _adamw(groups: Groups, t: TrainingConfig) -> torch.optim.Optimizer:
    return without_compiler(torch.optim.AdamW)(groups, betas=(t.beta1, t.beta2), eps=t.epsilon, fused=True)


def _adamw_state(_: Any, group: dict[str, Any], p: nn.Parameter, name: str) -> State:
    return {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _sgd(groups: Groups, t: TrainingConfig) -> torch.optim.Optimizer:
    fused = t.sharding == "none"  # PyTorch's fused SGD, unlike its AdamW, does not take sharded parameters
    return without_compiler(torch.optim.SGD)(groups, momentum=t.momentum, fused=fused)


def _sgd_state(_: Any, group: dict[str, Any], p: nn.Parameter, name: str) -> State:
    return {"momentum_buffer": torch.zeros_like(p)} if group["momentum"] else {}


def _bitsandbytes(kind: str, bytes_per_parameter: float, *devices: str) -> Optimizer:
    def build(groups: Groups, t: TrainingConfig) -> torch.optim.Optimizer:
        from bitsandbytes import optim

        return getattr(optim, kind)(groups, betas=(t.beta1, t.beta2), eps=t.epsilon)

    return Optimizer(build, _bitsandbytes_state, lambda t: bytes_per_parameter, devices, True, shardable=False)


def _bitsandbytes_state(optimizer: Any, group: dict[str, Any], p: nn.Parameter, name: str) -> State:
    if name.endswith("embed_tokens.weight"):  # rare tokens have rare, large gradients: 32 bits (2022, section 2.3)
        return {"step": 0, **{key: optimizer.get_state_buffer(p) for key in ("state1", "state2")}}
    optimizer.init_state(group, p, 0, 0)  # 8 bits, one scale per 256 values; 32 bits for fewer than 4096 values
    return optimizer.state[p]


# AdamW: m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  w <- w - lr (m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + eps)
# + decay w) at step k.  SGD: m <- momentum m + g + decay w,  w <- w - lr m.
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_adamw, _adamw_state, lambda t: 8.0),
    "adamw_8bit": _bitsandbytes("AdamW8bit", 2.04, "cuda", "cpu"),
    "adamw_paged": _bitsandbytes("PagedAdamW32bit", 8.0, "cuda"),
    "adamw_8bit_paged": _bitsandbytes("PagedAdamW8bit", 2.04, "cuda"),
    "sgd": Optimizer(_sgd, _sgd_state, lambda t: 4.0 * (t.momentum > 0)),
}


def check_optimizer(name: str, device: torch.device) -> None:
    """Reject an optimizer that has no kernel for this device; the UserError names the most similar one that has one."""
    devices, here = OPTIMIZERS[name].devices, [n for n, entry in OPTIMIZERS.items() if device.type in entry.devices]
    if name not in here:
        similar = difflib.get_close_matches(name, here, n=1, cutoff=0.0)[0]
        where = f"{name} runs on {' or '.join(devices)}, but this device is {device.type}"
        raise UserError(f"training.optimizer: {where}: set training.optimizer={similar}")


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], t: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer over named parameters, with its state allocated: zeros, as before the first step.

    Weight decay is for matrices; vectors (norms, biases) have none. LoRA+ (Hayou et al. 2024): B, which starts at zero,
    learns `lora_plus_ratio` times as fast as A. A group's learning rate is the schedule's times its `scale`.
    """
    names = {p: name for name, p in parameters}
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p, name in names.items():
        decay = t.weight_decay if p.dim() >= 2 else 0.0
        scale = t.lora_plus_ratio if name.endswith("lora_B") else 1.0
        members.setdefault((decay, scale), []).append(p)
    groups = [{"params": ps, "weight_decay": decay, "scale": scale} for (decay, scale), ps in members.items()]
    kind = OPTIMIZERS[t.optimizer]
    optimizer = kind.build(groups, t)
    set_learning_rate(optimizer, t.learning_rate)
    for group in optimizer.param_groups:  # now, so that its memory counts before training and a checkpoint can fill it
        for p in group["params"]:
            optimizer.state[p] = kind.init_state(optimizer, group, p, names[p])
    return optimizer


# The rate at t, as a share of the peak: t in [0, 1) over the steps after the warm-up.
SCHEDULES: dict[str, Callable[[float, TrainingConfig], float]] = {
    "cosine": lambda t, c: (1 + math.cos(math.pi * t)) / 2,  # Loshchilov & Hutter 2017, eq. 5
    "cosine_with_restarts": lambda t, c: (1 + math.cos(math.pi * (c.lr_cycles * t % 1))) / 2,  # the same, SGDR
    # Warm-up, stable, decay (Hu et al. 2024, section 4): 1, then over the last `lr_decay_ratio` half a cosine to 0.
    "wsd": lambda t, c: (1 + math.cos(math.pi * max(0.0, (t - 1) / c.lr_decay_ratio + 1))) / 2,
    "linear": lambda t, c: 1 - t,
    "polynomial": lambda t, c: (1 - t) ** c.lr_power,
    "constant": lambda t, c: 1.0,
}


def warmup_steps(total_steps: int, c: TrainingConfig) -> int:
    """Optimizer steps of the warm-up in a run of `total_steps`."""
    return round(c.warmup_ratio * total_steps) if c.warmup_steps is None else c.warmup_steps


def learning_rate(step: int, total_steps: int, c: TrainingConfig) -> float:
    """The learning rate of the step after `step` completed ones.

    Warm-up rises linearly and reaches the peak at its end; then the schedule falls from 1 to `min_lr_ratio` of it.
    """
    warmup = warmup_steps(total_steps, c)
    if step < warmup:
        return c.learning_rate * (step + 1) / (warmup + 1)
    t = (step - warmup) / max(1, total_steps - warmup)
    return c.learning_rate * (c.min_lr_ratio + (1 - c.min_lr_ratio) * SCHEDULES[c.lr_scheduler](t, c))


def build_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2); for another dtype it does nothing.

    The smallest float16 is 6e-8, and a gradient below it becomes 0. So backward starts from S loss instead of the loss,
    and each gradient is divided by S in float32. S begins at 2^16; it is halved when a gradient overflows (beyond
    65504), and doubled after 2000 windows in which none did.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
