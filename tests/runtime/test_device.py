"""Devices, dtypes, seeds and random state."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import random
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch

from nanoft import UserError, __version__
from nanoft.runtime import device
from nanoft.runtime.device import (
    choose_device,
    choose_dtype,
    describe_device,
    quiet_libraries,
    rng_state,
    seed_everything,
    set_rng_state,
)

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
    assert choose_dtype("float32", torch.device("mps")) == torch.float32


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


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("lora.rank: 0:\n  out of range"), 2, "error: lora.rank: 0: out of range"),
        (TrainingFailed("diverged"), 3, "failed: diverged"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(28, "No space left on device", "/disk/x"),
            2,
            "error: /disk/x: No space left on device: fix that",
        ),
    ],
)
def test_what_ends_a_command_is_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def main(argv: list[str]) -> int:
        raise error

    assert main([]) == code
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_a_bug_is_not_hidden() -> None:
    @command
    def main(argv: list[str]) -> int:
        return 1 // len(argv)

    with pytest.raises(ZeroDivisionError):
        main([])
    assert main(["x"]) == 1


@pytest.mark.parametrize("script", ["train.py", "eval.py", "merge.py", "-m nanoft chat"])
def test_a_mistake_in_the_arguments_is_one_line(script: str) -> None:
    done = subprocess.run(
        [sys.executable, *script.split(), "a", "--nonsense"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_becomes_a_wish_to_stop_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        for again in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # the checkpoint is still written
            os.kill(os.getpid(), again)
        assert stop.signal_name == number.name
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_an_interrupt_after_another_signal_stops_at_once(first: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest():  # noqa: PT012 (both signals are the point)
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_stays_ignored(ignored: signal.Signals) -> None:
    """`nohup` ignores SIGHUP, and a shell's script SIGINT for what it starts in the background."""
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), ignored)
            assert not stop
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop
        assert signal.getsignal(ignored) == signal.SIG_IGN
    finally:
        signal.signal(ignored, before)


def test_no_signal_is_lost_between_steps() -> None:
    """Sent from another process at any instant, while the loop asks and asks."""
    for _ in range(50):
        with StopRequest() as stop:
            child = os.fork()
            if child == 0:
                os.kill(os.getppid(), signal.SIGTERM)
                os._exit(0)
            deadline = time.monotonic() + 10
            while not stop:
                assert time.monotonic() < deadline
            os.waitpid(child, 0)


def test_in_another_thread_signals_are_left_alone() -> None:
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    seen: list[object] = []

    def use() -> None:
        with StopRequest() as stop:
            seen.extend([bool(stop), *(signal.getsignal(n) for n in STOP_SIGNALS)])

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [False, *before]


# --- standard streams


def test_a_command_whose_reader_has_gone_ends_quietly() -> None:
    code = "from nanoft.runtime.command import command; command(lambda _: print('x'))([])"
    command = f"{sys.executable} -c {code!r} | true; exit ${{PIPESTATUS[0]}}"
    command = command.replace("print(", "__import__('time').sleep(0.3) or print(")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


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
@pytest.mark.skipif(not PRESENT["cuda"], reason="needs CUDA")
def test_peak_memory_of_cuda_is_what_tensors_held() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 1e9
    block = torch.ones(50_000_000, device=device)
    del block
    assert peak_memory_gb(device) - before == pytest.approx(0.2, rel=0.01)


# --- watching memory


def series(values: list[float], every: int = 10) -> list[tuple[float, float]]:
    return [(every * number, value) for number, value in enumerate(values)]


