"""The machine under the run: which device, which number format, which seed, how much memory.

Everything that asks "where am I running?" asks here, so that the other modules never mention CUDA, Metal or the CPU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoft import UserError, __version__
from nanoft.runtime.memory import memory_limit_bytes, total_memory_gb

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WATERMARK = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"  # the limit on Metal, relative to what Metal recommends; 0: none
LIBRARIES = ("torch", "safetensors", "tokenizers", "bitsandbytes", "numpy")


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
        if wanted != "float32" and not supports_matmul(DTYPES[wanted], device):
            raise UserError(f"model.dtype: {device.type} does not multiply in {wanted} here: set model.dtype=float32")
        return DTYPES[wanted]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "mps" and supports_matmul(torch.bfloat16, device)
    return torch.bfloat16 if fast else torch.float32


def supports_matmul(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a small matrix product comes out right: tried, because no version number says it."""
    try:
        x = torch.eye(8, dtype=dtype, device=device)
        return torch.equal((x @ x).cpu(), x.cpu())
    except (RuntimeError, TypeError):  # Metal says TypeError
        return False


def seed_everything(seed: int, threads: int, deterministic: bool) -> None:
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
def preserve_rng_state() -> Iterator[None]:
    """What is done within draws no numbers from those that come after it, on any device."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def describe_device(device: torch.device) -> str:
    """One phrase for the terminal: the device, its memory, the threads."""
    memory = total_memory_gb(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GB"
    if device.type == "mps":
        return f"Metal, {memory:.0f} GB unified memory, of which it may have {memory_limit_bytes(device) / 1e9:.1f}"
    return f"CPU, {torch.get_num_threads()} threads, {memory:.0f} GB"


def library_versions() -> dict[str, str]:
    """What a result depends on: Python and the libraries that compute."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"nanoft": __version__, "python": platform.python_version(), **libraries}
