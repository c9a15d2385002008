"""Will it run here? What the machine really does, tried rather than asked.

    python -m nanoft doctor                     versions, device, memory, kernels, 4-bit weights, the Hub
    python -m nanoft doctor configs/h100.py     and whether this config can run: exit code 2 if it cannot

A library that is installed may not work, a kernel that is listed may refuse, a disk that is there may be full. So each
line is the outcome of a small trial: green when it works, yellow when something will be slower or is missing that this
config does not need, red when it cannot run; yellow and red say what to do.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import huggingface_hub
import psutil
import torch
from huggingface_hub import constants
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanoft import UserError
from nanoft.config import Config
from nanoft.config.loading import load_config
from nanoft.data.cache import cache_home
from nanoft.data.sources import find_files
from nanoft.io.untrusted import one_line
from nanoft.kernels.attention import CHUNK, attend, has_varlen
from nanoft.metrics import answers
from nanoft.models.families import read_shape
from nanoft.models.hub import find_model
from nanoft.models.weights import check_quantization, quantization_of, shard_paths
from nanoft.nf4 import pack_4bit, unpack_bitsandbytes, unpack_table, uses_bitsandbytes
from nanoft.optim import check_optimizer
from nanoft.runtime.command import Arguments, command
from nanoft.runtime.device import (
    WATERMARK,
    choose_device,
    choose_dtype,
    describe_device,
    quiet_libraries,
    supports_matmul,
)
from nanoft.runtime.memory import memory_limit_bytes
from nanoft.tracking.trackers import require_tracker_packages
from nanoft.training.memory_plan import (
    choose_activations,
    describe_recompute,
    find_machine,
    matmul_gflop_s,
    resolve_micro_batch_size,
)
from nanoft.training.preflight import check_room

Color = Literal["green", "yellow", "red"]
CODES = {"green": "32", "yellow": "33", "red": "31"}
TESTED = {"torch": ((2, 8), (2, 14)), "python": ((3, 11), (3, 15))}  # from, and below
LOW_RATIO = 1.4  # PyTorch's PYTORCH_MPS_LOW_WATERMARK_RATIO, unless it is set; may not be above the high one
FIX = "reinstall or update it, or quantization.bits=16 and training.optimizer=adamw"
GB_ON_DISK = 10  # below this a checkpoint or a model may not fit


@dataclass(frozen=True)
class Line:
    """What was tried, how it went, and what to do about it."""

    color: Color
    name: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.color:6} {self.name:13} {self.found}" + (f": {self.fix}" if self.fix else "")

    def colored(self) -> str:
        return str(self).replace(self.color, f"\033[{CODES[self.color]}m{self.color}\033[0m", 1)


def look_around(device: torch.device, config: Config | None = None) -> Iterator[Line]:
    """The machine; what a config can do without is no worse than yellow."""
    yield from versions()
    if device.type == "mps":
        yield metal()  # first: with a limit that PyTorch refuses, nothing else can be asked
    yield Line("green", "device", describe_device(device))
    yield from precision(device)
    yield from memory(device)
    yield from disk()
    yield from attention(device)
    line = four_bits(device)
    yield replace(line, color="yellow") if line.color == "red" and config and not needs_bitsandbytes(config) else line
    yield speed(device)
    yield hub()


def versions() -> Iterator[Line]:
    """Python and PyTorch, against those that nanoft is tested with."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name, version in found.items():
        low, high = TESTED[name]
        number = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        if low <= number < high:
            yield Line("green", name, version)
        else:
            wanted = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
            yield Line("yellow", name, version, f"tested with {wanted}")
    others = ("safetensors", "tokenizers", "bitsandbytes", "numpy", "huggingface_hub")
    yield Line("green", "libraries", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in others))


def precision(device: torch.device) -> Iterator[Line]:
    """Which numbers a matrix product really takes here."""
    able = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if supports_matmul(dtype, device):
            able.append(str(dtype).removeprefix("torch."))
    chosen = str(choose_dtype("auto", device)).removeprefix("torch.")
    capability = (
        f"; compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}"
        if device.type == "cuda"
        else ""
    )
    yield Line("green", "precision", f"{', '.join(able)} work; model.dtype=auto takes {chosen}{capability}")
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Line("yellow", "bfloat16", "this GPU has none", "model.dtype stays float32: slower, twice the memory")


