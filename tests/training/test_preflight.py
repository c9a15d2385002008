"""Each check against data, templates and heads that are right and that are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from templates import CHATML, CONTROL, STYLES, TINY, Style, save

import train
from nanoft import UserError
from nanoft.batches import Batches
from nanoft.config import DataConfig
from nanoft.config.loading import load_file
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, build_datasets
from nanoft.models.weights import load_model
from nanoft.training.preflight import (
    Check,
    check_data,
    check_disk,
    check_head,
    check_room,
    preview,
    rehearse_save,
    require_passed,
    show_window,
)
from tiny_models import make_chat_model, write_records

ROOT = Path(__file__).parents[2]


def read(directory: Path, style: Style, template_args: Any = None, **settings: Any) -> ChatTokenizer:
    return ChatTokenizer.from_directory(save(directory, style, **settings), template_args)


def build(path: Path, chat: ChatTokenizer, count: int = 20, limit: int = 512, **settings: Any) -> PreparedDataset:
    records = [{"prompt": f"Question {n} {'x ' * n}", "completion": f"Answer {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return build_datasets(DataConfig(train_file=str(path), validation_split=0.0, **settings), chat, limit, 0, print)


def verdicts(chat: ChatTokenizer, corpus: PreparedDataset, train_on: str = "assistant") -> dict[str, Check]:
    return {check.name: check for check in check_data(corpus, chat, train_on)}


NO_END = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
TWO_BOS = "{{ bos_token }}{{ bos_token }}" + CHATML
SOUND = {name: style for name, style in STYLES.items() if name != "qwen"}


@pytest.mark.parametrize("name", SOUND)
def test_sound_templates_pass(name: str, tmp_path: Path) -> None:
    chat = read(tmp_path / "model", SOUND[name])
    checks = verdicts(chat, build(tmp_path / "d.jsonl", chat))
    assert list(checks) == ["stop", "bos", "targets", "prompt"]
    assert all(check.passed for check in checks.values()), [check.line() for check in checks.values()]
    assert checks["stop"].found.startswith("20 of 20 turns end in a stop token")


WRONG = {
    "stop": (Style(NO_END, None, "<|im_end|>", "<|im_end|>"), "0 of 20 turns end in a stop token"),
    "bos": (Style(TWO_BOS, "<s>", "<|im_end|>", "<|im_end|>"), "20 with two"),
    "prompt": (STYLES["qwen"], r"0 of 20 prompts are the same .* in training '<think>"),
}


@pytest.mark.parametrize("name", WRONG)
def test_unsound_templates_fail_the_check_that_is_made_for_them(name: str, tmp_path: Path) -> None:
    style, found = WRONG[name]
    chat = read(tmp_path / "model", style)
    checks = verdicts(chat, build(tmp_path / "d.jsonl", chat))
    assert not checks[name].passed
    assert re.search(found, checks[name].found)
    assert all(check.passed for check in checks.values() if check.name != name)


def test_template_args_make_training_and_use_alike(tmp_path: Path) -> None:
    chat = read(tmp_path / "model", STYLES["qwen"], {"enable_thinking": False})
    assert verdicts(chat, build(tmp_path / "d.jsonl", chat))["prompt"].passed


def test_answers_that_were_cut_need_no_end(tmp_path: Path) -> None:
    chat = read(tmp_path / "model", STYLES["chatml"])
    corpus = build(tmp_path / "d.jsonl", chat, limit=60, truncation="response")
    assert 0 < corpus.report["truncated"] < len(corpus.training)
    checks = verdicts(chat, corpus)
    assert checks["stop"].passed
    assert not checks["stop"].found.startswith("20 of 20")


def test_training_on_everything_has_no_prompt_to_compare(tmp_path: Path) -> None:
    chat = read(tmp_path / "model", STYLES["chatml"])
    checks = verdicts(chat, build(tmp_path / "d.jsonl", chat, train_on="all"), "all")
    assert all(check.passed for check in checks.values()), [check.line() for check in checks.values()]


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
    assert check_room(config).passed
    assert check_room(config, 1024).passed
    refused = check_room(config, 10**9)
    assert not refused.passed
    assert refused.found.startswith("the model and a row of 1,000,000,000 tokens take ")
    assert refused.fix.startswith("set model.max_seq_length=500000000 (saves about ")


def test_what_fails_stops_unless_it_is_forced() -> None:
    checks = [
        Check("one", True, "fine"),
        Check("two", False, "wrong", "mend it"),
        Check("three", False, "bad", "or not"),
    ]
    with pytest.raises(UserError, match=r"^preflight: two: wrong: mend it \(or --force two\)$"):
        require_passed(checks, [])
    with pytest.raises(UserError, match=r"^preflight: three: bad"):
        require_passed(checks, ["two"])
    require_passed(checks, ["two", "three"])
    assert checks[0].line() == "preflight one       ok    fine"
    assert checks[1].line() == "preflight two       FAIL  wrong: mend it (or --force two)"


def test_a_preview_has_ids_text_and_mask_of_chosen_samples(tmp_path: Path) -> None:
    chat = ChatTokenizer.from_directory(TINY)
    corpus = build(tmp_path / "d.jsonl", chat, limit=40, truncation="prompt")
    blocks = preview(corpus, chat, 0).split("==== ")[1:]
    assert [block.split(":")[0] for block in blocks] == ["shortest", "longest", "truncated", *["random"] * 3]
    lengths = corpus.training.lengths
    for block, expected in zip(blocks, [lengths.min(), lengths.max()], strict=False):
        ids, mask = (re.findall(rf"^{name} +(.*)$", block, re.MULTILINE)[0].split() for name in ("ids", "mask"))
        assert len(ids) == len(mask) == expected
        text = chat.decode([int(token) for token in ids], keep_special=True)
        assert text == block.split("\n")[1].replace("⟦", "").replace("⟧", "")
        targets = [int(token) for token, is_target in zip(ids, mask, strict=True) if is_target == "1"]
        assert chat.decode(targets, keep_special=True) == re.findall("⟦(.*)⟧", block)[0]
    assert "[...]" in blocks[2]
    assert preview(corpus, chat, 0) == preview(corpus, chat, 0) != preview(corpus, chat, 1)


@pytest.mark.parametrize("packing", [False, True])
def test_a_window_as_the_model_sees_it(tmp_path: Path, packing: bool) -> None:
    chat = ChatTokenizer.from_directory(TINY)
    corpus = build(tmp_path / "d.jsonl", chat)
    batches = Batches(corpus.training, 2, 2, 0, chat.pad_id, pack_length=100 if packing else None)
    lines = list(show_window(batches, 0, corpus, chat, color=False))
    window = batches.window(0)
    heads = [re.fullmatch(r"micro-batch (\d): (\d+)x(\d+), ([\d,]+) tokens, (\d+) targets, (\d+) padding", line)
             for line in lines if line.startswith("micro-batch")]  # fmt: skip
    assert [[int(part.replace(",", "")) for part in head.groups()] for head in heads if head] == [
        [n, *batch.ids.shape, batch.tokens, batch.target_tokens, batch.ids.numel() - batch.tokens]
        for n, batch in enumerate(window, start=1)
    ]
    places = [re.findall(r"jsonl:(\d+), (\d+) tokens, (\d+) targets", line)[0] for line in lines if "──" in line]
    records = [record for batch in window for record in batch.records]
    assert [int(line) - 1 for line, _, _ in places] == records
    assert sum(int(tokens) for _, tokens, _ in places) == sum(batch.tokens for batch in window)
    assert ("document 2 of" in "\n".join(lines)) is packing
    texts = [line for line in lines if line.startswith("<s>")]
    assert texts == [chat.highlight_targets(corpus.training[record], color=False) for record in records]
