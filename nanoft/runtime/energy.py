"""Energy that a run uses, as far as the hardware measures it:

    GPU         NVML, nvmlDeviceGetTotalEnergyConsumption: millijoules since the driver was loaded
    processor   Linux powercap, intel-rapl:N/energy_uj (also on AMD): microjoules, which wrap around at
                max_energy_range_uj; on most systems only root may read them

Counters that cannot be read are skipped, and memory, fans and the power supply are not measured: the sum is a lower
bound.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_WH = 3600


Counter = tuple[Callable[[], float], float]  # reads joules; the value at which it wraps around


class EnergyMeter:
    """The counters of a device and of the processors."""

    def __init__(self, device: torch.device):
        self.counters = _processors() + (_gpu(device) if device.type == "cuda" else [])
        self.last = [math.nan for _ in self.counters]
        self.used()

    def used(self) -> float:
        """Joules since the last call, or since the start; 0 without counters that can be read."""
        joules = 0.0
        for index, (read, wraps_at) in enumerate(self.counters):
            with contextlib.suppress(OSError, ValueError):
                before, self.last[index] = self.last[index], read()
                joules += self.last[index] - before + (wraps_at if self.last[index] < before else 0)
        return joules


def _processors() -> list[Counter]:
    """One counter per package, which includes its cores and memory controller."""
    counters: list[Counter] = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        with contextlib.suppress(OSError, ValueError):
            if (zone / "name").read_text().startswith("package"):
                read = functools.partial(_joules, zone / "energy_uj")
                counters.append((read, _joules(zone / "max_energy_range_uj")))
    return counters


def _joules(path: Path) -> float:
    return float(path.read_text()) / 1e6


def _gpu(device: torch.device) -> list[Counter]:
    """NVML's counter, through the driver's own library; none if the GPU has none, such as a MIG slice."""
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()

    def read() -> float:
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise OSError("no NVML energy counter")
        return millijoules.value / 1000

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
            return []
        return [(read, math.inf)]
    except (OSError, AttributeError):  # no driver, or an older one
        return []
