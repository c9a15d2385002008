"""Each check against data, templates and heads that are right and that are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from templates import CONTROL

import train
from nanoft.config import DataConfig
from nanoft.config.loading import load_file
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, build_datasets
from nanoft.models.model_files import ModelFiles
from nanoft.models.weights import load_model
from nanoft.runtime.machine import Machine
from nanoft.training.memory_plan import Planner
from nanoft.training.preflight import check_disk, check_head, check_room, rehearse_save
from tiny_models import make_chat_model, write_records

ROOT = Path(__file__).parents[2]


def build(path: Path, chat: ChatTokenizer, count: int = 20, limit: int = 512, **settings: Any) -> PreparedDataset:
    records = [{"prompt": f"Question {n} {'x ' * n}", "completion": f"Answer {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return build_datasets(DataConfig(train_file=str(path), validation_split=0.0, **settings), chat, limit, 0, print)


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (0.0, False), (0.05, False), (30.0, False), (0.5, True)])
def test_the_row_of_the_stop_token(tmp_path: Path, factor: float, passed: bool) -> None:
    make_chat_model(tmp_path / "model")
    model = load_model(tmp_path / "model", torch.device("cpu"), torch.float32)
    chat = ChatTokenizer.from_directory(tmp_path / "model")
    corpus = build(tmp_path / "d.jsonl", chat)
    row = CONTROL.index("<|im_end|>")
    with torch.no_grad():
        others = model.head.norm(dim=1).median()
        model.head[row] *= factor * others / model.head[row].norm()
    check = check_head(model, chat, corpus.training)
    assert check.passed is passed
    assert f"'<|im_end|>': {factor:.2f}" in check.found


def test_rows_that_only_fill_up_the_vocabulary_do_not_count(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "model")
    model = load_model(tmp_path / "model", torch.device("cpu"), torch.float32)
    chat = ChatTokenizer.from_directory(tmp_path / "model")
    corpus = build(tmp_path / "d.jsonl", chat)
    with torch.no_grad():
        model.head[len(model.head) // 2 :] = 0  # not the row of the stop token
        median = model.head[: len(model.head) // 2].norm(dim=1).median()
    row = model.head[CONTROL.index("<|im_end|>")].norm()
    assert f"'<|im_end|>': {row / median:.2f}" in check_head(model, chat, corpus.training).found


def test_room_on_the_disk(tmp_path: Path) -> None:
    assert check_disk(tmp_path, 1000, 3).passed
    check = check_disk(tmp_path, 10**15, 3)
    assert not check.passed
    assert "5000000.00 GB more for 5 checkpoints" in check.found
    (tmp_path / "checkpoint").write_bytes(bytes(4_000_000))
    assert "0.00 GB more for 5 checkpoints" in check_disk(tmp_path, 800_000, 3).found


def test_a_rehearsed_save_counts_the_weights_and_the_state_of_the_optimizer(tmp_path: Path) -> None:
    weights = {"w": torch.zeros(1_000_000)}  # 4 MB
    moments = {"w.state1": torch.zeros(1_000_000, dtype=torch.uint8), "w.absmax1": torch.zeros(500_000)}  # 3 MB
    assert "0.02 GB more for 4 checkpoints" in rehearse_save(tmp_path, weights, {}, 2).found
    assert "0.03 GB more for 4 checkpoints" in rehearse_save(tmp_path, weights, moments, 2).found
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_has_no_room_is_refused_before_its_weights_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A million million parameters, of which there is only the config.json."""
    make_chat_model(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    path = tmp_path / "base" / "config.json"
    large = {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_hidden_layers": 20}
    path.write_text(json.dumps({**json.loads(path.read_text()), **large}))
    records = write_records(tmp_path / "data.jsonl")
    own = [f"model.name={path.parent}", f"data.train_file={records}", f"output.dir={tmp_path / 'run'}"]
    arguments = [str(ROOT / "configs" / "tiny.py"), "system.device=cpu", "lora.rank=1", *own]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.match(r"error: preflight: room: the model alone takes [\d.]+ GB at least, and [\d.]+ GB are ", error)
    assert "there: set quantization.bits=4 (saves about " in error
    assert error.endswith("(or --force room)\n")
    assert not (tmp_path / "run").exists()
    for more in (["--force", "room"], ["--show-batch"]):  # the latter loads none
        assert train.main([*arguments, *more]) == 2
        assert "no weights here" in capsys.readouterr().err


def test_a_row_that_has_no_room_is_refused() -> None:
    config = load_file(ROOT / "configs" / "tiny.py").override({"system.device": "cpu", "model.max_seq_length": 10**9})
    planner = Planner.of(config, Machine.detect(config), ModelFiles.find(config.model.name).decoder)
    assert check_room(planner).passed
    assert check_room(planner, 1024).passed
    refused = check_room(planner, 10**9)
    assert not refused.passed
    assert refused.found.startswith("the model and a row of 1,000,000,000 tokens take ")
    assert refused.fix.startswith("set model.max_seq_length=500000000 (saves about ")
