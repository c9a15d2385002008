"""The machine under the run: which device, which number format, which seed, how much memory.

Everything that asks "where am I running?" asks here, so that the other modules never mention CUDA, Metal or the CPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import logging
import os
import platform
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import psutil
import torch
from torch import Tensor

from nanoft import TrainingFailed, UserError, __version__
from nanoft.untrusted import one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INTERRUPTED = 130  # what shells report after Ctrl-C
LIBRARIES = ("torch", "safetensors", "tokenizers", "bitsandbytes", "numpy")


def choose_device(wanted: str) -> torch.device:
    """`auto` takes CUDA, then Metal, then the CPU; a device that is not there is the user's to change."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, there in present.items() if there)
    if not present[wanted]:
        there = ", ".join(name for name, there in present.items() if there)
        raise UserError(f"system.device: {wanted} is not available here (there is {there}): set system.device=auto")
    return torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU that computes in it, float32 elsewhere (float16 gradients underflow)."""
    if wanted != "auto":
        return DTYPES[wanted]
    fast = device.type == "mps" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.bfloat16 if fast else torch.float32


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
        torch.cuda.set_rng_state_all([_from_hex(s) for s in state["cuda"]])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_from_hex(state["mps"]))


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
        return float(torch.mps.recommended_max_memory())
    return float(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def resident_bytes(device: torch.device) -> float:
    """What the process has before anything is loaded; on a GPU, nothing."""
    return float(psutil.Process().memory_info().rss) if device.type == "cpu" else 0.0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)


def describe(device: torch.device) -> str:
    """One phrase for the terminal: the device, its memory, the threads."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    memory = psutil.virtual_memory().total / 1e9
    if device.type == "mps":
        return f"Metal, {memory:.0f} GB unified memory"
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
        try:
            return main(argv)
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


class StopRequest:
    """Turn SIGINT and SIGTERM into a wish that the loop reads between two steps; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
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
        self.signal_name = signal.Signals(number).name
