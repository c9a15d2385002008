"""Energy that the GPU of a run uses: nvmlDeviceGetTotalEnergyConsumption, millijoules since the driver was loaded.

The processor, memory, fans and the power supply are not measured: the figure is a lower bound.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

JOULES_PER_WH = 3600


class EnergyMeter:
    """The energy of a device between calls."""

    def __init__(self, device: torch.device):
        self.read = gpu_counter(device) if device.type == "cuda" else no_counter
        self.last = self.read()

    def used(self) -> float:
        """Joules since the last call, or since the start; 0 without a counter."""
        before, self.last = self.last, self.read()
        return self.last - before


def no_counter() -> float:
    return 0.0


def gpu_counter(device: torch.device) -> Callable[[], float]:
    """A function that reads NVML's counter in joules, through the driver's own library.

    Some GPUs have none, such as a MIG slice: NVML returns an error, and the value stays as it is.
    """
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        nvml.nvmlInit_v2()
        nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle))
        total = nvml.nvmlDeviceGetTotalEnergyConsumption
    except (OSError, AttributeError):  # no driver, or an older one
        return no_counter

    def read() -> float:
        total(handle, ctypes.byref(millijoules))
        return millijoules.value / 1000

    return read
