"""What a run takes from the socket, as far as the machine counts it.

GPUs of NVIDIA (Volta and newer) and most processors count their own energy:

    GPU         NVML, nvmlDeviceGetTotalEnergyConsumption: millijoules since the driver was loaded
    processor   Linux's powercap, /sys/class/powercap/intel-rapl:N/energy_uj (AMD's, too): microjoules, which begin
                again at 0 after max_energy_range_uj; on most systems only root may read them

A counter that cannot be read is left out, and so the figure is a lower bound: no memory, no fans, no power supply.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_WH = 3600


@dataclass
class EnergyCounter:
    """Something that counts energy, and what it said last."""

    read: Callable[[], float]  # J
    ends_at: float  # J: then it begins again at 0
    before: float

    def used(self) -> float:
        """Joules since the last look; 0 if it can no longer be read."""
        try:
            now = self.read()
        except (OSError, ValueError):
            return 0.0
        used = now - self.before if now >= self.before else now + self.ends_at - self.before
        self.before = now
        return used


class EnergyMeter:
    """The counters of a device and of the processors beside it."""

    def __init__(self, device: torch.device):
        readers = _processors() + (_gpu(device) if device.type == "cuda" else [])
        self.counters = [EnergyCounter(read, ends_at, read()) for read, ends_at in readers]

    def used(self) -> float:
        """Joules since the last look, or since the beginning; 0 where nothing is counted."""
        return sum(counter.used() for counter in self.counters)


def _processors() -> list[tuple[Callable[[], float], float]]:
    """Each package's counter and its end; a package's parts (cores, memory) are in its own."""
    found: list[tuple[Callable[[], float], float]] = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        try:
            if (zone / "name").read_text().startswith("package"):
                end = float((zone / "max_energy_range_uj").read_text()) / 1e6
                read = _microjoules(zone / "energy_uj")
                read()
                found.append((read, end))
        except (OSError, ValueError):
            continue
    return found


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: float(path.read_text()) / 1e6


def _gpu(device: torch.device) -> list[tuple[Callable[[], float], float]]:
    """NVML's counter of a GPU, by its driver's own library; none if there is no such counter, as in a slice of one."""
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()

    def read() -> float:
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise OSError("NVML has no energy counter here")
        return millijoules.value / 1000

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
            return []
        read()
    except (OSError, AttributeError):  # no driver, or an older one
        return []
    return [(read, math.inf)]
