"""Records to prompts: every shape, what rewards get of a record, the split, and the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from templates import TINY

from nanoft.config import DataConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, build_datasets
from nanoft.data.formats import Conversation, read_file

ASKED = {"role": "user", "content": "What is 1 + 1?"}
GSM8K = "1 + 1 = <<1+1=2>>2\n#### 2"
RECORDS: dict[str, tuple[dict[str, Any], str]] = {  # a record, and its reference
    "prompt only": ({"prompt": "What is 1 + 1?"}, ""),
    "solution": ({"prompt": [ASKED], "solution": "2", "level": 3}, "2"),
    "ground truth": ({"prompt": "What is 1 + 1?", "ground_truth": "2"}, "2"),
    "gsm8k": ({"question": "What is 1 + 1?", "answer": GSM8K}, GSM8K),
    "messages": ({"messages": [ASKED, {"role": "assistant", "content": "2"}]}, "2"),
    "prompt and completion": ({"prompt": "What is 1 + 1?", "completion": "2"}, "2"),
    "solution beside an empty answer": ({"prompt": "What is 1 + 1?", "answer": "", "solution": "2"}, "2"),
    "a number": ({"prompt": "What is 1 + 1?", "answer": 2}, "2"),
    "an object": ({"prompt": "What is 1 + 1?", "answer": {"sum": 2, "of": [1, 1]}}, '{"sum": 2, "of": [1, 1]}'),
    "true": ({"prompt": "What is 1 + 1?", "answer": True}, "true"),
    "messages that end with the question": ({"messages": [ASKED], "reference_answer": "2"}, "2"),
    "such messages alone": ({"messages": [ASKED]}, ""),
    "conversations that end with it": ({"conversations": [{"from": "human", "value": ASKED["content"]}]}, ""),
    "instruction": ({"instruction": "What is 1 + 1?", "output": "2"}, "2"),
}


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(TINY)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def build(chat: ChatTokenizer, path: Path, records: list[dict[str, Any]], learns: Any = "prompts") -> PreparedDataset:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(train_file=str(path), validation_split=0.5)
    return build_datasets(data, chat, 256, 0, lambda line: None, learns=learns)


def questions(record: dict[str, Any], count: int = 20) -> list[dict[str, Any]]:
    """Variants of the record with many numbers."""
    text = json.dumps(record)
    return [json.loads(text.replace("What is 1", f"What is {n}")) for n in range(count)]


@pytest.mark.parametrize("form", RECORDS)
def test_a_prompt_its_reference_and_every_field_are_read_on_both_sides(
    form: str, chat: ChatTokenizer, tmp_path: Path
) -> None:
    record, reference = RECORDS[form]
    records = questions(record)
    corpus = build(chat, tmp_path / "data.jsonl", records)
    assert len(corpus.training) + len(corpus.validation) == 20
    assert len(corpus.training) > 2
    assert len(corpus.validation) > 2
    for samples in (corpus.training, corpus.validation):
        for conversation in corpus.conversations(samples):
            own = records[conversation.line - 1]
            *asked, answer = conversation.messages
            number = conversation.line - 1
            assert [message["content"] for message in asked] == [f"What is {number} + 1?"]
            assert conversation.answer_at == len(asked)
            assert answer["content"] == reference
            assert conversation.fields.items() >= own.items(), "what a reward function gets"


def test_the_cache_holds_prompts_apart_from_turns(chat: ChatTokenizer, tmp_path: Path) -> None:
    records = questions(RECORDS["messages"][0])
    first = build(chat, tmp_path / "data.jsonl", records)
    again = build(chat, tmp_path / "data.jsonl", records)
    turns = build(chat, tmp_path / "data.jsonl", records, "turns")
    assert (first.from_cache, again.from_cache, turns.from_cache) == (False, True, False)
    assert again.directory == first.directory != turns.directory
    assert again.training.records.tolist() == first.training.records.tolist()
    assert list(again.conversations(again.training)) == list(first.conversations(first.training))


def test_earlier_answers_are_context(chat: ChatTokenizer, tmp_path: Path) -> None:
    turns = [ASKED, {"role": "assistant", "content": "3"}, {"role": "user", "content": "Sure?"}]
    for answer in ([], [{"role": "assistant", "content": "2"}]):
        record = {"messages": [*turns, *answer], "solution": "2"}
        corpus = build(chat, tmp_path / "data.jsonl", questions(record))
        conversation = next(corpus.conversations(corpus.training))
        assert [message["content"] for message in conversation.messages][1:] == ["3", "Sure?", "2"]
        assert conversation.answer_at == 3
        sample = corpus.training[0]
        assert chat.decode(sample.ids[sample.is_target]).strip() == "2"


def test_a_tool_result_may_be_the_end_of_a_prompt(chat: ChatTokenizer, tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 1}}}]}
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"messages": [ASKED, call, {"role": "tool", "content": "2"}], "solution": "two"}) + "\n"
    )
    _, found = read_file(tmp_path / "data.jsonl", DataConfig(), learns="prompts")
    assert isinstance(found, Conversation)
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.answer_at == 3
