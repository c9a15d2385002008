"""Downloads go where model.cache_dir says, in every command, from a Hub on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub import Hub

import eval as eval_command
import merge
from nanoft.__main__ import main as nanoft_command
from nanoft.data.sources import find_files
from nanoft.io.hub import cache_directory, use_cache
from nanoft.models.model_files import find_model
from tiny_models import make_chat_model, train_run, write_records

MODEL = Path("models--some--model") / "snapshots" / Hub.commit


@pytest.fixture(autouse=True)
def _own_cache_afterwards() -> Iterator[None]:
    yield
    use_cache("")


def serve(repository: str, files: Path, serve_hub: Callable[[Any], None]) -> type[Hub]:
    hub = type("ThisHub", (Hub,), {"repository": repository, "files": files, "asked": []})
    serve_hub(hub)
    return hub


def test_a_model_is_downloaded_into_the_directory(tmp_path: Path, serve_hub: Callable[[Any], None]) -> None:
    make_chat_model(tmp_path / "remote")
    hub = serve("models/some/model", tmp_path / "remote", serve_hub)
    use_cache(str(tmp_path / "mine"))
    assert find_model("some/model") == tmp_path / "mine" / MODEL
    assert not (tmp_path / "cache").exists()
    use_cache("")
    hub.asked.clear()
    assert find_model("some/model") == tmp_path / "cache" / MODEL
    assert hub.asked


def test_a_data_set_is_downloaded_into_the_directory(tmp_path: Path, serve_hub: Callable[[Any], None]) -> None:
    write_records(tmp_path / "remote" / "data.jsonl")
    serve("datasets/some/data", tmp_path / "remote", serve_hub)
    use_cache(str(tmp_path / "mine"))
    assert find_files("hf://datasets/some/data")[0][0].is_relative_to(tmp_path / "mine" / "datasets--some--data")
    assert not (tmp_path / "cache").exists()


def test_a_home_of_the_hubs_client_means_the_cache_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", str(tmp_path)))
    use_cache("~/hf")
    assert cache_directory() == tmp_path / "hf"
    (tmp_path / "hf" / "hub").mkdir(parents=True)
    use_cache("~/hf")
    assert cache_directory() == tmp_path / "hf" / "hub"
    use_cache("")
    assert cache_directory() == Path(huggingface_hub.constants.HF_HUB_CACHE)


def test_every_command_looks_where_the_run_downloaded_to(
    tmp_path: Path,
    serve_hub: Callable[[Any], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_chat_model(tmp_path / "remote")
    serve("models/some/model", tmp_path / "remote", serve_hub)
    records, run = write_records(tmp_path / "data.jsonl"), tmp_path / "run"
    changes = {"model__name": "some/model", "model__cache_dir": str(tmp_path / "mine"), "evaluation__prompts": 0}
    train_run(run, Path("-"), records, **changes, training__max_steps=2)
    assert (tmp_path / "mine" / MODEL / "model.safetensors").is_file()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert eval_command.main([str(run)]) == 0
    assert merge.main([str(run), "--out", str(tmp_path / "merged"), "--parity-tokens", "0"]) == 0
    assert merge.main([str(run / "adapter"), "--out", str(tmp_path / "again"), "--parity-tokens", "0"]) == 0
    assert nanoft_command(["chat", str(run), "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
    assert not (tmp_path / "cache").exists()

    moved = tmp_path / "mine"
    moved.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert merge.main([str(run), "--out", str(tmp_path / "gone")]) == 2
    assert "some/model: no such directory, and could not be downloaded" in capsys.readouterr().err
    assert eval_command.main([str(run), f"model.cache_dir={tmp_path / 'elsewhere'}"]) == 0
    monkeypatch.setenv("NANOFT_MODEL__CACHE_DIR", str(tmp_path / "elsewhere"))
    assert merge.main([str(run), "--out", str(tmp_path / "found"), "--parity-tokens", "0"]) == 0
