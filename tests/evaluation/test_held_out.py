"""Tests of nanoft/evaluation/held_out.py; the command around it is in tests/test_eval_command.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoft import UserError
from nanoft.config import Config
from nanoft.config.loading import load_config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.evaluation.held_out import choose_data, read_general, read_held_out
from nanoft.export import verify
from nanoft.training import setup
from tiny_models import make_chat_model, train_run, write_records


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("held_out")
    make_chat_model(root / "base")
    return train_run(root / "run", root / "base", write_records(root / "data.jsonl"))


def test_a_run_is_evaluated_on_its_own_split_and_a_file_completely(run: Path) -> None:
    config, chat = load_config(run / "config.json"), ChatTokenizer(run.parent / "base")
    own = read_held_out(config, choose_data(config, str(run), None), str(run), None, None, chat)
    file = str(write_records(run.parent / "more.jsonl", 5))
    data = choose_data(config, str(run), file)
    assert data.validation_split == 0.0
    assert not data.deduplicate
    other = read_held_out(config, data, str(run), file, None, chat)
    assert len(other.samples) == 5
    assert 0 < len(own.samples) < 24
    assert other.leakage["exact"] > 0  # the file begins as the run's data does


def test_training_samples_are_never_evaluated_by_mistake(run: Path) -> None:
    config = load_config(run / "config.json")
    with pytest.raises(UserError, match="another seed or data setting"):
        choose_data(config.override({"system.seed": 1}), str(run), None)
    data = run.parent / "data.jsonl"
    content = data.read_text()
    try:
        data.write_text(content + content.splitlines()[0] + "\n")
        with pytest.raises(UserError, match="its data changed after training"):
            choose_data(config, str(run), None)
    finally:
        data.write_text(content)


def test_the_split_of_a_run_that_samples_is_that_of_its_training(tmp_path: Path) -> None:
    """Samples leave room for answers; a longer limit would have other samples, and another split."""
    make_chat_model(tmp_path / "base")
    chat, (data, config) = ChatTokenizer(tmp_path / "base"), (tmp_path / "data.jsonl", Config())
    data.write_text(
        "".join(json.dumps({"prompt": f"{n} " + "again " * (3 * (n % 7)), "answer": f"{n}"}) + "\n" for n in range(60))
    )
    config = config.override({"data.train_file": str(data), "model.max_seq_length": 60, "data.validation_split": 0.3})
    config = config.override({"training.objective": "grpo", "rl.reward": ("exact_match",), "rl.max_new_tokens": 20})
    corpus, _ = setup.build_datasets(config, chat, SimpleNamespace(print=print, directory=tmp_path))  # type: ignore[arg-type]
    assert 5 < 60 - len(corpus.training) - len(corpus.validation) < 50  # whose prompts leave no room
    found = read_held_out(config, config.data, str(tmp_path), None, None, chat)
    assert found.samples.records.tolist() == corpus.validation.records.tolist()


def test_prompts_are_the_first_with_an_answer_to_learn(run: Path, tmp_path: Path) -> None:
    """After validation records without one, here undesirable answers; the same in a run, eval.py and merge.py."""
    lines = [json.dumps({"prompt": f"Say {n}", "completion": f"{n}", "label": n % 12 > 5}) + "\n" for n in range(24)]
    (tmp_path / "held.jsonl").write_text("".join(lines[:12]))
    (tmp_path / "data.jsonl").write_text("".join(lines[12:]))
    held = {"data__validation_file": str(tmp_path / "held.jsonl"), "data__validation_split": 0.05}
    changes = {**held, "training__objective": "kto", "evaluation__prompts": 3}
    kto = train_run(tmp_path / "run", run.parent / "base", tmp_path / "data.jsonl", **changes)
    config, chat = load_config(kto / "config.json"), ChatTokenizer(run.parent / "base")
    found = read_held_out(config, choose_data(config, str(kto), None), str(kto), None, None, chat)
    assert [prompt.text for prompt in found.prompts] == ["Say 6", "Say 7", "Say 8"]
    assert json.loads((kto / "report.json").read_text())["tuned"]["prompts"] == 3
    assert [prompt.text for prompt in verify.held_out(str(kto), chat)[1]] == [f"Say {n}" for n in range(6, 12)]


def test_a_general_text_is_one_sample_per_text(run: Path, tmp_path: Path) -> None:
    chat = ChatTokenizer(run.parent / "base")
    (tmp_path / "a.txt").write_text("Once upon a time.\n\nThe end.")
    (sample,) = read_general(str(tmp_path / "a.txt"), chat, None)
    assert sample.is_target[1:].all()
    assert len(read_general(str(write_records(tmp_path / "r.jsonl", 4)), chat, 3)) == 3
    assert read_general(None, chat) == []
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"empty.txt: contains no text"):
        read_general(str(tmp_path / "empty.txt"), chat, None)
