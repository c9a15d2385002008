"""Failing disks: old checkpoints stay intact, training continues, and the next save tries again."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Fault, Server
from scene import SETTINGS, STEPS, Scene, facts, one_line

from nanoft.checkpoint import verify

ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT]
LASTING = 10**6


def saved_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints, each of which must be complete."""
    return [int(verify(path).state["step"]) for path in sorted((directory / "checkpoints").glob("step-*"))]


def warnings(directory: Path) -> list[str]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [json.dumps(line) for line in lines if line["event"] == "warning"]


def refuse_once(scene: Scene, directory: Path, error: int, number: int) -> None:
    """One operation of the save of step 4 is refused; that of step 6 works."""
    done = scene.run(directory, fault=Fault(str(error), number))
    assert (done.code, done.err) == (0, ""), scene.operations[number]
    assert STEPS in saved_steps(directory)
    scene.check_result(directory)
    published = any(line.startswith("rename") for line in scene.operations[scene.save_of(4)[0] : number])
    if not published:
        assert 4 not in saved_steps(directory)
        assert os.strerror(error) in done.out
        (warning,) = warnings(directory)
        assert os.strerror(error) in warning
    assert not [path for path in (directory / "checkpoints").iterdir() if path.name.startswith(".tmp")]


@pytest.mark.parametrize("error", ERRORS)
def test_a_save_that_fails_is_a_warning_and_the_next_one_works(scene: Scene, error: int, tmp_path: Path) -> None:
    save = scene.save_of(4)
    for number in save[ERRORS.index(error) :: 11]:
        refuse_once(scene, tmp_path / str(number), error, number)


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_a_save_that_fails_at_any_operation(scene: Scene, error: int, tmp_path: Path) -> None:
    for number in scene.save_of(4):
        refuse_once(scene, tmp_path / str(number), error, number)


@pytest.mark.parametrize("error", [*ERRORS, errno.EROFS])
def test_the_last_save_never_worked(scene: Scene, error: int, tmp_path: Path) -> None:
    """Earlier saves stay, the run does not report success, and the same command tries again."""
    directory = tmp_path / "run"
    done = scene.run(directory, fault=Fault(str(error), scene.save_of(4)[0], times=LASTING))
    assert done.code == 2
    assert os.strerror(error) in one_line(done.err)
    assert saved_steps(directory) == [2, 3]
    assert not (directory / "report.json").exists()
    scene.goes_on(directory)


def test_an_fsync_that_fails(scene: Scene, tmp_path: Path) -> None:
    """Only syncing fails: the data may never reach the disk, so it does not count."""
    directory, save = tmp_path / "run", scene.save_of(4)
    syncs = [number for number in save if scene.operations[number].startswith("fsync")]
    for number in syncs[::2]:
        shutil.rmtree(directory, ignore_errors=True)
        refuse_once(scene, directory, errno.EIO, number)


# --- what people read


def test_a_full_disk_under_the_logs_costs_nothing_that_is_computed(scene: Scene, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    done = scene.run(directory, fault=Fault(full=("train.log",)))
    assert (done.code, done.err) == (0, "")
    assert done.out.count("train.log: No space left on device: training continues") == 1
    assert scene.check_result(directory).names == scene.whole.names - {"train.log"}


@pytest.mark.parametrize("times", [1, 7])
def test_lines_that_the_disk_refused_are_written_later(scene: Scene, times: int, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    done = scene.run(directory, fault=Fault(str(errno.ENOSPC), 5, r"/metrics\.jsonl$", times))
    assert (done.code, done.err) == (0, "")
    assert done.out.count("metrics.jsonl: No space left on device: training continues") == 1
    scene.check(directory)


def test_metrics_that_are_refused_to_the_end(scene: Scene, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    done = scene.run(directory, fault=Fault(str(errno.ENOSPC), 5, r"/metrics\.jsonl$", LASTING))
    assert (done.code, done.err) == (0, "")
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines if json.loads(line)["event"] == "train"]
    assert 0 < len(steps) < STEPS
    assert steps == list(range(1, len(steps) + 1))
    assert (directory / "adapter" / "adapter_model.safetensors").read_bytes() == scene.whole.adapter


# --- a disk that is really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Server:
    """A server that has a disk of 1 MB to itself."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "outputs").mkdir()
    mount = f"mount -t tmpfs -o size=1m none {tmp_path}/disk"
    prefix = ("unshare", "-Urm", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if sys.platform != "linux" or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs in a namespace of its own is not permitted here")
    return Server(tmp_path / "outputs", prefix)


def test_a_small_disk_that_fills_up(scene: Scene, small_disk: Server, tmp_path: Path) -> None:
    argv = scene.argv(tmp_path / "disk" / "run", "--force", "disk")
    seen = Path(f"/proc/{small_disk.process.pid}/root{tmp_path}/disk")  # as the processes there see it
    assert small_disk.run([*argv, "training.save_steps=1", "--preflight"]).code == 0
    ballast = seen / "ballast"
    size = os.statvfs(seen).f_bavail * os.statvfs(seen).f_frsize
    needed = sum(len(part["adapter"]) + len(part["optimizer"]) + 40_000 for part in facts_of(scene))
    ballast.write_bytes(bytes(size - needed))
    done = small_disk.run(argv)
    assert done.code == 2
    assert re.search(r"No space left on device|were not written", one_line(done.err))
    shutil.copytree(seen / "run" / "checkpoints", tmp_path / "seen")  # no path of ours leads there
    there = [verify(path).state["step"] for path in (tmp_path / "seen").glob("step-*")]
    assert there
    assert max(there) < STEPS
    ballast.unlink()
    done = small_disk.run(argv)
    assert (done.code, done.err) == (0, "")
    shutil.copytree(seen / "run", tmp_path / "done")
    assert facts(tmp_path / "done").metrics == scene.whole.metrics
    assert facts(tmp_path / "done").adapter == scene.whole.adapter
    small_disk.close()


def facts_of(scene: Scene) -> list[dict[str, bytes]]:
    return list(scene.whole.checkpoints.values())[: SETTINGS["training"]["keep_checkpoints"]]
