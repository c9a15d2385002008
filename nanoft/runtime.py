"""The machine under the run: which device, which number format, which seed, how much memory.

Everything that asks "where am I running?" asks here, so that the other modules never mention CUDA, Metal or the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import io
import itertools
import logging
import os
import platform
import random
import resource
import signal
import statistics
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import numpy as np
import psutil
import torch
from torch import Tensor

from nanoft import TrainingFailed, UserError, __version__
from nanoft.untrusted import one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WATERMARK = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"  # the limit on Metal, relative to what Metal recommends; 0: none
INTERRUPTED = 130  # what shells report after Ctrl-C
LIBRARIES = ("torch", "safetensors", "tokenizers", "bitsandbytes", "numpy")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
CGROUPS = Path("/sys/fs/cgroup")  # where Linux shows the limits of containers and batch systems
MEMBERSHIP = Path("/proc/self/cgroup")  # and which of them this process lives under


def choose_device(wanted: str) -> torch.device:
    """`auto` takes CUDA, then Metal, then the CPU; a device that is not there is the user's to change.

    PyTorch lets a Mac's GPU have 1.7 times what Metal recommends: the Mac swaps, and no error says that memory ran out.
    So Metal gives what it recommends and no more, unless PYTORCH_MPS_HIGH_WATERMARK_RATIO says otherwise.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, there in present.items() if there)
    if not present[wanted]:
        there = ", ".join(name for name, there in present.items() if there)
        raise UserError(f"system.device: {wanted} is not available here (there is {there}): set system.device=auto")
    if wanted == "mps" and WATERMARK not in os.environ:
        torch.mps.set_per_process_memory_fraction(1.0)
    return torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU that computes in it, float32 elsewhere.

    float16 is no choice: its smallest number is 6e-8, and gradients of a loss divided by thousands of tokens are less.

    Raises:
        UserError: the device does not multiply in what is wanted.
    """
    if wanted != "auto":
        if wanted != "float32" and not multiplies_in(DTYPES[wanted], device):
            raise UserError(f"model.dtype: {device.type} does not multiply in {wanted} here: set model.dtype=float32")
        return DTYPES[wanted]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "mps" and multiplies_in(torch.bfloat16, device)
    return torch.bfloat16 if fast else torch.float32


def multiplies_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a small matrix product comes out right: tried, because no version number says it."""
    try:
        x = torch.eye(8, dtype=dtype, device=device)
        return torch.equal((x @ x).cpu(), x.cpu())
    except (RuntimeError, TypeError):  # Metal says TypeError
        return False


def prepare(seed: int, threads: int, deterministic: bool) -> None:
    """Seed every generator, bound the CPU threads, ask for deterministic kernels, and hush the libraries."""
    quiet_libraries()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def quiet_libraries() -> None:
    """Keep other libraries' notices off the terminal: what nanoft prints is all that a user needs to read."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "huggingface_hub", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def rng_state() -> dict[str, Any]:
    """The state of every global generator as JSON values (dropout and the like draw from them)."""
    version, python_state, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(python_state), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [bytes(s.tolist()).hex() for s in torch.cuda.get_rng_state_all()]
    if torch.backends.mps.is_available():
        state["mps"] = bytes(torch.mps.get_rng_state().tolist()).hex()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    version, python_state, gauss = state["python"]
    random.setstate((version, tuple(python_state), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        here = state["cuda"][: torch.cuda.device_count()]  # the run may have begun on a machine with more
        torch.cuda.set_rng_state_all([_from_hex(s) for s in here])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_from_hex(state["mps"]))


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """What is done within draws no numbers from those that come after it, on any device."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


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
        return min(float(recommended), held + free_host_bytes())
    return free_host_bytes() + psutil.Process().memory_info().rss


def cgroup_memory() -> Iterator[tuple[int, int]]:
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
            free_memory(self.device)
        return self.happened

    def __bool__(self) -> bool:
        return self.happened


def free_memory(device: torch.device) -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_host_bytes() -> float:
    """Main memory that this process could still take without swapping: the machine's, or what a cgroup grants."""
    return float(min([psutil.virtual_memory().available, *(limit - used for limit, used in cgroup_memory())]))


