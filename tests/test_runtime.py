"""The machine: devices, seeds, signals and memory figures."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from nanoft import TrainingFailed, UserError, __version__, runtime
from nanoft.runtime import StopRequest, choose_device, choose_dtype, is_out_of_memory, peak_memory_gb

ROOT = Path(__file__).parent.parent
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
    assert choose_dtype("auto", torch.device("mps")) == torch.bfloat16
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert choose_dtype("float32", torch.device("mps")) == torch.float32


def draw() -> list[float]:
    """One number from each generator; the normal ones are drawn in pairs, of which the second is kept in the state."""
    return [random.random(), random.gauss(), np.random.random(), np.random.normal(), torch.rand(()).item()]


def test_random_state_goes_through_json_and_comes_back() -> None:
    runtime.prepare(3, 0, False)
    draw()
    state = json.loads(json.dumps(runtime.rng_state()))
    first, second = draw(), draw()
    runtime.set_rng_state(state)
    assert draw() == first
    assert draw() == second


def test_a_seed_settles_every_generator() -> None:
    threads = torch.get_num_threads()
    runtime.prepare(3, 1, False)
    first = draw()
    assert torch.get_num_threads() == 1
    runtime.prepare(4, 0, False)
    assert torch.get_num_threads() == 1  # 0 leaves them alone
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    runtime.prepare(3, threads, False)
    assert draw() == first


def test_deterministic_kernels_are_asked_for() -> None:
    code = "import os, torch; from nanoft.runtime import prepare; prepare(0, 0, {}); "
    code += "print(torch.are_deterministic_algorithms_enabled(), os.environ.get('CUBLAS_WORKSPACE_CONFIG'))"
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    for wanted, expected in ((True, "True :4096:8"), (False, "False None")):
        command = [sys.executable, "-c", code.format(wanted)]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.strip() == expected


def test_libraries_are_quiet() -> None:
    runtime.quiet_libraries()
    assert not logging.getLogger("bitsandbytes").isEnabledFor(logging.WARNING)
    assert logging.getLogger("bitsandbytes").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("lora.rank: 0:\n  out of range"), 2, "error: lora.rank: 0: out of range"),
        (TrainingFailed("diverged"), 3, "failed: diverged"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(28, "No space left on device", "/disk/x"),
            2,
            "error: /disk/x: No space left on device: put that right",
        ),
    ],
)
def test_what_ends_a_command_is_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @runtime.command
    def main(argv: list[str]) -> int:
        raise error

    assert main([]) == code
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_a_bug_is_not_hidden() -> None:
    @runtime.command
    def main(argv: list[str]) -> int:
        return 1 // len(argv)

    with pytest.raises(ZeroDivisionError):
        main([])
    assert main(["x"]) == 1


@pytest.mark.parametrize("script", ["train.py", "eval.py", "merge.py", "-m nanoft.generate"])
def test_a_mistake_in_the_arguments_is_one_line(script: str) -> None:
    done = subprocess.run(
        [sys.executable, *script.split(), "a", "--nonsense"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_wish_to_stop_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself: the checkpoint is still written
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_after_another_signal_stops_at_once(first: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest():  # noqa: PT012 (both signals are the point)
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),  # text of the user's, not of a device
        (KeyboardInterrupt(), False),
    ],
)
def test_telling_out_of_memory_from_other_errors(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_an_impossible_allocation_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_peak_memory_is_what_the_process_held() -> None:
    before = peak_memory_gb(CPU)
    block = np.ones(25_000_000)  # 0.2 GB, touched
    held = psutil.Process().memory_info().rss / 1e9
    del block
    assert peak_memory_gb(CPU) == pytest.approx(max(before, held), rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not PRESENT["cuda"], reason="needs CUDA")
def test_peak_memory_of_cuda_is_what_tensors_held() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 1e9
    block = torch.ones(50_000_000, device=device)
    del block
    assert peak_memory_gb(device) - before == pytest.approx(0.2, rel=0.01)


def test_the_description_names_the_machine() -> None:
    memory = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    assert runtime.describe(CPU) == f"CPU, {torch.get_num_threads()} threads, {memory}"


def test_versions_are_those_that_are_installed() -> None:
    versions = runtime.versions()
    assert versions["nanoft"] == __version__ == importlib.metadata.version("nanoft")
    assert versions["python"] == platform.python_version()
    assert torch.__version__.startswith(versions["torch"].split("+")[0])
    assert versions["numpy"] == np.__version__
