"""Memory readings against psutil and tensors of known size, the limits of cgroups, and the monitor on real leaks."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from nanoft.runtime import cores, memory
from nanoft.runtime.memory import (
    MemoryMonitor,
    available_host_bytes,
    cgroup_limits,
    is_out_of_memory,
    memory_limit_bytes,
    peak_memory_gb,
    read_memory,
)

CPU = torch.device("cpu")


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


def test_an_impossible_allocation_is_recognized() -> None:
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_of_cuda_is_what_tensors_held() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 1e9
    block = torch.ones(50_000_000, device=device)
    del block
    assert peak_memory_gb(device) - before == pytest.approx(0.2, rel=0.01)


# --- watching memory


def cgroup(root: Path, path: str, **values: str) -> None:
    directory = root / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (directory / name.replace("__", ".")).write_text(value)


def test_the_limits_of_every_cgroup_above_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "cgroup")
    assert list(cgroup_limits()) == []  # not Linux
    (tmp_path / "cgroup").write_text("0::/slurm/job_7/step\n")
    statistic = "anon 5\ninactive_file 300\nactive_file 7\n"
    cgroup(tmp_path, "slurm/job_7/step", memory__max="max\n", memory__current="9\n", memory__stat=statistic)
    cgroup(tmp_path, "slurm/job_7", memory__max="4000\n", memory__current="1000\n", memory__stat=statistic)
    cgroup(tmp_path, "slurm", memory__max="9000\n", memory__current="5000\n", memory__stat="anon 5\n")
    cgroup(tmp_path.parent, "", memory__max="1\n", memory__current="1\n", memory__stat="")  # no cgroup at all
    assert list(cgroup_limits()) == [(4000, 700), (9000, 5000)]
    assert available_host_bytes() == 3300
    held = psutil.Process().memory_info().rss
    assert memory_limit_bytes(CPU) == pytest.approx(held + 3300, rel=0.01)
    (tmp_path / "cgroup").write_text("5:cpuset:/a\n0::/\n")  # in a container
    cgroup(tmp_path, "", memory__max="2000\n", memory__current="600\n", memory__stat="inactive_file 50\n")
    assert list(cgroup_limits()) == [(2000, 550)]
    cgroup(tmp_path, "", memory__max="max\n")
    assert available_host_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.05)


def test_the_cgroups_of_this_machine_are_read() -> None:
    for limit, used in cgroup_limits():
        assert 0 < used < limit
    assert 0 < available_host_bytes() <= psutil.virtual_memory().total


def test_memory_is_warned_of_at_each_level_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process holds is real; what it may have is a cgroup's."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "cgroup")
    (tmp_path / "cgroup").write_text("0::/\n")
    watch = MemoryMonitor(CPU, every_s=0)
    held = psutil.Process().memory_info().rss
    warned = []
    for share in (0.5, 0.84, 0.86, 0.87, 0.91, 0.8, 0.92, 0.96, 0.97, 0.99):
        cgroup(tmp_path, "", memory__max=str(int(held / share)), memory__current=str(held), memory__stat="")
        warned.append([warning.split(" of ")[0] for warning in watch.check(1)])
    say = "the process holds {} %".replace(" %", "%").format
    assert warned == [[], [], [say(86)], [], [say(91)], [], [], [say(96)], [], []]
    cgroup(tmp_path, "", memory__max=str(int(held / 0.2)), memory__current=str(held), memory__stat="")
    held_and_limits = {"device_held_gb": 9, "device_limit_gb": 10, "host_held_gb": 1, "host_limit_gb": 8}
    (warning,) = MemoryMonitor(torch.device("cuda"), every_s=0)._levels(held_and_limits)
    fix = "lower training.micro_batch_size and raise gradient_accumulation_steps by the same factor"
    assert warning.startswith(f"the process holds 90% of its device memory limit of 10.00 GB: {fix}")


def test_looking_is_not_done_more_often_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = read_memory
    monkeypatch.setattr(memory, "read_memory", lambda device: looked.append(1) or real(device))
    watch = MemoryMonitor(CPU, every_s=3600)
    for step in range(100):
        watch.check(step)
    assert len(looked) == 1


@pytest.mark.parametrize("leaks", [False, True])
def test_a_leak_is_told_from_a_warm_up(leaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real allocations: some at the beginning, and then none, or one at every step."""
    monkeypatch.setattr(MemoryMonitor, "READINGS", 40)
    watch, kept, warnings = MemoryMonitor(CPU, every_s=0), [], []
    for step in range(60):
        if leaks or step < 8:
            kept.append(mmap.mmap(-1, 4_000_000))  # never memory that the allocator has kept
            kept[-1].write(bytes(4_000_000))
        temporary = np.ones(250_000 * (1 + step % 3))
        warnings += [warning for warning in watch.check(step) if "grown" in warning]
        del temporary
    assert len(warnings) == leaks
    if leaks:
        assert float(warnings[0].split(" MB")[0].split()[-1]) == pytest.approx(4 * 39, rel=0.2)
        assert "in 39 steps and will be full in about" in warnings[0]


def test_figures_are_those_of_the_process() -> None:
    now = read_memory(CPU)
    assert now["host_held_gb"] == pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=0.02)
    assert now["device_held_gb"] == pytest.approx(now["host_held_gb"], rel=0.02)
    assert now["host_limit_gb"] == pytest.approx(memory_limit_bytes(CPU) / 1e9, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_memory_of_a_gpu_is_watched_beside_the_hosts() -> None:
    device = torch.device("cuda")
    block = torch.ones(250_000_000, device=device)
    now = read_memory(device)
    assert now["device_held_gb"] == pytest.approx(torch.cuda.memory_reserved() / 1e9, abs=1e-4)
    assert now["device_held_gb"] >= block.nbytes / 1e9
    assert now["device_limit_gb"] <= torch.cuda.get_device_properties(device).total_memory / 1e9
