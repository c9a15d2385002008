"""`train.py auto`: the config for this machine, from configs/."""

from __future__ import annotations

from pathlib import Path

import torch

import nanoft
from nanoft.config.loading import read_overrides
from nanoft.runtime import distributed
from nanoft.runtime.device import choose_device, choose_dtype, describe_device
from nanoft.runtime.memory import total_memory_gb

CONFIGS = Path(nanoft.__file__).parent.parent / "configs"
GPU_CONFIGS = {"gpu_80gb.py": 78, "gpu_24gb.py": 23, "gpu_12gb.py": 12, "gpu_8gb.py": 0}  # GB that each needs


def pick_config(overrides: list[str]) -> Path:
    """The config for this machine; prints which one, and why."""
    device = choose_device(read_overrides(overrides).get("system.device", "auto"))
    memory_gb = total_memory_gb(device)
    if device.type == "cuda" and choose_dtype("auto", device) == torch.float32:
        memory_gb /= 2  # before Ampere: in float32, activations take twice the memory
    path = config_for(device.type, memory_gb)
    if not distributed.process_rank():
        print(f"auto      configs/{path.name}, because this is {describe_device(device)}")
    return path


def config_for(device_type: str, memory_gb: float) -> Path:
    if device_type == "cuda":
        return CONFIGS / next(name for name, needed in GPU_CONFIGS.items() if memory_gb >= needed)
    return CONFIGS / {"mps": "m4.py", "cpu": "cpu.py"}[device_type]
