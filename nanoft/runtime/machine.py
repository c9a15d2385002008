"""The machine of a run, looked up once at the start, and the config for it (`train.py auto`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from nanoft import UserError
from nanoft.config import Config
from nanoft.config.loading import CONFIGS, read_overrides, split_words
from nanoft.runtime import distributed
from nanoft.runtime.device import DTYPES, choose_device, choose_dtype, describe_device
from nanoft.runtime.memory import memory_limit_bytes, total_memory_gb

GPU_CONFIGS = {"gpu_80gb.py": 78, "gpu_24gb.py": 23, "gpu_12gb.py": 12, "gpu_8gb.py": 0}  # minimum memory in GB
FLOAT16_CONFIGS = {"gpu_16gb_fp16.py": 15, "gpu_8gb.py": 0}  # the same, of GPUs without bfloat16


@dataclass(frozen=True)
class Machine:
    """Where a run computes, or where one is planned."""

    device: torch.device
    dtype: torch.dtype  # of computation
    memory_bytes: float  # limit of this process on the device
    present: bool = True  # False: only described, by system.device and system.memory_gb

    @classmethod
    def detect(cls, config: Config) -> Machine:
        """This machine."""
        device = choose_device(config.system.device)
        return cls(device, choose_dtype(config.model.dtype, device), memory_limit_bytes(device))

    @classmethod
    def detect_or_describe(cls, config: Config) -> Machine:
        """This machine, or for --plan the one that the config describes if its device is not available here."""
        memory_gb = config.system.memory_gb
        try:
            choose_device(config.system.device)
        except UserError as error:
            if memory_gb is None:
                raise UserError(f"{error}, or set system.memory_gb to plan for that device") from None
            dtype = DTYPES.get(config.model.dtype, torch.bfloat16)
            return cls(torch.device(config.system.device), dtype, memory_gb * 1e9, present=False)
        return cls.detect(config)

    @property
    def room_bytes(self) -> float:
        """Memory that a plan may use."""
        return 0.9 * self.memory_bytes

    @property
    def name(self) -> str:
        """The name of the device alone, for comparing ranks."""
        return describe_device(self.device).partition(",")[0]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def select_device(device: torch.device, sharding: str) -> None:
    """Make `cuda` mean this process's own GPU, before anything is allocated."""
    world_size = distributed.world_size()
    if sharding == "full" and world_size == 1:
        raise UserError(
            "training.sharding: full shards the model over processes, and this is the only one: start it with "
            "torchrun --nproc-per-node N train.py, or set training.sharding=none"
        )
    if world_size > 1 and device.type == "mps":
        raise UserError("system.device: Metal supports one process: start train.py without torchrun")
    if world_size > 1 and device.type == "cuda":
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), torch.cuda.device_count()
        if wanted > there:
            raise UserError(f"torchrun: {wanted} processes for {there} GPUs: set --nproc-per-node {there}")
        if "LOCAL_RANK" not in os.environ:
            raise UserError("torchrun: LOCAL_RANK is not set, so no process knows its GPU: start with torchrun")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def pick_config(overrides: list[str]) -> Path:
    """The config for this machine; prints which one, and why."""
    device = choose_device(read_overrides(split_words(overrides)[1]).get("system.device", "auto"))
    path = config_for(device.type, total_memory_gb(device), choose_dtype("auto", device))
    if not distributed.process_rank():
        print(f"auto      configs/{path.name}, because this is {describe_device(device)}")
    return path


def config_for(device_type: str, memory_gb: float, dtype: torch.dtype) -> Path:
    if device_type == "cuda":
        configs = FLOAT16_CONFIGS if dtype == torch.float16 else GPU_CONFIGS
        return CONFIGS / next(name for name, needed in configs.items() if memory_gb >= needed)
    return CONFIGS / {"mps": "m4.py", "cpu": "cpu.py"}[device_type]
