"""Check by trial what the machine can do.

An installed library may not work, a listed kernel may refuse, an existing disk may be full. So each line is the outcome
of a small trial: ok; warn, if something will be slow, or is missing but not needed by this config; FAIL, if it prevents
a run. warn and FAIL say what to do.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants, get_token
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanoft import UserError
from nanoft.attention import Scores
from nanoft.config import Config
from nanoft.config.loading import load_config
from nanoft.data.sources import find_files
from nanoft.io.atomic import cache_home
from nanoft.io.hub import cache_directory, use_cache
from nanoft.io.untrusted import one_line
from nanoft.kernels.attention import CHUNK, attend, has_varlen
from nanoft.models.model_files import ModelFiles, check_quantization, quantization_of
from nanoft.nf4 import pack_4bit, unpack_bitsandbytes, unpack_table, uses_bitsandbytes
from nanoft.optim import OPTIMIZERS, check_optimizer
from nanoft.runtime.command import Check
from nanoft.runtime.device import (
    Machine,
    choose_device,
    choose_dtype,
    describe_device,
    library_versions,
    matmul_gflop_s,
    quiet_libraries,
    supports_matmul,
)
from nanoft.runtime.memory import WATERMARK, memory_limit_bytes
from nanoft.tracking.trackers import require_tracker_packages
from nanoft.training.memory_plan import Planner
from nanoft.training.preflight import check_room
from nanoft.training.validation import validate_config

TESTED = {"python": ((3, 11), (3, 15)), "torch": ((2, 8), (2, 14))}  # first supported, first untested
FIX_BITSANDBYTES = "reinstall or update it, or set quantization.bits=16 and training.optimizer=adamw"
GB_ON_DISK = 10  # below this a checkpoint or a model may not fit


def check_machine(device: torch.device, config: Config | None = None) -> Iterator[Check]:
    """Checks of the machine; a failure of something that the config does not need is only a warning."""
    yield from versions()
    if device.type == "mps":
        yield metal()  # first: with a limit that PyTorch refuses, nothing else works
    yield Check("device", "ok", describe_device(device))
    yield from precision(device)
    yield from memory(device)
    yield from disk()
    yield from attention(device)
    packing = four_bits(device)
    needed = config is None or needs_bitsandbytes(config)
    yield packing if packing.passed or needed else replace(packing, outcome="warn")
    dtype = choose_dtype("auto", device)
    speed = f"{matmul_gflop_s(device, dtype, 1024, 4096):,.0f} GFLOP/s"
    yield Check("matmul", "ok", f"{speed} in {str(dtype).removeprefix('torch.')}")
    yield hub()


def versions() -> Iterator[Check]:
    found = library_versions()
    for name, (low, high) in TESTED.items():
        number = tuple(int(part) for part in found[name].split("+")[0].split(".")[:2])
        fix = "" if low <= number < high else f"tested with {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
        yield Check(name, "warn" if fix else "ok", found[name], fix)
    others = [f"{name} {version}" for name, version in found.items() if name not in TESTED]
    yield Check("libraries", "ok", ", ".join(others))


def precision(device: torch.device) -> Iterator[Check]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    working = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes if supports_matmul(dtype, device))
    chosen = str(choose_dtype("auto", device)).removeprefix("torch.")
    is_cuda = device.type == "cuda"
    capability = f"; compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}" if is_cuda else ""
    yield Check("precision", "ok", f"{working} work; model.dtype=auto selects {chosen}{capability}")
    if is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        fix = "model.dtype=auto selects float16, with loss scaling"
        yield Check("bfloat16", "warn", "not supported by this GPU", fix)


def metal() -> Check:
    """The memory limit of PyTorch on Metal. Source: PyTorch's notes on MPS environment variables."""
    macos, ratio = f"macOS {platform.mac_ver()[0]}", os.environ.get(WATERMARK)
    if ratio is None:
        return Check("Metal", "ok", f"{macos}; memory is limited to what Metal recommends, beyond which a Mac swaps")
    is_safe = ratio.replace(".", "", 1).isdecimal() and 0 < float(ratio) <= 1  # 0: no limit
    fix = "" if is_safe else f"unset {WATERMARK}, or set it to at most 1: a Mac swaps before memory runs out"
    return Check("Metal", "ok" if is_safe else "warn", f"{macos}; {WATERMARK}={ratio}", fix)