def describe(device: torch.device) -> str:
    """One phrase for the terminal: the device, its memory, the threads."""
    memory = total_memory_gb(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GB"
    if device.type == "mps":
        return f"Metal, {memory:.0f} GB unified memory, of which it may have {memory_limit_bytes(device) / 1e9:.1f}"
    return f"CPU, {torch.get_num_threads()} threads, {memory:.0f} GB"


def versions() -> dict[str, str]:
    """What a result depends on: Python and the libraries that compute."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"nanoft": __version__, "python": platform.python_version(), **libraries}


class Arguments(argparse.ArgumentParser):
    """Command-line arguments; a mistake in them is one line, like every other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def command(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Give a command's `main` its exit codes: 2 and 3 with one line on stderr, 130 for Ctrl-C, never a traceback."""

    @functools.wraps(main)
    def with_exit_code(argv: list[str]) -> int:
        open_standard_streams()
        try:
            code = main(argv)
            sys.stdout.flush()  # here, and not at the interpreter's end, a reader that has gone is noticed
            return code
        except UserError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 2
        except TrainingFailed as error:
            print(f"failed: {one_line(error)}", file=sys.stderr)
            return 3
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # `... | head`: the reader has gone, and that is no mistake
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:  # a full disk, a directory that may not be written
            where = f"{error.filename}: " if error.filename else ""
            what = one_line(f"{where}{error.strerror or error}")
            print(f"error: {what}: put that right, then the same command again", file=sys.stderr)
            return 2

    return with_exit_code


def open_standard_streams() -> None:
    """Make stdin, stdout and stderr usable, however the command was started.

    A closed one (`>&-`) would hand its number to the next file that is opened, and what a library prints would go into
    a checkpoint. A letter that the terminal's encoding does not have is printed as its number.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 (as long as the process)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class _Forgiving(io.FileIO):
    """A file that takes everything: what cannot be written is dropped."""

    def write(self, data: Any) -> int:
        written = None  # also when the other side is slow and does not block
        with contextlib.suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written


def forgive_output() -> None:
    """From now on nothing that happens to the terminal can end the process.

    A training must outlive whoever watches it: `| head` that has read enough, a closed session, a full disk under a
    redirected log. What was printed stands in train.log, too.
    """
    for name, original in (("stdout", sys.__stdout__), ("stderr", sys.__stderr__)):
        stream = getattr(sys, name)
        if stream is not original or not isinstance(stream, io.TextIOWrapper):
            continue  # a notebook's or a test's own
        with contextlib.suppress(OSError):
            stream.flush()
        buffer = io.BufferedWriter(_Forgiving(stream.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True))


class StopRequest:
    """Turn a signal into a wish that the loop reads between two steps; a second SIGINT stops at once.

    SIGINT: Ctrl-C. SIGTERM: batch systems, `kill`. SIGHUP: the terminal went away. SIGUSR1: what SLURM sends a while
    before the time is up (`--signal=USR1@120`). What was ignored before stays ignored: `nohup` means it. Python hands
    signals to the main thread only, so in another one this changes nothing.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name


@dataclass(frozen=True)
class Memory:
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


def memory_now(device: torch.device) -> Memory:
    """Look at the machine; some tens of microseconds."""
    held = float(psutil.Process().memory_info().rss)
    limit = free_host_bytes() + held
    if device.type == "cuda":
        return Memory(float(torch.cuda.memory_reserved(device)), memory_limit_bytes(device), held, limit)
    if device.type == "mps":
        return Memory(float(torch.mps.driver_allocated_memory()), memory_limit_bytes(device), held, limit)
    return Memory(held, limit, held, limit)


class MemoryWatch:
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
        now = memory_now(self.device)
        return [*self._levels(now), *self._leak(step, now)]

    def _levels(self, now: Memory) -> Iterator[str]:
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

    def _leak(self, step: int, now: Memory) -> Iterator[str]:
        self._looks.append((step, now.host_held))
        if len(self._looks) < self.LOOKS:
            return
        steps, held = zip(*self._looks, strict=True)
        self._looks.clear()
        self._windows.append((statistics.median(steps), statistics.median(held)))
        if self.leak_told or len(self._windows) < self.WINDOWS:
            return
        per_step, rising = slope(list(self._windows))
        (first_step, first), (last_step, last) = self._windows[0], self._windows[-1]
        grown = per_step * (last_step - first_step)
        if rising >= self.RISING and grown > max(self.GROWTH * first, self.GROWTH_BYTES):
            self.leak_told = True
            left, steps_watched = (now.host_limit - last) / per_step, last_step - first_step
            yield (
                f"memory has grown by {grown / 1e6:,.0f} MB in {steps_watched:,.0f} steps and is full in about "
                f"{left:,.0f} more: stop with Ctrl-C and give the same command again: a fresh process goes on"
            )


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Median of the slopes between all pairs of points (Theil, 1950; Sen, 1968), and the share of them that rise."""
    slopes = [(y - b) / (x - a) for (a, b), (x, y) in itertools.combinations(points, 2) if x != a]
    return (statistics.median(slopes), sum(s > 0 for s in slopes) / len(slopes)) if slopes else (0.0, 0.0)


if __name__ == "__main__":
    from nanoft.environment import main

    sys.exit(main(sys.argv[1:]))
