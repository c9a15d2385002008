"""The memory that a run holds and may hold, on the device and the host, and a monitor that warns before it runs out.

The limit of a process is what it holds plus what is free. In a container or a batch job, Linux grants less than the
machine has: the limits of all cgroups above the process apply. On a Mac, host and GPU share one memory. PyTorch allows
1.7 times what Metal recommends, but above the recommendation macOS swaps without an error. So the recommendation is the
limit here, unless PYTORCH_MPS_HIGH_WATERMARK_RATIO is set (docs/metal.md).
"""

from __future__ import annotations

import contextlib
import gc
import re
import resource
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator

import psutil
import torch

from nanoft.runtime.cores import own_cgroups

WATERMARK = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"  # limit as a multiple of Metal's recommendation; 0: no limit


def held_bytes(device: torch.device) -> float:
    """Memory that this process holds: reserved by PyTorch on a GPU, resident (RSS) on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.memory_reserved(device))
    if device.type == "mps":
        return float(torch.mps.driver_allocated_memory())
    return float(psutil.Process().memory_info().rss)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in 10^9 bytes: of tensors on CUDA, resident on a CPU; on Metal, what is held now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return held_bytes(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def memory_limit_bytes(device: torch.device) -> float:
    """Memory that this process may hold: what it holds and what is free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    if device.type == "mps":
        return min(float(torch.mps.recommended_max_memory()), held_bytes(device) + available_host_bytes())
    return available_host_bytes() + held_bytes(device)


def available_bytes(device: torch.device) -> float:
    """Memory that new tensors may take on the device; on CUDA this includes what PyTorch has reserved but not used."""
    in_use = torch.cuda.memory_allocated(device) if device.type == "cuda" else held_bytes(device)
    return memory_limit_bytes(device) - in_use


def total_memory_gb(device: torch.device) -> float:
    """Memory of a CUDA GPU, or else of the machine, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return psutil.virtual_memory().total / 1e9


def available_host_bytes() -> float:
    """Main memory that this process can still take without swapping, on the machine and within its cgroups."""
    return float(min([psutil.virtual_memory().available, *(limit - used for limit, used in cgroup_limits())]))


def cgroup_limits() -> Iterator[tuple[int, int]]:
    """Limit and usage in bytes of each cgroup above this process."""
    for directory in own_cgroups():
        with contextlib.suppress(OSError, ValueError):  # no such file, or `max`: no limit
            most, used = (int((directory / f"memory.{name}").read_text("utf-8")) for name in ("max", "current"))
            statistic = dict(row.split() for row in (directory / "memory.stat").read_text("utf-8").splitlines())
            yield most, used - int(statistic.get("inactive_file", 0))  # page cache that can be dropped


class OutOfMemory(Exception):
    """Memory ran out on some rank. Every rank raises it at the same place (`distributed.same_exception`)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemory)):
        return True
    texts = "out of memory|can(no|')t allocate memory|not enough memory|alloc_failed|invalid buffer size"  # last: Metal
    return isinstance(error, RuntimeError) and bool(re.search(texts, str(error).lower()))


def release_memory(device: torch.device, error: BaseException | None = None) -> None:
    """Return unused memory to the device; the frames of a caught error keep tensors alive until they are cleared."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__, error = None, error.__context__
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def read_memory(device: torch.device) -> dict[str, float]:
    """Memory that this process holds and may hold, on the device and the host, in 10^9 bytes: a `memory` event."""
    host = torch.device("cpu")
    figures = {
        "device_held_gb": held_bytes(device),
        "device_limit_gb": memory_limit_bytes(device),
        "host_held_gb": held_bytes(host),
        "host_limit_gb": memory_limit_bytes(host),
    }
    return {name: round(value / 1e9, 4) for name, value in figures.items()}


class MemoryMonitor:
    """Warns before memory runs out: at 85, 90 and 95 % of the limit, and when memory leaks.

    A leak is a nearly linear rise over the last readings, by more than caches explain.
    """

    LEVELS = (0.85, 0.90, 0.95)
    READINGS = 240
    RISING = 0.9  # correlation of memory and steps in a leak
    GROWTH, GROWTH_GB = 0.02, 0.032  # of a leak over all readings: at least this share of held memory, and this much

    def __init__(self, device: torch.device, every_s: float = 1.0):
        self.device, self.every_s = device, every_s  # seconds between readings; in between, only the clock is read
        self._warned: dict[str, float] = {}  # place -> the highest level already reported
        self._leak_warned = False
        self._last_s = -float("inf")
        self._readings: deque[tuple[int, float]] = deque(maxlen=self.READINGS)  # (step, held in GB)

    def check(self, step: int) -> list[str]:
        """New warnings after `step` completed optimizer steps, if a reading is due."""
        if time.monotonic() - self._last_s < self.every_s:
            return []
        self._last_s = time.monotonic()
        now = read_memory(self.device)
        return [*self._levels(now), *self._leak(step, now)]

    def _levels(self, now: dict[str, float]) -> Iterator[str]:
        for place in ("host",) if self.device.type == "cpu" else ("device", "host"):
            limit_gb = now[f"{place}_limit_gb"]
            share = now[f"{place}_held_gb"] / limit_gb
            level = max((level for level in self.LEVELS if level <= share), default=0.0)
            if level > self._warned.get(place, 0.0):
                self._warned[place] = level
                yield (
                    f"the process holds {share:.0%} of its {place} memory limit of {limit_gb:.2f} GB: lower "
                    "training.micro_batch_size and raise gradient_accumulation_steps by the same factor, "
                    "set training.checkpointing=full, or lower model.max_seq_length"
                )

    def _leak(self, step: int, now: dict[str, float]) -> Iterator[str]:
        self._readings.append((step, now["host_held_gb"]))
        if self._leak_warned or len(self._readings) < self.READINGS:
            return
        steps, held = zip(*self._readings, strict=True)
        per_step, taken = statistics.linear_regression(steps, held).slope, steps[-1] - steps[0]
        grown = per_step * taken
        if grown > max(self.GROWTH * held[0], self.GROWTH_GB) and statistics.correlation(steps, held) >= self.RISING:
            self._leak_warned = True
            yield (
                f"memory has grown by {1000 * grown:,.0f} MB in {taken:,.0f} steps and will be full in about "
                f"{(now['host_limit_gb'] - held[-1]) / per_step:,.0f} more: stop with Ctrl-C and run the same command "
                "again, which resumes in a new process"
            )