def memory(device: torch.device) -> Iterator[Check]:
    host = psutil.virtual_memory()
    low = host.available < 4e9
    found = f"{host.available / 1e9:.1f} of {host.total / 1e9:.1f} GB free"
    yield Check("memory", "warn" if low else "ok", found, "close other programs" if low else "")
    if device.type != "cpu":
        most = f"; Metal recommends {torch.mps.recommended_max_memory() / 1e9:.1f}" if device.type == "mps" else ""
        yield Check("device memory", "ok", f"{memory_limit_bytes(device) / 1e9:.1f} GB usable{most}")


def disk() -> Iterator[Check]:
    places = {"disk here": Path.cwd(), "Hub cache": cache_directory(), "data cache": cache_home()}
    for name, place in places.items():
        free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free / 1e9
        where = "model.cache_dir, XDG_CACHE_HOME or output.dir"
        fix = f"free some, or set {where} to another disk" if free < GB_ON_DISK else ""
        yield Check(name, "warn" if fix else "ok", f"{free:.0f} GB free in {place}", fix)


def attention(device: torch.device) -> Iterator[Check]:
    """Which of PyTorch's attention kernels run and agree with the plain formula."""
    dtype = choose_dtype("auto", device)
    q, k, v = torch.randn(3, 1, 4, 128, 64, device=device, dtype=dtype).unbind()
    future = torch.ones(128, 128, dtype=torch.bool, device=device).triu(1)
    scores = (q.float() @ k.float().mT / 8).masked_fill(future, -torch.inf)
    expected, works = scores.softmax(-1) @ v.float(), []
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    for kernel in kernels:
        with contextlib.suppress(RuntimeError), sdpa_kernel(kernel):
            found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            if torch.allclose(found.float(), expected, atol=2e-2):
                works.append(kernel.name.lower().removesuffix("_attention"))
    kind = Scores(q.shape[-1] ** -0.5)
    if device.type == "mps":  # used there, because PyTorch's own keeps all scores for backward
        found = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), kind).transpose(1, 2)
        works += [f"chunks of {CHUNK} queries"] * torch.allclose(found.float(), expected, atol=2e-2)
    packed = "; varlen for packed rows" if has_varlen(q.transpose(1, 2), kind) else ""
    yield Check("attention", "ok" if works else "FAIL", f"{', '.join(works) or 'no kernel'} work{packed}")


