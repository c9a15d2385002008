"""Files to conversations: every shape, every way a record can be bad, and a split that leaks nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nanoft import UserError
from nanoft.records import Conversation, read_conversations, read_splits, split

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def messages(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(path: Path, records: list[Any]) -> str:
    """Records as .json or .jsonl; a text stands for a line that is written as it is."""
    if path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def asked(questions: list[str]) -> list[Conversation]:
    return [Conversation([{"role": "user", "content": q}], None, "f", n) for n, q in enumerate(questions, start=1)]


# ---- Shapes

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
SHAPES = {
    "openai": ("messages", {"messages": [SYSTEM, USER, ASSISTANT], "source": "x"}, [SYSTEM, USER, ASSISTANT]),
    "sharegpt": (
        "conversations",
        {"conversations": [{"from": s, "value": v} for s, v in [("system", "S"), ("human", "Q"), ("gpt", "A")]]},
        [SYSTEM, USER, ASSISTANT],
    ),
    "sharegpt tools": (
        "conversations",
        {"conversations": [{"from": s, "value": v} for s, v in [("user", "Q"), ("observation", "T"), ("gpt", "A")]]},
        [USER, {"role": "tool", "content": "T"}, ASSISTANT],
    ),
    "alpaca": ("instruction/input/output", {"instruction": "Q", "input": "", "output": "A"}, [USER, ASSISTANT]),
    "alpaca without input": ("instruction/input/output", {"instruction": "Q", "output": "A"}, [USER, ASSISTANT]),
    "alpaca with all": (
        "instruction/input/output",
        {"instruction": "Q", "input": "X", "output": "A", "system": "S", "text": "Q X A"},
        [SYSTEM, {"role": "user", "content": "Q\n\nX"}, ASSISTANT],
    ),
    "completion": ("prompt/completion", {"prompt": "Q", "completion": "A", "system": "S"}, [SYSTEM, USER, ASSISTANT]),
    "left unanswered": ("messages", {"messages": [USER, ASSISTANT, USER, USER]}, [USER, ASSISTANT]),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(("shape", "record", "expected"), SHAPES.values(), ids=list(SHAPES))
def test_shapes(tmp_path: Path, shape: str, record: Any, expected: list[Any], suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", [record])
    (conversation,), report = read_conversations(path)
    assert conversation == Conversation(expected, None, path, 1)
    assert conversation.question() == next(m["content"] for m in expected if m["role"] == "user")
    assert (report.file, report.shape, report.kept, report.bad) == (path, shape, 1, [])


def test_plain_text(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"text": "Once\nupon"}, {"text": " \n"}])
    (conversation,), report = read_conversations(path, max_bad=0.5)
    assert conversation == Conversation([], "Once\nupon", path, 1)
    assert conversation.question() == "Once\nupon"
    assert report.shape == "text"
    assert report.bad == [f"{path}:2: text is empty, so there is no target token to train on"]


def test_shape_is_told_from_all_records(tmp_path: Path) -> None:
    odd: list[Any] = [{"text": "not like the others"}, "[1, 2]", "no JSON"]
    path = write(tmp_path / "data.jsonl", odd + [GOOD] * 97)
    good, report = read_conversations(path)
    assert (report.shape, len(good), len(report.bad)) == ("messages", 97, 3)
    assert report.bad[0] == f"{path}:1: expected the fields messages, found text"
    assert report.bad[1] == f"{path}:2: expected the fields messages, found list"
    path = write(tmp_path / "data.jsonl", [GOOD] + [{"text": "once"}] * 19)
    assert read_conversations(path)[1].shape == "text"


def test_order_and_lines_are_those_of_the_file(tmp_path: Path) -> None:
    lines = [json.dumps(messages(("user", f"Q{n}"), ("assistant", "A"))) for n in range(3)]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())  # BOM, Windows line ends, empty lines
    good, _ = read_conversations(str(path))
    assert [(c.question(), c.line) for c in good] == [("Q0", 1), ("Q1", 3), ("Q2", 5)]


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    content = "one\u2028two\u0085three\x1e"
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(messages(("user", content), ("assistant", "é😀")), ensure_ascii=False), encoding="utf-8")
    (conversation,), _ = read_conversations(str(path))
    assert [m["content"] for m in conversation.messages] == [content, "é😀"]


def test_bom_in_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    assert len(read_conversations(str(path))[0]) == 1


def test_max_records_keeps_the_first_good_ones(tmp_path: Path) -> None:
    records = [messages(("user", f"Q{n}"), ("assistant", "A" if n != 1 else "")) for n in range(30)]
    path = write(tmp_path / "data.jsonl", records)
    good, report = read_conversations(path, max_records=3)
    assert [c.question() for c in good] == ["Q0", "Q2", "Q3"]
    assert (report.kept, len(report.bad)) == (3, 1)
    assert read_conversations(path, max_records=100)[1].kept == 29


# ---- Bad records

TURNS = '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": %s}]}'
BAD = {
    "NaN": (TURNS % "NaN", "NaN is not JSON"),
    "Infinity": (TURNS % "-Infinity", "-Infinity is not JSON"),
    "null": (TURNS % "null", "content: null is not a text"),
    "number": (TURNS % "5", "content: 5 is not a text"),
    "parts": (TURNS % '[{"type": "text", "text": "A"}]', "is not a text"),
    "lone surrogate": (TURNS % r'"a\ud83d"', "half a character"),
    "empty reply": (TURNS % '""', "an assistant message is empty"),
    "blank reply": (TURNS % r'" \n\t "', "an assistant message is empty"),
    "cut off": ((TURNS % '"A"')[:-9], "not valid JSON"),
    "two on a line": (TURNS % '"A"' + TURNS % '"A"', "not valid JSON"),
    "deep": (TURNS % ("[" * 100_000), "nested too deeply"),
    "deep and closed": (TURNS % ("[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "nested": (TURNS % ("[" * 500 + "]" * 500), "is not a text"),
    "long number": (TURNS % ("1" * 5000), "not valid JSON"),
    "null record": ("null", "expected the fields messages, found NoneType"),
    "text record": ('"hello"', "expected the fields messages, found str"),
    "no messages": ('{"message": []}', "expected the fields messages, found message"),
    "empty messages": ('{"messages": []}', "messages is not a list of turns"),
    "messages null": ('{"messages": null}', "messages is not a list of turns"),
    "messages object": ('{"messages": {"role": "user"}}', "messages is not a list of turns"),
    "turn as text": ('{"messages": ["Q", "A"]}', "a turn is malformed"),
    "turn as list": ('{"messages": [["user", "Q"]]}', "a turn is malformed"),
    "turn as null": ('{"messages": [null]}', "a turn is malformed"),
    "no content": ('{"messages": [{"role": "user"}]}', "a turn is malformed: KeyError: 'content'"),
    "no role": ('{"messages": [{"content": "Q"}]}', "a turn is malformed: KeyError: 'role'"),
    "role": (json.dumps(messages(("bot", "A"))), "unknown role 'bot'"),
    "role null": (json.dumps(messages((None, "A"))), "unknown role 'None'"),
    "role of ShareGPT": (json.dumps(messages(("human", "Q"), ("assistant", "A"))), "unknown role 'human'"),
    "nobody answers": (json.dumps(messages(("system", "S"), ("user", "Q"))), "no assistant message"),
    "assistant first": (json.dumps(messages(("assistant", "A"), ("user", "Q"))), "the assistant speaks first"),
}


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=list(BAD))
def test_bad_records_are_set_aside_and_named(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "data.jsonl", [GOOD] * 7 + [line] + [GOOD] * 12)
    good, report = read_conversations(path)  # 1 of 20: exactly the 5 % that are allowed
    assert len(good) == 19
    assert [c.line for c in good] == [n for n in range(1, 21) if n != 8]
    (bad,) = report.bad
    assert bad.startswith(f"{path}:8: ")
    assert reason in bad
    assert len(bad) < len(path) + 200


OTHER_SHAPES = {
    "speaker": ({"conversations": [{"from": "alien", "value": "Q"}]}, "unknown speaker 'alien'"),
    "speaker as list": ({"conversations": [{"from": [], "value": "Q"}]}, "a turn is malformed"),
    "no value": ({"conversations": [{"from": "human"}]}, "a turn is malformed"),
    "output null": ({"instruction": "Q", "output": None}, "output: null is not a text"),
    "input list": ({"instruction": "Q", "input": ["X"], "output": "A"}, 'input: ["X"] is not a text'),
    "system number": ({"instruction": "Q", "output": "A", "system": 3}, "system: 3 is not a text"),
    "completion empty": ({"prompt": "Q", "completion": ""}, "an assistant message is empty"),
    "prompt list": ({"prompt": [], "completion": "A"}, "prompt: [] is not a text"),
    "text null": ({"text": None}, "text: null is not a text"),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(("record", "reason"), OTHER_SHAPES.values(), ids=list(OTHER_SHAPES))
def test_bad_records_of_the_other_shapes(tmp_path: Path, record: Any, reason: str, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", [record])
    with pytest.raises(UserError) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:1: {reason}")


def test_more_bad_records_than_allowed_stop_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [GOOD] * 37 + ["{", "}"])
    with pytest.raises(UserError, match="2 of 39 records are malformed") as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:38: not valid JSON")
    assert read_conversations(path, max_bad=2 / 39)[1].kept == 37
    with pytest.raises(UserError, match="malformed"):
        read_conversations(path, max_bad=0.0)


# ---- Files

FILES = {
    "empty": ("data.jsonl", b"", "the file is empty"),
    "blank": ("data.jsonl", b"\xef\xbb\xbf \n\n", "the file is empty"),
    "empty json": ("data.json", b"", "the file is empty"),
    "empty array": ("data.json", b"[]", "the array is empty"),
    "object": ("data.json", b'{"data": []}', "expected an array of records"),
    "lines in .json": ("data.json", b"{}\n{}\n", "not valid JSON"),
    "cut off": ("data.json", b'[{"messages": [', "not valid JSON"),
    "deep": ("data.json", b"[" * 100_000, "nested too deeply"),
    "suffix": ("data.csv", b"a,b\n", "unknown kind of file '.csv'"),
    "no suffix": ("data", b"{}", "unknown kind of file ''"),
    "bytes": ("data.jsonl", b'{"text": "caf\xe9"}\n', "cannot be read as UTF-8"),
    "UTF-16": ("data.json", "[]".encode("utf-16"), "cannot be read as UTF-8"),
    "array in .jsonl": ("data.jsonl", b'[{"text": "a"}]\n', "no known shape: the first record has list"),
    "unknown fields": ("data.jsonl", b'{"question": "Q", "answer": "A"}\n', "the first record has question, answer"),
}


@pytest.mark.parametrize(("name", "content", "reason"), FILES.values(), ids=list(FILES))
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_conversations(str(path))
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for name, what in (("nothing.jsonl", "no such file"), ("folder.json", "is a directory")):
        with pytest.raises(UserError, match=f"{name}: {what}"):
            read_conversations(str(tmp_path / name))
    with pytest.raises(UserError, match=r"data\.train_file: is empty"):
        read_conversations("")


def test_nothing_but_bad_lines_names_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ["", "", "{oh", "no}"])
    with pytest.raises(UserError, match=r"data\.jsonl:3: not valid JSON"):
        read_conversations(path)


# ---- Split

QUESTIONS = [f"question {n % 400}" for n in range(1000)]  # each of 400 two or three times


def questions(conversations: list[Conversation]) -> set[str]:
    return {c.question() for c in conversations}


def test_split_keeps_everything_and_leaks_nothing() -> None:
    conversations = asked(QUESTIONS)
    training, validation = split(conversations, 0.1, seed=0)
    assert sorted(training + validation, key=lambda c: c.line) == conversations
    assert training == sorted(training, key=lambda c: c.line)  # the order of the file stays
    assert questions(training).isdisjoint(questions(validation))
    assert len(questions(validation)) == 40


def test_split_is_seeded_and_independent_of_the_order() -> None:
    conversations = asked(QUESTIONS)
    held_out = questions(split(conversations, 0.1, seed=0)[1])
    shuffled = random.Random(1).sample(conversations, len(conversations))
    assert questions(split(shuffled, 0.1, seed=0)[1]) == held_out
    other = questions(split(conversations, 0.1, seed=1)[1])
    assert len(other & held_out) < 20  # 4 by chance
    assert held_out < questions(split(conversations, 0.2, seed=0)[1])  # a larger share holds out more, not others


def test_split_goes_by_the_question_whatever_comes_before() -> None:
    turns = [{"role": "user", "content": "same"}, {"role": "assistant", "content": "A"}]
    system = [{"role": "system", "content": "S"}, *turns]
    alike = [Conversation(turns, None, "f", 1), Conversation(system, None, "f", 2)]
    for seed in range(8):
        training, validation = split(alike + asked(["other"]), 0.5, seed)
        assert questions(training).isdisjoint(questions(validation))
        assert {len(training), len(validation)} == {1, 2}


@pytest.mark.parametrize(("count", "share", "held_out"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.9, 1), (10, 0.0, 0)])
def test_split_of_few(count: int, share: float, held_out: int) -> None:
    training, validation = split(asked([f"q{n}" for n in range(count)]), share, seed=3)
    assert (len(training), len(validation)) == (count - held_out, held_out)


def test_split_of_one_question_keeps_it_for_training() -> None:
    assert split(asked(["same"] * 5), 0.5, seed=0)[1] == []


def test_two_files_or_one_split(tmp_path: Path) -> None:
    records = [messages(("user", f"Q{n}"), ("assistant", "A")) for n in range(20)]
    first, second = write(tmp_path / "a.jsonl", records), write(tmp_path / "b.json", records[:4])
    training, validation, reports = read_splits(first, second, 0.5, 0, 3, 0.05)
    assert ([c.file for c in training], [c.file for c in validation]) == ([first] * 3, [second] * 3)
    assert [report.file for report in reports] == [first, second]
    training, validation, reports = read_splits(first, None, 0.25, 0, None, 0.05)
    assert (len(training), len(validation), len(reports)) == (15, 5, 1)
