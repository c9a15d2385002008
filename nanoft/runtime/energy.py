"""Energy that the GPU of a run uses: nvmlDeviceGetTotalEnergyConsumption, millijoules since the driver was loaded.

The processor, memory, fans and the power supply are not measured: the figure is a lower bound.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch

JOULES_PER_WH = 3600


class EnergyMeter:
    """The energy of a device between calls."""

    def __init__(self, device: torch.device):
        self.total: Any = None  # NVML's function, of the driver's own library
        self.handle, self.millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        with contextlib.suppress(OSError, AttributeError):  # no driver, or an older one
            if device.type == "cuda":
                nvml = ctypes.CDLL("libnvidia-ml.so.1")
                nvml.nvmlInit_v2()
                name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
                nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self.handle))
                self.total = nvml.nvmlDeviceGetTotalEnergyConsumption
        self.last = self.read()

    def read(self) -> float:
        """The counter in joules; 0 without one, as for a MIG slice, where NVML returns an error."""
        if self.total:
            self.total(self.handle, ctypes.byref(self.millijoules))
        return self.millijoules.value / 1000

    def used(self) -> float:
        """Joules since the last call, or since the start."""
        before, self.last = self.last, self.read()
        return self.last - before
