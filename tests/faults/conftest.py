"""What the fault tests share: the forking server, and a small undisturbed run to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Server
from scene import Scene, make_scene


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("outputs"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def scene(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(server, tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="session")
def every_checkpoint(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint of each step and without its report: it can resume from any of them."""
    directory = tmp_path_factory.mktemp("every") / "run"
    done = scene.run(directory, "training.save_steps=1", "training.keep_checkpoints=100")
    assert done.code == 0, done.err
    assert json.loads((directory / "report.json").read_text())["training"]["steps"] == 6
    (directory / "report.json").unlink()
    return directory
