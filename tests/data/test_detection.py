"""Detecting the shape of a file's records, and other names of their fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoft import UserError
from nanoft.config import DataConfig
from nanoft.data.formats import Conversation, read_file

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
ALPACA = {"instruction": "Q", "input": "", "output": "A"}


def read(path: Path, records: list[Any], **reading: Any) -> tuple[str, list[Conversation]]:
    """The shape and the conversations of a file that is written with these records."""
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    shape, *items = read_file(path, DataConfig(**reading))
    assert isinstance(shape, str)
    return shape, [item for item in items if isinstance(item, Conversation)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


# Columns -> the shape as it is said; each record has a question, and an answer last.
OTHER_NAMES = {
    ("instruction", "response"): "alpaca: instruction, output (response)",
    ("Instruction", "Output"): "alpaca: instruction (Instruction), output (Output)",
    ("instruction", "completion"): "alpaca: instruction, output (completion)",
    ("prompt", "response"): "prompt_completion: prompt, completion (response)",
    ("Prompt ", "Completion"): "prompt_completion: prompt (Prompt ), completion (Completion)",
    ("input", "output"): "prompt_completion: prompt (input), completion (output)",
    ("query", "response"): "prompt_completion: prompt (query), completion (response)",
    ("question", "response"): "question_answer: question, answer (response)",
    ("Question", "Answer"): "question_answer: question (Question), answer (Answer)",
    ("problem", "solution"): "question_answer: question (problem), answer (solution)",
}


@pytest.mark.parametrize("columns", OTHER_NAMES)
def test_fields_have_other_names(path: Path, columns: tuple[str, str]) -> None:
    record = {"id": 7, "category": "open_qa", columns[0]: "Q", columns[1]: "A"}
    said, (conversation,) = read(path, [record])
    assert (said, conversation.messages) == (OTHER_NAMES[columns], [USER, ASSISTANT])
    assert read(path, [record], format=said.partition(":")[0])[1] == [conversation]


TWO_READINGS: list[tuple[dict[str, str], list[str]]] = [
    ({"problem": "Q", "solution": "A", "answer": "B"}, ['"question": "problem", "answer": "solution"',
                                                        '"question": "problem", "answer": "answer"']),
    ({"prompt": "Q", "input": "X", "output": "A"}, ['"prompt": "prompt", "completion": "output"',
                                                    '"prompt": "input", "completion": "output"']),
    ({"article": "Q", "text": "X", "summary": "A"}, ['"document": "article", "summary": "summary"',
                                                     '"document": "text", "summary": "summary"']),
    ({"prompt": "Q", "response": "A", "context": "X"}, ['"prompt": "prompt", "completion": "response"']),
]  # fmt: skip


@pytest.mark.parametrize(("record", "ways"), TWO_READINGS)
def test_two_readings_are_printed_as_settings(path: Path, record: dict[str, str], ways: list[str]) -> None:
    with pytest.raises(UserError, match="can be read in several ways: choose ") as raised:
        read(path, [record])
    assert str(raised.value).endswith(" or ".join(f"data.columns='{{{way}}}'" for way in ways)
                                      + " or data.format=text" * ("text" in record))  # fmt: skip
    for way in ways:
        assert read(path, [record], columns=json.loads(f"{{{way}}}"))[1][0].messages[-1]["role"] == "assistant"


def test_fields_with_their_own_names_come_first(path: Path) -> None:
    record = {"instruction": "Q", "input": "", "output": "A", "response": "B", "text": "T", "prompt": "P"}
    assert read(path, [record])[1][0].messages == [USER, ASSISTANT]


UNMARKED = {"prompt": "Q", "completion": "A"}, {"messages": [USER, ASSISTANT]}, ALPACA, {"prompt": "Q", "response": "A"}


@pytest.mark.parametrize("record", UNMARKED)
@pytest.mark.parametrize("labels", [[False, True], [1, 0], ["desirable"], [None, "False"], [0.0]])
def test_bad_answers_are_not_learned_without_a_choice(path: Path, record: dict[str, Any], labels: list[Any]) -> None:
    records = [{**record, "label": label} for label in labels]
    with pytest.raises(UserError, match=r"data\.label_field=label .* only good ones, data\.label_field=ignore .* all"):
        read(path, records)
    assert len(read(path, records, label_field="ignore")[1]) == len(records)
    assert len(read(path, [{**record, "label": "math"}, *records])[1]) == len(records) + 1  # a class of another kind
    with pytest.raises(UserError, match="kto_tag marks answers"):
        read(path, [{**record, "kto_tag": True}])


def test_a_label_beside_a_text_is_a_class(path: Path) -> None:
    assert len(read(path, [{"text": "a", "label": 0}, {"text": "b", "label": 1}])[1]) == 2


PAIRS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, {"completion": "chosen"}),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": []}, {"completion": "chosen"}),
    ({"prompt": "Q", "chosen": [USER, ASSISTANT], "rejected": []}, {"messages": "chosen"}),
    ({"chosen": [USER, ASSISTANT], "rejected": []}, {"messages": "chosen"}),
    ({"question": "Q", "chosen": "A", "rejected": "B"}, {"answer": "chosen"}),
    ({"instruction": "Q", "chosen": "A", "rejected": "B"}, {"output": "chosen"}),
]


@pytest.mark.parametrize(("record", "columns"), PAIRS)
def test_pairs_of_answers_are_named_with_the_setting_that_learns_the_chosen_ones(
    path: Path, record: dict[str, Any], columns: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=r"contains pairs of answers: set training\.objective=dpo to .* data\.columns"):
        read(path, [record])
    assert read(path, [record], columns=columns)[1][0].messages == [USER, ASSISTANT]
