"""Odd environments: the clock, the terminal, the home directory, other processes, other files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, Fault
from scene import STEPS, Scene, one_line, wait_for
from tiers import rest_is_slow

SLOW_DISK = Fault("slow", times=10**6)


# --- exactness


def test_two_runs_are_the_same_bit_for_bit(scene: Scene, tmp_path: Path) -> None:
    assert scene.run(tmp_path / "run").code == 0
    scene.check(tmp_path / "run")


def test_it_goes_on_from_each_checkpoint_to_the_same_end(scene: Scene, every_checkpoint: Path, tmp_path: Path) -> None:
    more = ["training.save_steps=1", "training.keep_checkpoints=100"]
    for step in range(1, STEPS):
        directory = tmp_path / str(step)
        shutil.copytree(every_checkpoint, directory)
        done = scene.run(directory, *more, "--resume", str(directory / "checkpoints" / f"step-{step:06d}"))
        assert (done.code, done.err) == (0, "")
        assert f"resuming  after step {step} of {STEPS}" in done.out
        scene.check_result(directory)


@pytest.mark.parametrize(("size", "count"), [(1, 4), (4, 1)])
def test_it_goes_on_with_another_micro_batch_size(scene: Scene, size: int, count: int, tmp_path: Path) -> None:
    """The effective batch stays the same, so the losses do; without dropout, whose draws depend on the shape."""

    def losses(directory: Path, *more: str, stop: bool = False) -> list[float]:
        fault = Fault(signals={"step 3": signal.SIGTERM}) if stop else None
        done = scene.run(directory, "lora.dropout=0", *more, fault=fault)
        assert done.code == (75 if stop else 0), done.err
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
        return [line["loss"] for line in lines if line["event"] == "train"]

    whole = losses(tmp_path / "whole")
    losses(tmp_path / "run", stop=True)
    other = [f"training.micro_batch_size={size}", f"training.gradient_accumulation_steps={count}"]
    assert losses(tmp_path / "run", *other) == pytest.approx(whole, rel=1e-6)
    done = scene.run(tmp_path / "run", "lora.dropout=0", "training.micro_batch_size=4")
    assert done.code == 2
    assert "holds another run" in one_line(done.err)


# --- other processes, other files


def test_a_second_process_is_told_who_is_first(scene: Scene, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    first = scene.start(directory, fault=SLOW_DISK)
    wait_for(directory / "metrics.jsonl")
    second = scene.run(directory)
    assert second.code == 2
    assert f"in use by process {first.pid} on {socket.gethostname()} since 20" in one_line(second.err)
    assert first.wait().code == 0
    scene.check(directory)


def test_a_directory_that_is_removed_meanwhile(scene: Scene, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    running = scene.start(directory, fault=SLOW_DISK)
    wait_for(directory / "metrics.jsonl", '"checkpoint"')
    directory.rename(tmp_path / "removed")
    done = running.wait()
    assert done.code == 2
    assert f"output.dir: {directory} was removed or replaced" in one_line(done.err)
    assert not directory.exists()
    (tmp_path / "removed").rename(directory)  # it was a mistake
    scene.goes_on(directory)


def test_data_that_are_edited_meanwhile(scene: Scene, tmp_path: Path) -> None:
    """Training uses the data that were read at the start; a resumed run reports that the data have changed."""
    data, directory = tmp_path / "data.jsonl", tmp_path / "run"
    shutil.copyfile(scene.records, data)
    running = scene.start(directory, f"data.train_file={data}", fault=SLOW_DISK)
    wait_for(directory / "metrics.jsonl", '"checkpoint"')
    data.write_text(data.read_text("utf-8").replace("Say", "Tell"), encoding="utf-8")
    assert running.wait().code == 0
    scene.check(directory)
    (directory / "report.json").unlink()
    done = scene.run(directory, f"data.train_file={data}")
    assert done.code == 2
    assert "the data changed since that run began" in one_line(done.err)


# --- the machine


def test_a_clock_that_goes_backwards(scene: Scene, tmp_path: Path) -> None:
    done = scene.run(tmp_path / "run", fault=Fault(clock=True))
    assert (done.code, done.err) == (0, "")
    scene.check(tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text("utf-8"))
    assert report["training"]["seconds"] >= 0
    assert report["training"]["tokens_per_second"] >= 0


HOMES = {
    "no home": {"HOME": None, "XDG_CACHE_HOME": None},
    "a home that cannot be written": {"HOME": "/dev/null", "XDG_CACHE_HOME": None},
    "a cache that cannot be written": {"XDG_CACHE_HOME": "/dev/null"},
    "no place for temporary files": {"TMPDIR": "/nowhere", "TEMP": "/nowhere", "TMP": "/nowhere"},
}


@pytest.mark.parametrize("case", HOMES)
def test_homes_and_caches(scene: Scene, case: str, tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), **HOMES[case]}
    if case == "no home" and os.path.expanduser("~") != os.environ.get("HOME"):
        pytest.skip("this user's home is not that of HOME")
    if case == "no home":
        environment["XDG_CACHE_HOME"] = ""  # as unset; the home comes from the list of users
    done = scene.run(tmp_path / "run", fault=Fault(environment=environment))
    assert (done.code, done.err) == (0, "")
    assert ("the cache is not writable" in done.out) == ("cannot be written" in case)
    scene.check(tmp_path / "run")


def test_a_directory_that_cannot_be_written(scene: Scene, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert scene.run(directory, fault=Fault("kill", scene.save_of(4)[5])).code == -signal.SIGKILL
    directory.chmod(0o555)
    (directory / ".lock").chmod(0o444)
    done = scene.run(directory, fault=Fault(unprivileged=True))
    assert done.code == 2
    assert "Permission denied" in one_line(done.err)
    directory.chmod(0o755)
    (directory / ".lock").chmod(0o644)
    scene.goes_on(directory)


# --- the terminal: real processes, since the interpreter looks at it when it starts

TERMINALS = {
    "nothing is open": 'exec "$@" <&- >&- 2>&-',
    "the reader goes": '"$@" 2>&1 | head -n 1; exit ${PIPESTATUS[0]}',
    "ascii and a full disk": 'exec env -u HOME LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$@" >/dev/full',
}


@pytest.mark.parametrize("case", rest_is_slow(TERMINALS, "ascii and a full disk"))
def test_a_terminal_that_fails(scene: Scene, case: str, tmp_path: Path) -> None:
    directory = tmp_path / ("läufe" if "ascii" in case else "run")
    shown = ["logging.progress_bar=true", "logging.show_example=true"]
    command = [sys.executable, str(ROOT / "train.py"), *scene.argv(directory, *shown)]
    done = subprocess.run(["bash", "-c", TERMINALS[case], "bash", *command], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    scene.check(directory)
    assert "日本" in (directory / "train.log").read_text("utf-8")
