"""TODO."""

from __future__ import annotations

import contextlib
import gc
import itertools
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")  # where Linux shows the limits of containers and batch systems
MEMBERSHIP = Path("/proc/self/cgroup")  # and which of them this process lives under


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held so far, in 10^9 bytes: on the GPU if it computes there, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def memory_limit_bytes(device: torch.device) -> float:
    """What this process may have in all: what it has, and what is free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    if device.type == "mps":
        # Device and host share one memory, and other programs use it, too.
        held, recommended = torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
        return min(float(recommended), held + available_host_bytes())
    return available_host_bytes() + psutil.Process().memory_info().rss


def cgroup_limits() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each cgroup above this process that has a limit.

    A page cache that can be dropped (`inactive_file`) is not counted as used. Source: the kernel's
    admin-guide/cgroup-v2 ("Memory Interface Files") and cgroup-v1/memory.
    """
    with contextlib.suppress(OSError):  # not Linux
        for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2: one tree
                yield from _limits(CGROUPS, path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                yield from _limits(CGROUPS / "memory", path, *names)


def _limits(root: Path, path: str, limit: str, usage: str, cache: str) -> Iterator[tuple[int, int]]:
    """From the process's own cgroup up to the root; inside a container, only the root may be there."""
    own = root / path.lstrip("/")
    for directory in itertools.takewhile(lambda parent: parent.is_relative_to(root), [own, *own.parents]):
        with contextlib.suppress(OSError, ValueError):  # not there; `max`: no limit here
            most, used = (int((directory / name).read_text(encoding="utf-8")) for name in (limit, usage))
            statistic = dict(row.split() for row in (directory / "memory.stat").read_text("utf-8").splitlines())
            yield most, used - int(statistic.get(cache, 0))


def total_memory_gb(device: torch.device) -> float:
    """What the device has in all, in 10^9 bytes; on a Mac and a CPU, the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return psutil.virtual_memory().total / 1e9


def resident_bytes(device: torch.device) -> float:
    """What the process has before anything is loaded; on a GPU, nothing."""
    return float(psutil.Process().memory_info().rss) if device.type == "cpu" else 0.0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = (
        *("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed"),
        "invalid buffer size",  # on Metal: a tensor larger than it can have
    )
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)


class Shortage:
    """`with Shortage(device) as short:` swallows an out-of-memory error and is true then; everything else passes.

    When the block is left, nothing holds its tensors any more (a caught error would hold the frames that do), and what
    the allocator had kept for itself is given back.
    """

    def __init__(self, device: torch.device):
        self.device, self.happened = device, False

    def __enter__(self) -> Shortage:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> bool:
        self.happened = error is not None and is_out_of_memory(error)
        if error is not None and self.happened:
            error.__traceback__ = error.__context__ = None
            release_memory(self.device)
        return self.happened

    def __bool__(self) -> bool:
        return self.happened


def release_memory(device: torch.device) -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def available_host_bytes() -> float:
    """Main memory that this process could still take without swapping: the machine's, or what a cgroup grants."""
    return float(min([psutil.virtual_memory().available, *(limit - used for limit, used in cgroup_limits())]))


@dataclass(frozen=True)
class MemoryReading:
    """Memory at one moment, in bytes: held by this process, and all that it may have, on the device and on the host."""

    device_held: float
    device_limit: float
    host_held: float  # resident
    host_limit: float

    def shares(self) -> dict[str, float]:
        """How much of what it may have the process holds; a computer whose device is the CPU has only the host."""
        shares = {"device": self.device_held / self.device_limit, "host": self.host_held / self.host_limit}
        if self.device_limit == self.host_limit:
            del shares["device"]
        return shares

    def figures(self) -> dict[str, float]:
        """For a `memory` line of metrics.jsonl, in 10^9 bytes."""
        names = ("device_held", "device_limit", "host_held", "host_limit")
        return {f"{name}_gb": round(getattr(self, name) / 1e9, 4) for name in names}


def read_memory(device: torch.device) -> MemoryReading:
    """Look at the machine; some tens of microseconds."""
    held = float(psutil.Process().memory_info().rss)
    limit = available_host_bytes() + held
    if device.type == "cuda":
        return MemoryReading(float(torch.cuda.memory_reserved(device)), memory_limit_bytes(device), held, limit)
    if device.type == "mps":
        return MemoryReading(float(torch.mps.driver_allocated_memory()), memory_limit_bytes(device), held, limit)
    return MemoryReading(held, limit, held, limit)


class MemoryMonitor:
    """Warns before memory runs out: at 85, 90 and 95 % of what the process may have, and when it grows and grows.

    A leak is told from noise by medians: of each window of looks one median, through the windows the line whose slope
    is the median of all slopes between two of them (Theil, 1950; Sen, 1968). It is a leak if nearly all of those slopes
    rise and the line has grown by more than a reader of caches explains.
    """

    LEVELS = (0.85, 0.90, 0.95)
    LOOKS = 30  # of a window
    WINDOWS = 8
    RISING = 0.9  # share of the slopes that must be positive
    GROWTH = 0.02  # of what was held, over all windows; and at least
    GROWTH_BYTES = 32e6

    def __init__(self, device: torch.device, every_s: float = 1.0):
        """
        Args:
            every_s: seconds between two looks; what `check` costs in between is reading the clock.
        """
        self.device, self.every_s = device, every_s
        self.told: dict[str, float] = {}  # place -> the highest level that was warned of
        self.leak_told = False
        self._last_s = -float("inf")
        self._looks: list[tuple[int, float]] = []
        self._windows: deque[tuple[float, float]] = deque(maxlen=self.WINDOWS)  # (step, bytes)

    def check(self, step: int) -> list[str]:
        """Look, if it is time to; returns what to warn of, each thing once.

        Args:
            step: completed optimizer steps, for saying how fast memory grows.
        """
        if time.monotonic() - self._last_s < self.every_s:
            return []
        self._last_s = time.monotonic()
        now = read_memory(self.device)
        return [*self._levels(now), *self._leak(step, now)]

    def _levels(self, now: MemoryReading) -> Iterator[str]:
        for place, share in now.shares().items():
            level = max((level for level in self.LEVELS if level <= share), default=0.0)
            if level <= self.told.get(place, 0.0):
                continue
            self.told[place] = level
            limit = now.host_limit if place == "host" else now.device_limit
            where = f"the {limit / 1e9:.2f} GB that it may have" + (f" on {self.device}" if place == "device" else "")
            yield (
                f"the process holds {share:.0%} of {where}: lower training.micro_batch_size and raise "
                "gradient_accumulation_steps as much, set training.checkpointing=full, or lower model.max_seq_length"
            )

    def _leak(self, step: int, now: MemoryReading) -> Iterator[str]:
        self._looks.append((step, now.host_held))
        if len(self._looks) < self.LOOKS:
            return
        steps, held = zip(*self._looks, strict=True)
        self._looks.clear()
        self._windows.append((statistics.median(steps), statistics.median(held)))
        if self.leak_told or len(self._windows) < self.WINDOWS:
            return
        per_step, rising = theil_sen_slope(list(self._windows))
        (first_step, first), (last_step, last) = self._windows[0], self._windows[-1]
        grown = per_step * (last_step - first_step)
        if rising >= self.RISING and grown > max(self.GROWTH * first, self.GROWTH_BYTES):
            self.leak_told = True
            left, steps_watched = (now.host_limit - last) / per_step, last_step - first_step
            yield (
                f"memory has grown by {grown / 1e6:,.0f} MB in {steps_watched:,.0f} steps and is full in about "
                f"{left:,.0f} more: stop with Ctrl-C and give the same command again: a fresh process goes on"
            )


def theil_sen_slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Median of the slopes between all pairs of points (Theil, 1950; Sen, 1968), and the share of them that rise."""
    slopes = [(y - b) / (x - a) for (a, b), (x, y) in itertools.combinations(points, 2) if x != a]
    return (statistics.median(slopes), sum(s > 0 for s in slopes) / len(slopes)) if slopes else (0.0, 0.0)