def metal() -> Line:
    """Which limit PyTorch sets itself on Metal. Source: its notes on MPS environment variables."""
    name, low = WATERMARK, WATERMARK.replace("HIGH", "LOW")
    macos = f"macOS {platform.mac_ver()[0]}"
    if name not in os.environ:
        return Line("green", "Metal", f"{macos}; the limit is what Metal recommends, beyond which a Mac swaps")
    given = {key: os.environ[key] for key in (name, low) if key in os.environ}
    found = "; ".join([macos, *(f"{key}={ratio}" for key, ratio in given.items())])
    try:
        high, lower = float(given[name]), float(given.get(low, LOW_RATIO))
    except ValueError:
        return Line("red", "Metal", f"{found}: is no number", f"unset {name} and {low}")
    if not 0 <= high <= 2:
        return Line("red", "Metal", f"{found}: is not from 0 to 2", f"unset {name}")
    if 0 < high < lower:
        return Line("red", "Metal", f"{found}: stops PyTorch", f"set {low} to less, or unset {name}")
    if high == 0 or high > 1:
        return Line("yellow", "Metal", f"{found}: swaps before memory runs out", f"unset {name}, or at most 1")
    return Line("green", "Metal", found)


def memory(device: torch.device) -> Iterator[Line]:
    """What is free, on the host and on the device."""
    host = psutil.virtual_memory()
    low = host.available < 4e9
    found = f"{host.available / 1e9:.1f} of {host.total / 1e9:.1f} GB free"
    yield Line("yellow" if low else "green", "memory", found, "close other programs" if low else "")
    if device.type != "cpu":
        most = f"; Metal recommends {torch.mps.recommended_max_memory() / 1e9:.1f}" if device.type == "mps" else ""
        yield Line("green", "device memory", f"{memory_limit_bytes(device) / 1e9:.1f} GB may be used{most}")


def disk() -> Iterator[Line]:
    """Room where runs, the Hub's models and tokenized data go."""
    home = cache_home()
    places = {"disk here": Path.cwd(), "Hub cache": Path(constants.HF_HUB_CACHE), "data cache": home}
    for name, place in places.items():
        there = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        fix = "free some, or set HF_HOME, XDG_CACHE_HOME or output.dir to another disk" if free < GB_ON_DISK else ""
        yield Line("yellow" if fix else "green", name, f"{free:.0f} GB free in {place}", fix)


