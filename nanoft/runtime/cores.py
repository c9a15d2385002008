"""The CPU cores of a run: how many it may use, how its threads wait for one another, and how many others use.

After every product the threads of OpenMP meet at a barrier. A thread that arrives early spins, which is fastest on idle
cores; on busy ones it burns the time that the last thread needs (a third of the speed with one busy process on two
cores). How threads wait changes no number, so it follows the load at the start. How many there are changes the order of
sums, so it never depends on the load: it is that of the cores, and a resumed run has as many as when it began.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

SPIN, SLEEP = ("GOMP_SPINCOUNT", "10000"), ("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP
HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")  # of torch: tensors of 2 MiB and more in pages of 2 MiB, not of 4 KiB
BUSY = 0.5  # cores that others take, from which on threads sleep
CGROUPS = Path("/sys/fs/cgroup")  # limits of containers and batch systems
MEMBERSHIP = Path("/proc/self/cgroup")  # the cgroups of this process
PROCESS = psutil.Process()
prepared = ""  # what `prepare` decided, if it is worth a line


def own_cgroups() -> Iterator[Path]:
    """The directories of the cgroups above this process (the kernel's admin-guide/cgroup-v2); none if not on Linux.

    In a container, only the root may be visible.
    """
    if MEMBERSHIP.is_file():
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
        own = CGROUPS / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
        yield from itertools.takewhile(lambda parent: parent.is_relative_to(CGROUPS), [own, *own.parents])


def allowed_cores() -> list[int]:
    """The numbers of the cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def quota() -> float:
    """The CPU time that the cgroups grant, in cores; infinite without a limit."""
    granted = [math.inf]
    for directory in own_cgroups():
        if (limit := directory / "cpu.max").is_file():
            most, period = limit.read_text("utf-8").split()
            granted.append(math.inf if most == "max" else int(most) / int(period))
    return min(granted)


def cores_of_others() -> float:
    """Cores that other processes took, on average since the last call, which psutil remembers."""
    percent = psutil.cpu_percent(percpu=True)  # without a core that is not online
    busy = sum(percent[core] for core in allowed_cores() if core < len(percent))
    return max(0.0, busy - PROCESS.cpu_percent()) / 100


def decide(environment: Mapping[str, str], cores: int, granted: float, others: float) -> dict[str, str]:
    """What to set before torch is imported; nothing if the environment has settings of OpenMP already."""
    if any(name.startswith(("OMP_", "GOMP_", "KMP_")) for name in environment):
        return {}
    threads = max(1, math.floor(min(cores, granted)))
    wanted = dict([SLEEP if cores - others < threads - BUSY else SPIN])
    return wanted if threads == cores else {**wanted, "OMP_NUM_THREADS": str(threads)}


def prepare(seconds: float = 0.2) -> None:
    """Choose the number of threads and how they wait, by the load measured over `seconds`; before importing torch.

    Tensors get huge pages: mapping and clearing new memory in small ones takes 4 % of a step.
    """
    global prepared
    if "torch" in sys.modules:
        return
    os.environ.setdefault(*HUGE_PAGES)
    if not decide(os.environ, 1, math.inf, 0.0):
        return
    cores = len(allowed_cores())
    cores_of_others()
    time.sleep(seconds)
    chosen = decide(os.environ, cores, quota(), others := cores_of_others())
    os.environ.update(chosen)
    if SLEEP[0] in chosen:
        prepared = f"other processes take {others:.1f} of {cores} cores: threads sleep while they wait"


def waiting() -> str:
    """How the threads of this process wait, as set in the environment."""
    return " ".join(f"{name}={os.environ[name]}" for name, _ in (SLEEP, SPIN) if name in os.environ)


class SlowdownMonitor:
    """Notices that a run has less than half of its best speed while other processes take its cores."""

    STEPS, SECONDS = 10, 1.0  # of a median: at least so many steps, and so long

    def __init__(self) -> None:
        self.best, self.totals, self.started = 0.0, (0, 0.0), time.monotonic()
        self.speeds: list[float] = []  # tokens/s of the last steps

    def check(self, tokens: int, seconds: float) -> str:
        """A warning after a step, given the totals of the run; empty if there is none."""
        new_tokens, new_seconds = tokens - self.totals[0], seconds - self.totals[1]
        self.totals = tokens, seconds
        if new_seconds > 0:  # after a rollback, the totals are lower
            self.speeds.append(new_tokens / new_seconds)
        if len(self.speeds) < self.STEPS or time.monotonic() - self.started < self.SECONDS:
            return ""
        speed, others = statistics.median(self.speeds), cores_of_others()
        self.speeds, self.started, self.best = [], time.monotonic(), max(self.best, speed)
        if speed >= self.best / 2 or others < BUSY:
            return ""
        return (
            f"{speed:,.0f} tokens/s instead of {self.best:,.0f}, while other processes take {others:.1f} of "
            f"{len(allowed_cores())} cores: stop with Ctrl-C and run the same command again, whose threads then sleep "
            "while they wait; or set system.threads=1, which changes results in their last bits"
        )