def test_the_slope_is_the_median_of_all_slopes() -> None:
    assert theil_sen_slope(series([5.0 + 3 * n for n in range(8)])) == (pytest.approx(0.3), 1.0)
    assert theil_sen_slope(series([7.0] * 8)) == (0.0, 0.0)
    assert theil_sen_slope(series([3.0, 2.0, 1.0])) == (pytest.approx(-0.1), 0.0)
    wild = [5.0 + 3 * n for n in range(9)]
    wild[4] = 1e9  # one of nine may be anything
    assert theil_sen_slope(series(wild))[0] == pytest.approx(0.3, rel=0.5)
    assert theil_sen_slope([(1.0, 1.0), (1.0, 2.0)]) == (0.0, 0.0)  # no time has passed
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    between = (y[:, None] - y) / (x[:, None] - x + np.eye(30))
    points = [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
    assert theil_sen_slope(points)[0] == pytest.approx(np.median(between[np.triu_indices(30, 1)]))


def cgroup(root: Path, path: str, **values: str) -> None:
    directory = root / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (directory / name.replace("__", ".")).write_text(value)


def test_the_limits_of_every_cgroup_above_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "cgroup")
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
    (tmp_path / "cgroup").write_text("5:cpuset:/a\n4:cpu,memory:/docker/abc\n1:name=systemd:/b\n0::/\n")
    names = {"memory__usage_in_bytes": "600\n", "memory__stat": "inactive_file 1\ntotal_inactive_file 50\n"}
    cgroup(tmp_path, "memory", memory__limit_in_bytes="2000\n", **names)  # in a container: only the root is seen
    assert list(cgroup_limits()) == [(2000, 550)]
    unlimited = str(2**63 - 4096)
    cgroup(tmp_path, "memory", memory__limit_in_bytes=unlimited, **names)
    assert available_host_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.05)


def test_the_cgroups_of_this_machine_are_read() -> None:
    for limit, used in cgroup_limits():
        assert 0 < used < limit
    assert 0 < available_host_bytes() <= psutil.virtual_memory().total


def test_memory_is_warned_of_at_each_level_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process holds is real; what it may have is a cgroup's."""
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "cgroup")
    (tmp_path / "cgroup").write_text("0::/\n")
    watch = MemoryMonitor(CPU, every_s=0)
    held = psutil.Process().memory_info().rss
    warned = []
    for share in (0.5, 0.84, 0.86, 0.87, 0.91, 0.8, 0.92, 0.96, 0.97, 0.99):
        cgroup(tmp_path, "", memory__max=str(int(held / share)), memory__current=str(held), memory__stat="")
        warned.append([warning.split(" of ")[0] for warning in watch.check(1)])
    say = "the process holds {} %".replace(" %", "%").format
    assert warned == [[], [], [say(86)], [], [say(91)], [], [], [say(96)], [], []]
    assert "on" not in warned[2][0]
    cgroup(tmp_path, "", memory__max=str(int(held / 0.2)), memory__current=str(held), memory__stat="")
    (warning,) = MemoryMonitor(CPU, every_s=0)._levels(MemoryReading(9e9, 1e10, 1e9, 8e9))
    fix = "lower training.micro_batch_size and raise gradient_accumulation_steps as much"
    assert warning.startswith(f"the process holds 90% of the 10.00 GB that it may have on cpu: {fix}")


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
    monkeypatch.setattr(MemoryMonitor, "LOOKS", 5)
    watch, kept, warnings = MemoryMonitor(CPU, every_s=0), [], []
    for step in range(60):
        if leaks or step < 8:
            kept.append(np.ones(500_000))  # 4 MB, touched
        temporary = np.ones(250_000 * (1 + step % 3))
        warnings += [warning for warning in watch.check(step) if "grown" in warning]
        del temporary
    assert len(warnings) == leaks
    if leaks:
        assert float(warnings[0].split(" MB")[0].split()[-1]) == pytest.approx(4 * 35, rel=0.2)
        assert "in 35 steps and is full in about" in warnings[0]


def test_figures_are_those_of_the_process() -> None:
    now = read_memory(CPU)
    assert now.host_held == now.device_held == pytest.approx(psutil.Process().memory_info().rss, rel=0.02)
    assert now.host_limit == pytest.approx(memory_limit_bytes(CPU), rel=0.05)
    assert now.figures()["host_held_gb"] == pytest.approx(now.host_held / 1e9, abs=1e-4)
    assert list(now.shares()) == ["host"]


@pytest.mark.gpu
@pytest.mark.skipif(not PRESENT["cuda"], reason="needs CUDA")
def test_the_memory_of_a_gpu_is_watched_beside_the_hosts() -> None:
    device = torch.device("cuda")
    block = torch.ones(250_000_000, device=device)
    now = read_memory(device)
    assert now.device_held == torch.cuda.memory_reserved() >= block.nbytes
    assert now.device_limit <= torch.cuda.get_device_properties(device).total_memory
    assert list(now.shares()) == ["device", "host"]


def test_the_description_names_the_machine() -> None:
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
