"""Files to conversations: read, recognise, check, split.

Instruction data comes in a few shapes, each a way to write down who said what. They are recognised from all records of
a file, turned into one form (a list of messages, or a plain text), and checked. A malformed record is set aside with
its file and line; if more than a few are malformed, the file is probably not what its owner believes: the run stops.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoft import UserError

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
ROLES = ("system", "user", "assistant", "tool")


class BadRecord(ValueError):
    """This record cannot be used, and why."""


@dataclass(frozen=True)
class Conversation:
    """One record: messages of {role, content}, or a plain text; and where it was read."""

    messages: list[dict[str, str]]
    text: str | None
    file: str
    line: int  # from 1; in a JSON array, the record's number

    def question(self) -> str:
        """What it opens with: conversations that begin alike belong on the same side of a split."""
        if self.text is not None:
            return self.text
        return next((m["content"] for m in self.messages if m["role"] == "user"), "")


@dataclass(frozen=True)
class ReadReport:
    """What became of a file: for the terminal and the report."""

    file: str
    shape: str
    kept: int
    bad: list[str]  # "file:line: reason"


def _messages(record: dict[str, Any]) -> list[dict[str, str]]:
    """{"messages": [{"role", "content"}, ...]}, as OpenAI writes it."""
    return [{"role": str(m["role"]), "content": _text(m, "content")} for m in _list(record, "messages")]


def _sharegpt(record: dict[str, Any]) -> list[dict[str, str]]:
    """{"conversations": [{"from": "human" | "gpt" | ..., "value"}, ...]}."""
    turns = _list(record, "conversations")
    unknown = [turn["from"] for turn in turns if turn["from"] not in SHAREGPT_ROLES]
    if unknown:
        raise BadRecord(f"unknown speaker {unknown[0]!r}")
    return [{"role": SHAREGPT_ROLES[turn["from"]], "content": _text(turn, "value")} for turn in turns]


def _alpaca(record: dict[str, Any]) -> list[dict[str, str]]:
    """{"instruction", "input" (may be empty), "output", "system" (optional)}."""
    question = _text(record, "instruction")
    if record.get("input"):
        question = f"{question}\n\n{_text(record, 'input')}"
    return _exchange(record, question, _text(record, "output"))


def _prompt_completion(record: dict[str, Any]) -> list[dict[str, str]]:
    """{"prompt", "completion"}, both texts."""
    return _exchange(record, _text(record, "prompt"), _text(record, "completion"))


def _exchange(record: dict[str, Any], question: str, answer: str) -> list[dict[str, str]]:
    opening = [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []
    return [*opening, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# Shape -> (fields that every record of it has, how it reads); `text` is no conversation and has no reader.
SHAPES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], list[dict[str, str]]] | None]] = {
    "messages": (("messages",), _messages),
    "conversations": (("conversations",), _sharegpt),
    "instruction/input/output": (("instruction", "output"), _alpaca),
    "prompt/completion": (("prompt", "completion"), _prompt_completion),
    "text": (("text",), None),
}


def read_conversations(
    path: str, max_records: int | None = None, max_bad: float = 0.05
) -> tuple[list[Conversation], ReadReport]:
    """Read a .json or .jsonl file.

    Args:
        max_records: keep only the first so many good records.
        max_bad: share of malformed records above which the run stops.
    Raises:
        UserError: no such file, nothing in it, no known shape, or too many malformed records (the first is named).
    """
    file = Path(path)
    if not path or not file.is_file():
        if not path:
            raise UserError("data.train_file: is empty: give a .json or .jsonl file")
        raise UserError(f"data file: {path}: " + ("is a directory: name a file" if file.is_dir() else "no such file"))
    raw = list(_read_raw(file))
    shape = _detect_shape(file, raw)
    good: list[Conversation] = []
    bad: list[str] = []
    for line, record in raw:
        try:
            good.append(_convert(record, shape, path, line))
        except BadRecord as reason:
            bad.append(f"{path}:{line}: {reason}")
    if len(bad) > max_bad * len(raw):
        raise UserError(
            f"{bad[0]} ({len(bad)} of {len(raw)} records are malformed, more than data.max_bad_records={max_bad} "
            "allows: repair the file)"
        )
    return good[:max_records], ReadReport(path, shape, min(len(good), max_records or len(good)), bad)


def _read_raw(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, record) pairs; a line that is not JSON comes as the BadRecord that says so."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty: it needs at least one record")
    if path.suffix == ".json":
        whole = _parse_json(text)
        if isinstance(whole, BadRecord):
            raise UserError(f"{path}: {whole}")
        if not isinstance(whole, list):
            raise UserError(f"{path}: expected an array of records; one object a line is .jsonl")
        if not whole:
            raise UserError(f"{path}: the array is empty: it needs at least one record")
        yield from enumerate(whole, start=1)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield number, _parse_json(line)
    else:
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}: give .json or .jsonl")


def _parse_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON and no value to train on")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        return BadRecord("nested too deeply")
    except ValueError as error:
        return BadRecord(f"not valid JSON: {error}")


def _detect_shape(path: Path, records: list[tuple[int, Any]]) -> str:
    """The shape whose fields most records have; told from all of them, not from the first."""
    votes = dict.fromkeys(SHAPES, 0)
    for _, record in records:
        if isinstance(record, dict):
            for shape, (fields, _) in SHAPES.items():
                votes[shape] += all(name in record for name in fields)
    shape = max(votes, key=lambda name: votes[name])
    if votes[shape]:
        return shape
    line, first = records[0]
    if isinstance(first, BadRecord):
        raise UserError(f"{path}:{line}: {first}")
    found = ", ".join(first) if isinstance(first, dict) else type(first).__name__
    raise UserError(f"{path}: no known shape: the first record has {found}; known are {'; '.join(SHAPES)}")


def _convert(record: Any, shape: str, path: str, line: int) -> Conversation:
    if isinstance(record, BadRecord):
        raise record
    fields, reader = SHAPES[shape]
    if not isinstance(record, dict) or not all(name in record for name in fields):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise BadRecord(f"expected the fields {', '.join(fields)}, found {found}")
    if reader is None:
        return Conversation([], _nonempty(_text(record, "text"), "text"), path, line)
    try:
        messages = reader(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadRecord(f"a turn is malformed: {type(error).__name__}: {error}") from None
    _check_turns(messages)
    return Conversation(messages, None, path, line)


def _check_turns(messages: list[dict[str, str]]) -> None:
    for message in messages:
        if message["role"] not in ROLES:
            raise BadRecord(f"unknown role {message['role']!r}: there are {', '.join(ROLES)}")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRecord("no assistant message, so there is no target token to train on")
    for answer in answers:
        _nonempty(answer, "an assistant message")
    if messages[0]["role"] == "assistant":
        raise BadRecord("the assistant speaks first: there is no prompt")
    while messages[-1]["role"] != "assistant":
        messages.pop()  # what nobody answered teaches nothing


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = record[name]
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{name} is not a list of turns")
    return value


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise BadRecord(f"{name}: {json.dumps(value):.60} is not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{name}: holds half a character (a lone surrogate)") from None
    return value


def _nonempty(text: str, what: str) -> str:
    if not text.strip():
        raise BadRecord(f"{what} is empty, so there is no target token to train on")
    return text


def split(conversations: list[Conversation], share: float, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """(training, validation): the `share` with the smallest hash of seed and prompt, whatever the order of the file.

    Records with the same prompt fall on the same side, so no validation prompt stands in the training data.
    """
    if share <= 0 or len(conversations) < 2:
        return conversations, []

    def rank(conversation: Conversation) -> str:
        return hashlib.sha256(f"{seed}\0{conversation.question()}".encode()).hexdigest()

    ranked = sorted({rank(c) for c in conversations})
    limit = ranked[min(len(ranked) - 1, max(1, round(share * len(ranked))))]
    held_out = [rank(c) < limit for c in conversations]
    training = [c for c, out in zip(conversations, held_out, strict=True) if not out]
    return training, [c for c, out in zip(conversations, held_out, strict=True) if out]


def read_splits(
    train_file: str, validation_file: str | None, share: float, seed: int, max_records: int | None, max_bad: float
) -> tuple[list[Conversation], list[Conversation], list[ReadReport]]:
    """Training and validation conversations: two files, or one file split; and what became of each file."""
    training, report = read_conversations(train_file, max_records, max_bad)
    if not validation_file:
        return (*split(training, share, seed), [report])
    validation, second = read_conversations(validation_file, max_records, max_bad)
    return training, validation, [report, second]
