"""The machine that a run uses: its device, dtype and random state, library versions, and the config for it (`auto`).

What depends on the machine as a whole is here and in `memory`; a module with another path on some device asks
`device.type` there. The `Machine` of a run is detected once, at the start.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import logging
import os
import platform
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoft import UserError, __version__
from nanoft.config import Config
from nanoft.config.loading import CONFIGS, read_overrides, split_words
from nanoft.runtime import distributed
from nanoft.runtime.memory import WATERMARK, memory_limit_bytes, total_memory_gb

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GPU_CONFIGS = {"gpu_80gb.py": 78, "gpu_24gb.py": 23, "gpu_12gb.py": 12, "gpu_8gb.py": 0}  # minimum memory in GB
FLOAT16_CONFIGS = {"gpu_16gb_fp16.py": 15, "gpu_8gb.py": 0}  # the same for GPUs without bfloat16
LIBRARIES = ("torch", "safetensors", "tokenizers", "bitsandbytes", "numpy")


def choose_device(wanted: str) -> torch.device:
    """The device of system.device; `auto` prefers CUDA, then Metal, then the CPU."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name, is_present in present.items() if is_present]
    if wanted == "auto":
        wanted = available[0]
    if wanted not in available:
        there = ", ".join(available)
        raise UserError(f"system.device: {wanted} is not available here (available: {there}): set system.device=auto")
    if wanted == "mps" and WATERMARK not in os.environ:  # the user has set no limit: what Metal recommends
        torch.mps.set_per_process_memory_fraction(1.0)
    return torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of model.dtype; `auto`: bfloat16 on GPUs that have it, float16 on older CUDA GPUs, else float32."""
    if wanted == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.bfloat16 if device.type == "mps" and supports_matmul(torch.bfloat16, device) else torch.float32
    if wanted != "float32" and not supports_matmul(DTYPES[wanted], device):
        where = "CPU" if device.type == "cpu" else "GPU"
        raise UserError(f"model.dtype: {wanted} matmul is not supported on this {where}: set model.dtype=float32")
    return DTYPES[wanted]


def supports_matmul(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a small matmul gives the right result; tried, because no version number tells."""
    try:
        x = torch.eye(8, dtype=dtype, device=device)
        return torch.equal((x @ x).cpu(), x.cpu())
    except (RuntimeError, TypeError):  # Metal raises TypeError
        return False


def seed_everything(seed: int, threads: int | str, deterministic: bool) -> None:
    """Seed all generators; set CPU threads and deterministic kernels; quiet libraries."""
    quiet_libraries()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    set_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def running_sum(x: Tensor, dim: int) -> Tensor:
    """x.cumsum(dim), which PyTorch refuses on CUDA with deterministic algorithms."""
    return doubling_sum(x, dim) if x.is_cuda and torch.are_deterministic_algorithms_enabled() else x.cumsum(dim)


def doubling_sum(x: Tensor, dim: int) -> Tensor:
    """The same in log2(n) sums of numbers 1, 2, 4, ... positions apart (Hillis & Steele 1986), in a fixed order."""
    for step in (2**i for i in range((x.shape[dim] - 1).bit_length())):
        first, rest = x.tensor_split([step], dim)
        x = torch.cat((first, rest + x.narrow(dim, 0, rest.shape[dim])), dim)
    return x


def set_threads(threads: int | str) -> None:
    """Set the number of CPU threads; auto or 0: as torch found it (nanoft/runtime/cores.py)."""
    if isinstance(threads, int) and threads:
        torch.set_num_threads(threads)


def quiet_libraries() -> None:
    """Silence warnings and progress bars of other libraries."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "huggingface_hub", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def rng_state() -> dict[str, Any]:
    """The state of all global generators, which dropout uses, as JSON values."""
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
    version, python_state, gauss = state["python"]
    random.setstate((version, tuple(python_state), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        states = state["cuda"][: torch.cuda.device_count()]  # the run may have started on a machine with more GPUs
        torch.cuda.set_rng_state_all([_from_hex(s) for s in states])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_from_hex(state["mps"]))


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the state of all generators when the block ends."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def with_same_dropout(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a recomputed block the same dropout masks on Metal, which `checkpoint` (torch 2.13) does not do."""
    first: list[Tensor] = []

    def call(*arguments: Any) -> Tensor:
        state = torch.mps.get_rng_state()
        if not first:
            first.append(state)
            return block(*arguments)
        torch.mps.set_rng_state(first[0])
        y = block(*arguments)
        torch.mps.set_rng_state(state)
        return y

    return call


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def describe_device(device: torch.device) -> str:
    """The device, its memory and the CPU threads, for the terminal."""
    memory = total_memory_gb(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GB"
    if device.type == "mps":
        return f"Metal, {memory:.0f} GB unified memory, {memory_limit_bytes(device) / 1e9:.1f} GB usable"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads != 1)}, {memory:.0f} GB"


