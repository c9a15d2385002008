"""SIGKILL at any operation and at any time: the same command resumes, with the same result bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from harness import Fault
from scene import Scene
from tiers import rest_is_slow

from nanoft.checkpoint import MANIFEST, verify

EVERYTHING = r"/run(/|$)"


def newest(directory: Path) -> int:
    """The step of the newest checkpoint; all must be complete, except one that was being removed."""
    paths = (directory / "checkpoints").glob("step-*")
    return max(int(verify(path).state["step"]) for path in paths if (path / MANIFEST).is_file())


@pytest.mark.parametrize("what", rest_is_slow(["kill", "torn"], "torn"))
def test_killed_in_a_save(scene: Scene, what: str, tmp_path: Path) -> None:
    """At every fifth operation, and in the middle of every third write."""
    save = scene.save_of(4)
    writes = [number for number in save if scene.operations[number].startswith("write")]
    assert len(save) > 20
    for number in save[::5] if what == "kill" else writes[::3]:
        directory = tmp_path / str(number) / "run"
        assert scene.run(directory, fault=Fault(what, number)).code == -signal.SIGKILL
        assert newest(directory) in (3, 4)
        scene.goes_on(directory)


@pytest.mark.slow
def test_killed_at_every_operation_of_a_run(scene: Scene, tmp_path: Path) -> None:
    """Saves, the result, the metrics, the report; every write also torn."""
    log = tmp_path / "operations"
    scene.run(tmp_path / "logged" / "run", fault=Fault(log=str(log), where=EVERYTHING))
    operations = log.read_text().splitlines()
    torn = [number for number, line in enumerate(operations) if line.startswith("write")]
    cases = [("kill", number) for number in range(len(operations))] + [("torn", number) for number in torn]
    for what, number in cases:
        directory = tmp_path / f"{what}-{number}" / "run"
        assert scene.run(directory, fault=Fault(what, number, EVERYTHING)).code == -signal.SIGKILL
        scene.goes_on(directory)
    print(f"\n{len(cases)} kills at {len(operations)} operations, {len(cases)} runs completed")


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_instants(scene: Scene, count: int, tmp_path: Path) -> None:
    chance, killed, runs = random.Random(count), 0, 0
    while killed < count:
        directory = tmp_path / str(runs)
        running = scene.start(directory)
        time.sleep(chance.uniform(0, scene.seconds))
        killed += running.kill().code == -signal.SIGKILL
        scene.goes_on(directory)
        runs += 1
        assert runs < 10 * count
    print(f"\n{killed} of {runs} runs were killed before their end; all completed")


@pytest.mark.parametrize("storms", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_while_it_recovers(scene: Scene, storms: int, tmp_path: Path) -> None:
    chance, kills = random.Random(storms), 0
    for number in range(storms):
        directory, code = tmp_path / str(number), -signal.SIGKILL
        while code == -signal.SIGKILL:
            running = scene.start(directory)
            time.sleep(chance.uniform(0, 1.1 * scene.seconds))
            code = running.kill().code
            kills += code == -signal.SIGKILL
            assert kills < 100 * storms
        assert code == 0
        scene.check(directory)
    print(f"\n{storms} runs completed after {kills} kills")


def test_killed_while_it_recovers_from_a_kill(scene: Scene, tmp_path: Path) -> None:
    """Half a save, then half of the recovery at the next start."""
    directory = tmp_path / "run"
    middle = scene.save_of(4)[len(scene.save_of(4)) // 2]
    assert scene.run(directory, fault=Fault("kill", middle)).code == -signal.SIGKILL
    assert [path for path in (directory / "checkpoints").iterdir() if path.name.startswith(".")]
    for number in range(0, 12, 3):
        assert scene.run(directory, fault=Fault("kill", number)).code == -signal.SIGKILL
    scene.goes_on(directory)


def test_the_lock_of_a_dead_process_is_taken_over(scene: Scene, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert scene.run(directory, fault=Fault("kill", scene.save_of(2)[0])).code == -signal.SIGKILL
    assert (directory / ".lock").read_text().split()[1] == "on"  # its note is still there
    scene.goes_on(directory)
    assert os.path.getsize(directory / ".lock") == 0
