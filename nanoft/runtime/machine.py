"""The machine of a run, looked up once at the start: device, number format, memory. Others receive the values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanoft import UserError
from nanoft.config import Config
from nanoft.runtime.device import DTYPES, choose_device, choose_dtype, describe_device
from nanoft.runtime.memory import memory_limit_bytes

PLANNED_SHARE = 0.9  # of the memory that a plan may fill


@dataclass(frozen=True)
class Machine:
    """Where a run computes, or where one is planned."""

    device: torch.device
    dtype: torch.dtype  # that the model computes in
    memory_bytes: float  # that this process may have on the device
    present: bool = True  # False: only described, by system.device and system.memory_gb

    @classmethod
    def detect(cls, config: Config) -> Machine:
        """This machine.

        Raises:
            UserError: the device is not available, or it has no matmul in model.dtype.
        """
        device = choose_device(config.system.device)
        return cls(device, choose_dtype(config.model.dtype, device), memory_limit_bytes(device))

    @classmethod
    def detect_or_describe(cls, config: Config) -> Machine:
        """This machine, or for --plan the one that the config describes if its device is not available here.

        Raises:
            UserError: the device is not available, and system.memory_gb is not set.
        """
        memory_gb = config.system.memory_gb
        try:
            choose_device(config.system.device)
        except UserError as error:
            if memory_gb is None:
                raise UserError(f"{error}, or give its system.memory_gb to --plan for it") from None
            dtype = DTYPES.get(config.model.dtype, torch.bfloat16)
            return cls(torch.device(config.system.device), dtype, memory_gb * 1e9, present=False)
        return cls.detect(config)

    @property
    def room_bytes(self) -> float:
        """What a plan may fill."""
        return PLANNED_SHARE * self.memory_bytes

    @property
    def name(self) -> str:
        """The name of the device alone, for comparing ranks."""
        return describe_device(self.device).partition(",")[0]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")
