"""Devices, dtypes, seeds and random state, and `train.py auto`: the config for the machine."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import train
from nanoft import UserError, __version__
from nanoft.config.loading import load_file
from nanoft.runtime import device
from nanoft.runtime.device import (
    choose_device,
    choose_dtype,
    describe_device,
    doubling_sum,
    quiet_libraries,
    rng_state,
    running_sum,
    seed_everything,
    set_rng_state,
)
from tiny_models import make_chat_model, write_records

CPU = torch.device("cpu")
PRESENT = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


@pytest.mark.parametrize("name", PRESENT)
def test_a_device_is_taken_or_refused(name: str) -> None:
    if PRESENT[name]:
        assert choose_device(name).type == name
        return
    with pytest.raises(UserError, match=f"system.device: {name} is not available here .*cpu.*system.device=auto"):
        choose_device(name)


def test_auto_takes_an_accelerator_before_the_cpu() -> None:
    assert choose_device("auto").type == next(name for name in ("cuda", "mps", "cpu") if PRESENT[name])


def test_dtypes() -> None:
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert choose_dtype("float16", CPU) == torch.float16
    assert choose_dtype("float32", torch.device("mps")) == torch.float32


def test_float16_is_refused_in_one_line_where_it_does_not_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    monkeypatch.setattr(torch.Tensor, "__matmul__", refuse)
    with pytest.raises(UserError) as refused:
        choose_dtype("float16", CPU)
    wanted = "model.dtype: float16 matmul is not supported on this CPU: set model.dtype=float32"
    assert str(refused.value) == wanted


def draw() -> list[float]:
    """One number from each generator; the normal ones are drawn in pairs, of which the second is kept in the state."""
    return [random.random(), random.gauss(), np.random.random(), np.random.normal(), torch.rand(()).item()]


def test_random_state_goes_through_json_and_comes_back() -> None:
    seed_everything(3, 0, False)
    draw()
    state = json.loads(json.dumps(rng_state()))
    first, second = draw(), draw()
    set_rng_state(state)
    assert draw() == first
    assert draw() == second


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_random_state_of_a_machine_with_more_gpus_is_taken() -> None:
    state = rng_state()
    expected = torch.rand(3, device="cuda")
    set_rng_state({**state, "cuda": [*state["cuda"], *state["cuda"]]})
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_a_seed_settles_every_generator() -> None:
    threads = torch.get_num_threads()
    seed_everything(3, 1, False)
    first = draw()
    assert torch.get_num_threads() == 1
    seed_everything(4, 0, False)
    assert torch.get_num_threads() == 1  # 0 leaves them alone
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    seed_everything(3, threads, False)
    assert draw() == first


@pytest.mark.parametrize("length", [1, 2, 3, 64, 1000])
def test_sums_in_doubling_distances_are_running_sums(length: int) -> None:
    x = torch.randn(3, length, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dim, part in ((1, x), (-1, x[..., 0]), (0, x)):
        torch.testing.assert_close(doubling_sum(part, dim), part.cumsum(dim))
    assert torch.equal(running_sum(x, 1), x.cumsum(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_running_sums_are_not_refused_on_cuda() -> None:
    x = torch.rand(4, 1000, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            x.cumsum(1)
        torch.testing.assert_close(running_sum(x, 1).cpu(), x.cpu().cumsum(1))
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_kernels_are_asked_for() -> None:
    code = "import os, torch; from nanoft.runtime.device import seed_everything; seed_everything(0, 0, {}); "
    code += "print(torch.are_deterministic_algorithms_enabled(), os.environ.get('CUBLAS_WORKSPACE_CONFIG'))"
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    for wanted, expected in ((True, "True :4096:8"), (False, "False None")):
        command = [sys.executable, "-c", code.format(wanted)]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.strip() == expected


def test_libraries_are_quiet() -> None:
    quiet_libraries()
    assert not logging.getLogger("bitsandbytes").isEnabledFor(logging.WARNING)
    assert logging.getLogger("bitsandbytes").isEnabledFor(logging.ERROR)


def test_the_description_names_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    for threads, words in ((1, "1 thread"), (3, "3 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert describe_device(CPU) == f"CPU, {words}, {memory}"


def test_versions_are_those_that_are_installed() -> None:
    versions = device.library_versions()
    assert versions["nanoft"] == __version__ == importlib.metadata.version("nanoft")
    assert versions["python"] == platform.python_version()
    assert torch.__version__.startswith(versions["torch"].split("+")[0])
    assert versions["numpy"] == np.__version__


# --- train.py auto


@pytest.mark.parametrize(
    ("device_type", "memory_gb", "name"),
    [  # total memory as PyTorch gives it
        ("cuda", 6.2, "gpu_8gb"),  # GTX 1660
        ("cuda", 8.3, "gpu_8gb"),  # RTX 4060
        ("cuda", 12.5, "gpu_12gb"),  # RTX 3060
        ("cuda", 16.9, "gpu_12gb"),  # RTX 4080
        ("cuda", 23.8, "gpu_24gb"),  # A10G
        ("cuda", 25.4, "gpu_24gb"),  # RTX 4090
        ("cuda", 42.3, "gpu_24gb"),  # A100 40GB
        ("cuda", 85.0, "gpu_80gb"),  # H100
        ("cuda", 150.1, "gpu_80gb"),  # H200
        ("mps", 34.4, "m4"),
        ("cpu", 16.0, "cpu"),
        ("cuda without bfloat16", 6.2, "gpu_8gb"),  # RTX 2060
        ("cuda without bfloat16", 11.5, "gpu_8gb"),  # RTX 2080 Ti
        ("cuda without bfloat16", 15.6, "gpu_16gb_fp16"),  # T4
        ("cuda without bfloat16", 34.1, "gpu_16gb_fp16"),  # V100 32GB
    ],
)
def test_auto_takes_the_largest_config_that_the_device_has_memory_for(
    device_type: str, memory_gb: float, name: str
) -> None:
    device_type, _, rest = device_type.partition(" ")
    path = device.config_for(device_type, memory_gb, torch.float16 if rest else torch.bfloat16)
    assert path.stem == name
    config = load_file(path)
    assert config.system.device == device_type
    assert not config.system.memory_gb or config.system.memory_gb <= max(8, memory_gb * 1.01)


@pytest.mark.parametrize(("has_bfloat16", "name"), [(True, "gpu_12gb"), (False, "gpu_16gb_fp16")])
def test_auto_knows_whether_the_gpu_has_bfloat16(
    has_bfloat16: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 GB with (RTX 4080) and without (T4)."""
    monkeypatch.setattr(device, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(device, "total_memory_gb", lambda _: 16.9)
    monkeypatch.setattr(device, "describe_device", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    path = device.pick_config([])
    assert path.stem == name
    dtype = device.choose_dtype(load_file(path).override({"model.dtype": "auto"}).model.dtype, torch.device("cuda"))
    assert dtype == (torch.bfloat16 if has_bfloat16 else torch.float16)


def test_auto_says_what_it_takes_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chat_model(tmp_path / "base")
    own = [f"model.name={tmp_path / 'base'}", f"data.train_file={write_records(tmp_path / 'data.jsonl')}"]
    few = ["training.max_steps=1", "evaluation.prompts=2", "model.max_seq_length=256", "system.device=cpu"]
    assert train.main(["auto", *own, *few, f"output.dir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out.startswith("auto      configs/cpu.py, chosen for CPU, ")
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["model"]["name"] == str(tmp_path / "base")
    assert recorded["training"]["gradient_accumulation_steps"] == 8  # that of configs/cpu.py
