"""The checks of data and templates, on right and on wrong ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from templates import CHATML, STYLES, TINY, Style, save

from nanoft.batches import Batches
from nanoft.config import DataConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, build_datasets
from nanoft.data.inspection import check_data, preview, show_window
from nanoft.runtime.command import Check


def read(directory: Path, style: Style, template_args: Any = None, **settings: Any) -> ChatTokenizer:
    return ChatTokenizer(save(directory, style, **settings), template_args)


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
    assert list(checks) == ["stop", "bos", "targets"]
    assert all(check.passed for check in checks.values()), [check.preflight_line() for check in checks.values()]
    assert checks["stop"].found.startswith("20 of 20 turns end with a stop token")


WRONG = {
    "stop": (Style(NO_END, None, "<|im_end|>", "<|im_end|>"), "0 of 20 turns end with a stop token"),
    "bos": (Style(TWO_BOS, "<s>", "<|im_end|>", "<|im_end|>"), "20 with two"),
}


@pytest.mark.parametrize("name", WRONG)
def test_unsound_templates_fail_the_check_that_is_made_for_them(name: str, tmp_path: Path) -> None:
    style, found = WRONG[name]
    chat = read(tmp_path / "model", style)
    checks = verdicts(chat, build(tmp_path / "d.jsonl", chat))
    assert not checks[name].passed
    assert re.search(found, checks[name].found)
    assert all(check.passed for check in checks.values() if check.name != name)


def test_answers_that_were_cut_need_no_end(tmp_path: Path) -> None:
    chat = read(tmp_path / "model", STYLES["chatml"])
    corpus = build(tmp_path / "d.jsonl", chat, limit=60, truncation="response")
    assert 0 < corpus.report["truncated"] < len(corpus.training)
    checks = verdicts(chat, corpus)
    assert checks["stop"].passed
    assert not checks["stop"].found.startswith("20 of 20")


def test_training_on_everything_passes(tmp_path: Path) -> None:
    chat = read(tmp_path / "model", STYLES["chatml"])
    checks = verdicts(chat, build(tmp_path / "d.jsonl", chat, train_on="all"), "all")
    assert all(check.passed for check in checks.values()), [check.preflight_line() for check in checks.values()]


def test_a_preview_has_ids_text_and_mask_of_chosen_samples(tmp_path: Path) -> None:
    chat = ChatTokenizer(TINY)
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
    chat = ChatTokenizer(TINY)
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
