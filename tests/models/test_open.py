"""Tests of nanoft/models/open.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nanoft.models.model_files import ModelFiles
from nanoft.models.open import is_run, open_model
from tiny_models import make_reference

CPU = torch.device("cpu")


def test_a_model_with_a_folder_of_checkpoints_is_no_run(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "base", tmp_path / "base")
    (tmp_path / "base" / "checkpoints").mkdir()
    assert not is_run(tmp_path / "base")
    assert open_model(str(tmp_path / "base"), CPU, torch.float32).base_directory == tmp_path / "base"
    assert is_run(runs / "lora")
    assert not is_run(runs / "lora" / "checkpoints")
    shutil.copytree(runs / "lora", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")  # damaged: the message about that is a run's
    assert is_run(tmp_path / "run")


def test_what_config_json_tells_wrongly_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = make_reference("llama-tied", tmp_path)
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach() * 2)
    reference.save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), CPU, torch.float32)
    assert torch.equal(opened.model.head, reference.lm_head.weight)
    assert capsys.readouterr().err == f"warning: {ModelFiles.read(tmp_path).notes[0]}\n"