def four_bits(device: torch.device) -> Check:
    """Quantize a weight to NF4 and back: bitsandbytes must agree with the plain table look-up."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    parts = [part.to(device) for part in pack_4bit(weight, "nf4")]
    plain = unpack_table(parts, "nf4", torch.float32).view(weight.shape).cpu()
    error = ((plain - weight).norm() / weight.norm()).item()
    if not uses_bitsandbytes(device.type):
        return Check("4-bit weights", "ok", f"table look-up in PyTorch (round-trip error {error:.1%}, typical of NF4)")
    try:
        found = unpack_bitsandbytes(parts, "nf4", torch.float32).view(weight.shape).cpu()
    except Exception as problem:  # whatever a library that does not fit the machine raises
        return Check("4-bit weights", "FAIL", f"bitsandbytes fails ({problem})", FIX_BITSANDBYTES)
    if not torch.allclose(found, plain, atol=1e-6):
        return Check("4-bit weights", "FAIL", "bitsandbytes dequantizes incorrectly here", FIX_BITSANDBYTES)
    return Check("4-bit weights", "ok", f"bitsandbytes works (round-trip error {error:.1%}, typical of NF4)")


def hub() -> Check:
    """Whether there is a token for gated models; it is neither shown nor sent."""
    if constants.HF_HUB_OFFLINE:
        return Check("Hub", "warn", "offline (HF_HUB_OFFLINE)", "models must be in the cache or in a directory")
    if get_token():
        return Check("Hub", "ok", "has a token")
    return Check("Hub", "warn", "no token", "for gated models: hf auth login")


def check_config(config: Config) -> Iterator[Check]:
    """Checks of what this config needs: known names, device, packages, files, memory."""
    yield (settings := _try("settings", lambda: _settings(config)))
    yield _try("model", lambda: _model(config))
    yield _try("data", lambda: _data(config))
    if settings.passed:
        yield _try("room", lambda: _room(config))


def _try(name: str, trial: Callable[[], str | Check]) -> Check:
    """The check that the trial returns, or ok with the text that it returns; FAIL if it raises UserError."""
    try:
        found = trial()
    except UserError as error:
        return Check(name, "FAIL", one_line(error))
    return found if isinstance(found, Check) else Check(name, "ok", found)


def validate_environment(config: Config, machine: Machine) -> None:
    """Raise a UserError for what this machine cannot run, before anything is downloaded, read or loaded."""
    check_optimizer(config.training.optimizer, machine.device)
    require_tracker_packages(config.logging)
    if needs_bitsandbytes(config) and not (packing := four_bits(machine.device)).passed:
        raise UserError(f"{packing.name}: {packing.found}: {packing.fix}")


def needs_bitsandbytes(config: Config) -> bool:
    optimizer = OPTIMIZERS.get(config.training.optimizer)
    return config.quantization.bits == 4 or bool(optimizer and optimizer.needs_bitsandbytes)


def _settings(config: Config) -> str:
    validate_config(config)
    machine = Machine.detect(config)
    validate_environment(config, machine)
    return f"{config.training.optimizer} and {machine.dtype_name} work on {machine.device.type}"


def _model(config: Config) -> str:
    """The model's shape, from config.json alone; weights are located, not downloaded."""
    name = config.model.name
    files, where = ModelFiles.find(config.model.reference), ""
    check_quantization(files, quantization_of(config))
    if not config.model.random_init:
        try:
            files.shards()
        except UserError:
            if files.directory == Path(name).expanduser():
                raise
            where = "; its weights are not in the Hub cache yet"
    return "; ".join([f"{name}: {files.description}{where}", *files.notes])


def _data(config: Config) -> str:
    """Check that local files exist and can be read; nothing is downloaded from the Hub."""
    named = {"data.train_file": config.data.train_file, "data.validation_file": config.data.validation_file}
    given = {field: spec for field, spec in named.items() if spec is not None}
    for field, spec in given.items():
        found = [] if "://" in spec else find_files(spec, field)
        for path in chain.from_iterable(found):
            if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
                raise UserError(f"{field}: {path}: needs pyarrow: pip install -e '.[parquet]'")
    return ", ".join(given.values())


def _room(config: Config) -> Check:
    """ok if the planned micro-batch fits, warn if only smaller ones do, FAIL if not even batch size 1 does."""
    planner = Planner.of(config, Machine.detect(config), ModelFiles.find(config.model.reference).decoder).resolved(None)
    rows, length = planner.config.micro_batch_rows() * planner.unit_size, config.model.max_seq_length
    plan, room = planner.choose_activations(rows, length), planner.machine.room_bytes
    found = f"{plan.peak / 1e9:.2f} GB planned, {room / 1e9:.2f} GB available; {plan.recomputed}"
    if plan.peak <= room:
        return Check("room", "ok", found)
    fix = "micro-batches will be halved; training.micro_batch_size=auto avoids that"
    return Check("room", "warn", found, fix) if (smallest := check_room(planner, length)).passed else smallest


def run(args: argparse.Namespace) -> int:
    """`python -m nanoft doctor [CONFIG]`; returns the exit code: 2 if a check fails."""
    quiet_libraries()
    config = load_config(args.config, args.overrides) if args.config else None
    use_cache(config.model.cache_dir if config else "")
    device, passed = choose_device("auto"), True
    with contextlib.suppress(UserError):  # not available, which check_config reports
        device = choose_device(config.system.device) if config else device
    for check in chain(check_machine(device, config), check_config(config) if config else ()):
        print(check, flush=True)
        passed &= check.passed
    return 0 if passed else 2