def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"nanoft": __version__, "python": platform.python_version(), **libraries}


def matmul_gflop_s(device: torch.device, dtype: torch.dtype, inner: int, outer: int) -> float:
    """Measured speed of x W^T, x (2048, inner), W (outer, inner), in 10^9 operations per second."""
    from torch.utils.benchmark import Timer  # takes half a second

    x = torch.randn(2048, inner, device=device).to(dtype)
    known = {"x": x, "weight": torch.randn(outer, inner, device=device).to(dtype)}
    timer = Timer("(x @ weight.T)[0, 0].item()  # waits", globals=known, num_threads=torch.get_num_threads())
    return 2 * x.numel() * outer / 1e9 / timer.blocked_autorange(min_run_time=0.5).median


@dataclass(frozen=True)
class Machine:
    """Where a run computes, or where one is planned."""

    device: torch.device
    dtype: torch.dtype  # of computation
    memory_bytes: float  # limit of this process on the device
    present: bool = True  # False: only described, by system.device and system.memory_gb

    @classmethod
    def detect(cls, config: Config) -> Machine:
        device = choose_device(config.system.device)
        return cls(device, choose_dtype(config.model.dtype, device), memory_limit_bytes(device))

    @classmethod
    def detect_or_describe(cls, config: Config) -> Machine:
        """This machine, or for --plan the one that the config describes if its device is not available here."""
        memory_gb = config.system.memory_gb
        try:
            choose_device(config.system.device)
        except UserError as error:
            if memory_gb is None:
                raise UserError(f"{error}, or set system.memory_gb to plan for that device") from None
            dtype = DTYPES.get(config.model.dtype, torch.bfloat16)
            return cls(torch.device(config.system.device), dtype, memory_gb * 1e9, present=False)
        return cls.detect(config)

    @property
    def room_bytes(self) -> float:
        """Memory that a plan may use."""
        return 0.9 * self.memory_bytes

    @property
    def name(self) -> str:
        """The name of the device alone, for comparing ranks."""
        return describe_device(self.device).partition(",")[0]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def select_device(device: torch.device, sharding: str) -> None:
    """Make `cuda` mean this process's own GPU, before anything is allocated."""
    world_size = distributed.world_size()
    if sharding == "full" and world_size == 1:
        raise UserError(
            "training.sharding: full shards the model over processes, but there is only one: start with "
            "torchrun --nproc-per-node N train.py, or set training.sharding=none"
        )
    if world_size > 1 and device.type == "mps":
        raise UserError("system.device: Metal supports one process: start train.py without torchrun")
    if world_size > 1 and device.type == "cuda":
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), torch.cuda.device_count()
        if wanted > there:
            raise UserError(f"torchrun: {wanted} processes for {there} GPUs: set --nproc-per-node {there}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", distributed.process_rank() % there)))


def pick_config(overrides: list[str]) -> Path:
    """The config for this machine; prints which one, and why."""
    device = choose_device(read_overrides(split_words(overrides)[1]).get("system.device", "auto"))
    path = config_for(device.type, total_memory_gb(device), choose_dtype("auto", device))
    if not distributed.process_rank():
        print(f"auto      configs/{path.name}, chosen for {describe_device(device)}")
    return path


def config_for(device_type: str, memory_gb: float, dtype: torch.dtype) -> Path:
    if device_type == "cuda":
        configs = FLOAT16_CONFIGS if dtype == torch.float16 else GPU_CONFIGS
        return CONFIGS / next(name for name, needed in configs.items() if memory_gb >= needed)
    return CONFIGS / {"mps": "m4.py", "cpu": "cpu.py"}[device_type]


@functools.cache
def without_compiler(optimizer: Any) -> Any:
    """The same class of optimizer without PyTorch's wrappers for its compiler, which would import it: two seconds."""
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in ("add_param_group", "zero_grad", "step")}
    return type(optimizer.__name__, (optimizer,), {**methods, "step": torch.no_grad()(methods["step"])})
