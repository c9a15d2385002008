"""Checkpoints of a real run, damaged anywhere: the damage is found, and the checkpoint before is used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from scene import STEPS, Scene

from nanoft.checkpoint import CheckpointManager


def damage(path: Path, chance: random.Random) -> str:
    """Flip a bit, cut the file off, or put zeros in the place of a part; says which."""
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    kind = chance.choice(["flip", "truncate", "zeros"])
    if kind == "flip":
        content[place] ^= 1 << chance.randrange(8)
    elif kind == "truncate":
        del content[place:]
    else:
        place = next(at for at in range(place, place - len(content), -1) if content[at])
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    path.write_bytes(content)
    return f"{kind} at {place}"


def files(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints" / f"step-{STEPS:06d}").iterdir())


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_damage_anywhere_is_noticed(every_checkpoint: Path, count: int, tmp_path: Path) -> None:
    chance, directory = random.Random(count), tmp_path / "run"
    shutil.copytree(every_checkpoint, directory)
    for number in range(count):
        path = files(directory)[number % len(files(directory))]
        before = path.read_bytes()
        what = damage(path, chance)
        saved, damages = CheckpointManager(directory / "checkpoints", keep=100).newest()
        assert saved is not None
        assert saved.state["step"] == STEPS - 1, what
        assert path.name in damages[0]
        path.write_bytes(before)


@pytest.mark.parametrize("count", [4, pytest.param(500, marks=pytest.mark.slow)])
def test_the_run_goes_on_from_the_checkpoint_before(
    scene: Scene, every_checkpoint: Path, count: int, tmp_path: Path
) -> None:
    chance = random.Random(count)
    for number in range(count):
        directory = tmp_path / str(number)
        shutil.copytree(every_checkpoint, directory)
        path = files(directory)[number % 4]
        what = damage(path, chance)
        done = scene.run(directory, "training.save_steps=1", "training.keep_checkpoints=100")
        assert (done.code, done.err) == (0, ""), what
        assert "using an earlier checkpoint" in done.out, what
        assert f"{path}: " in done.out
        assert f"resuming  after step {STEPS - 1}" in done.out
        scene.check_result(directory)
        shutil.rmtree(directory)


def test_several_damaged_ones_are_all_told(scene: Scene, every_checkpoint: Path, tmp_path: Path) -> None:
    directory, chance = tmp_path / "run", random.Random(1)
    shutil.copytree(every_checkpoint, directory)
    for step in range(3, STEPS + 1):
        damage(directory / "checkpoints" / f"step-{step:06d}" / "optimizer.safetensors", chance)
    done = scene.run(directory, "training.save_steps=1", "training.keep_checkpoints=100")
    assert done.code == 0
    assert done.out.count("using an earlier checkpoint") == STEPS - 2
    assert "resuming  after step 2" in done.out
    scene.check_result(directory)


def test_nothing_is_whole(scene: Scene, every_checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(every_checkpoint, directory)
    for path in (directory / "checkpoints").iterdir():
        (path / "adapter.safetensors").unlink()
    done = scene.run(directory, "training.save_steps=1", "training.keep_checkpoints=100")
    assert done.code == 2
    assert "no other checkpoint is valid: start a new run" in done.err