def attention(device: torch.device) -> Iterator[Line]:
    """Which of PyTorch's attention kernels run, and agree with the plain formula."""
    dtype = choose_dtype("auto", device)
    q, k, v = torch.randn(3, 1, 4, 128, 64, device=device, dtype=dtype).unbind()
    weights = (q.float() @ k.float().mT / 8).masked_fill(
        torch.ones(128, 128, dtype=torch.bool, device=device).triu(1), -torch.inf
    )
    expected, works = weights.softmax(-1) @ v.float(), []
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    for kernel in kernels:
        with contextlib.suppress(RuntimeError), sdpa_kernel(kernel):
            found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            if torch.allclose(found.float(), expected, atol=2e-2):
                works.append(kernel.name.lower().removesuffix("_attention"))
    if device.type == "mps":  # what nanoft takes there, because PyTorch's own holds all pairs for backward
        found = attend(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
        works += [f"chunks of {CHUNK} queries"] * torch.allclose(found.float(), expected, atol=2e-2)
    packed = "; packed rows by the varlen kernel" if has_varlen(q.transpose(1, 2), None) else ""
    yield Line("green" if works else "red", "attention", f"{', '.join(works) or 'no kernel'} work{packed}")


def four_bits(device: torch.device) -> Line:
    """Pack and unpack a weight in NF4: bitsandbytes must give what the plain table gives."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    parts = [part.to(device) for part in pack_4bit(weight, "nf4")]
    plain = unpack_table(parts, "nf4", torch.float32).view(weight.shape).cpu()
    error = ((plain - weight).norm() / weight.norm()).item()
    if not uses_bitsandbytes(device.type):
        return Line("green", "4-bit weights", f"by table lookup in plain PyTorch (error {error:.1%}, as NF4 has)")
    try:
        found = unpack_bitsandbytes(parts, "nf4", torch.float32).view(weight.shape).cpu()
    except Exception as problem:  # whatever a library that does not fit the machine raises
        return Line("red", "4-bit weights", f"bitsandbytes fails ({problem})", FIX)
    if not torch.allclose(found, plain, atol=1e-6):
        return Line("red", "4-bit weights", "bitsandbytes unpacks wrongly here", FIX)
    return Line("green", "4-bit weights", f"bitsandbytes works (round trip: {error:.1%} error, as NF4 has)")


def speed(device: torch.device) -> Line:
    """What a matrix product reaches."""
    dtype = choose_dtype("auto", device)
    reached = matmul_gflop_s(device, dtype, 1024, 4096)
    return Line("green", "matmul", f"{reached:,.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}")


def hub() -> Line:
    """Whether there is a token for gated models; it is not shown, and not sent anywhere."""
    if constants.HF_HUB_OFFLINE:
        return Line("yellow", "Hub", "offline (HF_HUB_OFFLINE)", "models must be in the cache or in a directory")
    if huggingface_hub.get_token():
        return Line("green", "Hub", "a token is there")
    return Line("yellow", "Hub", "no token", "for gated models: hf auth login")


# ---- For a config


def check_config(config: Config) -> Iterator[Line]:
    """What this config needs: device, packages, files, memory; a red line for what is missing."""
    trials: dict[str, Callable[[Config], Line]] = {"model": _model, "data": _data}
    device = _try("config", _device, config)
    yield device
    if device.color == "green":
        trials |= {"settings": _settings, "room": _room}
    for name, trial in trials.items():
        yield _try(name, trial, config)


def _try(name: str, trial: Callable[[Config], Line], config: Config) -> Line:
    """The trial's line, or a red one with what it raises."""
    try:
        return trial(config)
    except UserError as error:
        return Line("red", name, one_line(error))


def _device(config: Config) -> Line:
    return Line("green", "config", f"runs on {choose_device(config.system.device).type}")


def validate_environment(config: Config, device: torch.device) -> None:
    """What a run needs of this machine, tried in a second, before anything is fetched, read or loaded.

    Raises:
        UserError: the device has not the number format, the optimizer or a bitsandbytes that works; or a package of
            an extra is missing.
    """
    choose_dtype(config.model.dtype, device)
    check_optimizer(config.training.optimizer, device)
    require_tracker_packages(config.logging)
    answers.select_metrics(config.evaluation.metrics)
    if needs_bitsandbytes(config) and (line := four_bits(device)).color == "red":
        raise UserError(f"{line.name}: {line.found}: {line.fix}")


def needs_bitsandbytes(config: Config) -> bool:
    """For a base in 4 bits, and for optimizers whose moments are in 8 bits or paged."""
    return config.quantization.bits == 4 or config.training.optimizer not in ("adamw", "sgd")


def _settings(config: Config) -> Line:
    device = choose_device(config.system.device)
    validate_environment(config, device)
    dtype = str(choose_dtype(config.model.dtype, device)).removeprefix("torch.")
    return Line("green", "settings", f"{config.training.optimizer} and {dtype} work on {device.type}")


def _model(config: Config) -> Line:
    """The shape, from config.json alone; weights are looked for, not fetched."""
    name = config.model.name
    directory = find_model(name, files=["config.json"])
    check_quantization(directory, quantization_of(config))
    shape, where = read_shape(directory), ""
    if not config.model.random_init:
        try:
            shard_paths(directory)
        except UserError:
            if Path(name).is_dir():
                raise
            where = "; its weights are not in the Hub cache yet"
    return Line("green", "model", f"{name}: {shape.num_layers} layers of {shape.hidden_size}{where}")


def _data(config: Config) -> Line:
    """Files that are there, and the libraries that read them; what is on the Hub is not fetched."""
    named = {"data.train_file": config.data.train_file, "data.validation_file": config.data.validation_file}
    given = {field: spec for field, spec in named.items() if spec is not None}
    for field, spec in given.items():
        found = [] if "://" in spec else find_files(spec, field)
        for path in chain.from_iterable(found):
            if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
                raise UserError(f"{field}: {path}: needs pyarrow: pip install -e '.[parquet]'")
    return Line("green", "data", ", ".join(given.values()))


def _room(config: Config) -> Line:
    """Green if the whole plan fits, yellow if it will in smaller micro-batches, red if not one row does."""
    config = resolve_micro_batch_size(config, None)
    _, plan = choose_activations(config, config.micro_batch_rows(), config.model.max_seq_length)
    found = (
        f"{plan.peak / 1e9:.2f} GB by the plan, of {find_machine(config).room / 1e9:.2f} GB; {describe_recompute(plan)}"
    )
    if plan.peak <= find_machine(config).room:
        return Line("green", "room", found)
    least = check_room(config, config.model.max_seq_length)
    if not least.passed:
        return Line("red", "room", least.found, least.fix)
    return Line("yellow", "room", found, "micro-batches will be halved; training.micro_batch_size=auto spares that")


@command
def main(argv: list[str]) -> int:
    """`python -m nanoft doctor [CONFIG]`: a line for each trial; 2 if one of them is red."""
    parser = Arguments(
        prog="python -m nanoft doctor",
        description="Try what this machine can do, and whether a config can run on it.",
        epilog="examples: python -m nanoft doctor; python -m nanoft doctor configs/tiny.py quantization.bits=4",
    )
    parser.add_argument("config", nargs="?", help="Python, YAML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a setting")
    args = parser.parse_intermixed_args(argv)
    quiet_libraries()
    config = load_config(args.config, args.overrides) if args.config else None
    red = False
    for line in chain(look_around(_device_of(config), config), check_config(config) if config else ()):
        print(line.colored() if sys.stdout.isatty() else line, flush=True)
        red |= line.color == "red"
    return 2 if red else 0


def _device_of(config: Config | None) -> torch.device:
    """The config's device; if that is not here, which is a line of its own, the one that is."""
    with contextlib.suppress(UserError):
        return choose_device(config.system.device if config else "auto")
    return choose_device("auto")
