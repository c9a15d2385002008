"""Raw records to conversations: recognize the shape, turn it into messages, check who says what.

Instruction data comes in a few shapes, each a way to write down who said what. The shape is told from the first
thousand records of a file, and said; where two shapes fit equally well, the reader does not guess. Every record is
turned into one form (a list of messages, or a plain text) and checked. One that cannot be used is set aside with its
file, line and reason; if more than a few are, the file is probably not what its owner believes, and the run stops.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.data.sources import BadRecord, Raw, parse_json, read_raw

Message = dict[str, Any]
DETECT_FROM = 1000  # records from which a file's shape is told
DEEPEST = 100  # lists and objects within one another, in tools and their arguments
ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"developer": "system", "function": "tool"}  # of OpenAI's older and newer forms
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
KEPT_FIELDS = ("name", "tool_call_id", "reasoning_content")  # of a message, besides role, content and tool_calls
# Control characters besides white space (tab, newline, form feed, ...); halves of characters; noncharacters.
GARBAGE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
DESIRABLE = {"true": True, "1": True, "desirable": True, "chosen": True, "good": True, "yes": True} | {
    "false": False, "0": False, "undesirable": False, "rejected": False, "bad": False, "no": False,
    "1.0": True, "0.0": False,  # as a table with gaps writes them
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """One record: messages, or a plain text; what the model was offered as tools; and where it was read."""

    messages: list[Message]
    text: str | None
    file: str
    line: int  # from 1; in a JSON array or a Parquet file, the record's number
    tools: list[dict[str, Any]] | None = None
    fields: dict[str, Any] = field(default_factory=dict)  # those that were asked for: label, source, user, date

    def question(self) -> str:
        """What it opens with: conversations that begin alike belong on the same side of a split."""
        if self.text is not None:
            return self.text
        return next((m["content"] for m in self.messages if m["role"] == "user"), "")

    def prompt(self) -> str:
        """Everything before the first answer."""
        if self.text is not None:
            return self.text
        before = itertools.takewhile(lambda message: message["role"] != "assistant", self.messages)
        return "\n".join(message["content"] for message in before)

    def said(self) -> str:
        """Everything."""
        return "\n".join(m["content"] for m in self.messages) if self.text is None else self.text

    def characters(self) -> int:
        """Of everything that is said."""
        return len(self.text) if self.text is not None else sum(len(m["content"]) for m in self.messages)


@dataclass(frozen=True)
class Rejected:
    """A record that is not used, and where it was read."""

    reason: str
    file: str
    line: int


@dataclass(frozen=True)
class Reading:
    """How files are to be read: the fields of the `data` section that say so."""

    shape: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)  # name in nanoft -> name in the file
    delimiter: str | None = None  # of CSV files; none: found in the header
    label_field: str | None = None  # keep only records that it calls desirable
    fields: tuple[str, ...] = ()  # kept with each conversation, for the split


# ---- Raw records to messages


def _messages(record: dict[str, Any]) -> list[Message]:
    """{"messages": [{"role", "content", "tool_calls", "weight", ...}, ...]}, as OpenAI writes it."""
    return [_message(turn) for turn in _list(record, "messages")]


def _message(turn: Any) -> Message:
    role = OTHER_NAMES.get(turn["role"], turn["role"])
    calls = turn.get("tool_calls") or None
    if "content" not in turn and not calls:
        raise KeyError("content")
    message: Message = {"role": role, "content": _content(turn.get("content"), optional=calls is not None)}
    if calls:
        if role != "assistant":
            raise BadRecord(f"tool_calls: {role!r:.40} cannot call tools: only the assistant can")
        message["tool_calls"] = [_tool_call(call) for call in _as_json(calls, "tool_calls")]
    for name in KEPT_FIELDS:
        if turn.get(name) is not None:
            message[name] = _text(turn, name)
    return {**message, **_training_fields(turn)}


def _training_fields(turn: dict[str, Any]) -> dict[str, Any]:
    """`weight` and `train`, which say whether a message is learned."""
    found = {name: turn[name] for name in ("weight", "train") if turn.get(name) is not None}
    if found.get("weight", 1) not in (0, 1) or not isinstance(found.get("train", True), bool):
        raise BadRecord(f"weight must be 0 or 1, and train true or false: found {found!r:.60}")
    return found


def _content(value: Any, optional: bool = False) -> str:
    """A text, or OpenAI's list of parts, if they are all texts."""
    if value is None and optional:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        kinds = {part.get("type") or "text" for part in value} - {"text"}
        if kinds:
            raise BadRecord(f"content: has a part of type {sorted(map(str, kinds))[0]!r:.40}: only text is trained on")
        return "".join(_text(part, "text") for part in value)
    return _text({"content": value}, "content")


def _tool_call(call: Any) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments"}}; arguments in a text become the object they spell."""
    function = call.get("function", call)
    arguments = _as_json(function.get("arguments", {}), "arguments")
    if not isinstance(arguments, dict):
        raise BadRecord(f"tool_calls: arguments {arguments!r:.40} are not an object")
    _check_inside(arguments, "arguments")
    inner = {"name": _nonempty(_text(function, "name"), "a tool's name"), "arguments": arguments}
    return {**({"id": _text(call, "id")} if call.get("id") else {}), "type": "function", "function": inner}


def _sharegpt(record: dict[str, Any]) -> list[Message]:
    """{"conversations": [{"from": "human" | "gpt" | ..., "value"}, ...], "system" (optional)}."""
    turns = _list(record, "conversations")
    if all(isinstance(turn, dict) and "from" not in turn and "role" in turn for turn in turns):
        return [*_system(record), *_messages({"messages": turns})]
    unknown = [turn["from"] for turn in turns if turn["from"] not in SHAREGPT_ROLES]
    if unknown:
        raise BadRecord(f"unknown speaker {unknown[0]!r:.40}")
    return [*_system(record), *(_sharegpt_turn(turn) for turn in turns)]


def _sharegpt_turn(turn: dict[str, Any]) -> Message:
    value, role = _text(turn, "value"), SHAREGPT_ROLES[turn["from"]]
    if turn["from"] == "function_call":
        calls = _as_json(value, "function_call")
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": role, "content": "", "tool_calls": [_tool_call(c) for c in calls], **_training_fields(turn)}
    return {"role": role, "content": value, **_training_fields(turn)}


def _alpaca(record: dict[str, Any]) -> list[Message]:
    """{"instruction", "input" (may be empty), "output", "system", "history": [[question, answer], ...] (optional)}."""
    question = _text(record, "instruction")
    if record.get("input"):
        question = f"{question}\n\n{_text(record, 'input')}"
    earlier = _as_json(record.get("history") or [], "history")
    if not isinstance(earlier, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        raise BadRecord("history is not a list of [question, answer] pairs")
    turns = [_exchange(_content(asked), _content(answered)) for asked, answered in earlier]
    return [*_system(record), *itertools.chain(*turns), *_exchange(question, _text(record, "output"))]


def _prompt_completion(record: dict[str, Any]) -> list[Message]:
    """{"prompt", "completion"}, both texts or both lists of messages."""
    if isinstance(record["prompt"], list) and isinstance(record["completion"], list):
        turns = [_message(turn) for name in ("prompt", "completion") for turn in _list(record, name)]
        return [*_system(record), *turns]
    return [*_system(record), *_exchange(_text(record, "prompt"), _text(record, "completion"))]


def _question_answer(record: dict[str, Any]) -> list[Message]:
    """{"question", "answer", "context" (optional)}."""
    context = f"{_text(record, 'context')}\n\n" if record.get("context") else ""
    return [*_system(record), *_exchange(context + _text(record, "question"), _text(record, "answer"))]


def _summarization(record: dict[str, Any]) -> list[Message]:
    """{"document", "summary"}."""
    question = f"Summarize the following text.\n\n{_text(record, 'document')}"
    return [*_system(record), *_exchange(question, _text(record, "summary"))]


def _extractive_qa(record: dict[str, Any]) -> list[Message]:
    """{"context", "question", "answers": {"text": [...], ...} | [...]}, as SQuAD writes it; the first answer counts."""
    answers = _as_json(record["answers"], "answers")
    answers = answers["text"] if isinstance(answers, dict) else answers
    first = answers[0] if isinstance(answers, list) and answers else answers
    if not first:
        raise BadRecord("answers: has none")
    first = first["text"] if isinstance(first, dict) else first
    return _question_answer({**record, "answer": first})


def _system(record: dict[str, Any]) -> list[Message]:
    return [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# Shape -> (fields that every record of it has, all that it may have in order, how it reads); `text` has no reader.
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[dict[str, Any]], list[Message]] | None]] = {
    "messages": (("messages",), ("messages", "tools"), _messages),
    "sharegpt": (("conversations",), ("system", "conversations", "tools"), _sharegpt),
    "alpaca": (("instruction", "output"), ("system", "history", "instruction", "input", "output"), _alpaca),
    "prompt_completion": (("prompt", "completion"), ("system", "prompt", "completion", "tools"), _prompt_completion),
    "question_answer": (("question", "answer"), ("system", "context", "question", "answer"), _question_answer),
    "summarization": (("document", "summary"), ("system", "document", "summary"), _summarization),
    "extractive_qa": (("context", "question", "answers"), ("system", "context", "question", "answers"), _extractive_qa),
    "text": (("text",), ("text",), None),
}
# More names by which data.columns may call a field, besides those of the shapes.
COLUMN_NAMES = {"response": "output"}


def detect_shape(path: Path, records: list[tuple[int, Raw]]) -> str:
    """The shape whose fields most records have; a plain text only where nothing else is.

    Raises:
        UserError: no shape fits, or two fit equally well.
    """
    votes = dict.fromkeys(SHAPES, 0)
    for _, record in records:
        if isinstance(record, dict):
            fitting = [shape for shape, (fields, _, _) in SHAPES.items() if all(name in record for name in fields)]
            for shape in [shape for shape in fitting if shape != "text"] or fitting:
                votes[shape] += 1
    best = [shape for shape in votes if votes[shape] and votes[shape] == max(votes.values())]
    if len(best) > 1:
        choices = " or ".join(f"data.format={shape} ({', '.join(SHAPES[shape][0])})" for shape in best)
        raise UserError(f"{path}: its records can be read in {len(best)} ways: choose {choices}")
    if best:
        return best[0]
    line, first = records[0]
    if isinstance(first, BadRecord):
        raise UserError(f"{path}:{line}: {first}")
    found = f"the fields {_names(first)}" if isinstance(first, dict) else f"no fields: it is a {type(first).__name__}"
    known = "; ".join(f"{shape} ({', '.join(fields)})" for shape, (fields, _, _) in SHAPES.items())
    raise UserError(
        f"{path}: no known shape: its first record has {found}: map them with data.columns to one of {known}"
    )


def read_file(
    path: Path,
    reading: Reading,
    tick: Callable[[int], None] = lambda position: None,
    only: Collection[int] | None = None,
) -> Iterator[Conversation | Rejected | str]:
    """All records of a file in order; before them, the shape that they are read as, for people to see.

    Args:
        tick: told how many bytes of the file have been read, now and then.
        only: lines to convert, if not all; reading ends with the last of them.
    Raises:
        UserError: the file as a whole cannot be read.
    """
    records = ((line, _rename(record, reading.columns)) for line, record in read_raw(path, reading.delimiter, tick))
    first = list(itertools.islice(records, DETECT_FROM))
    shape = detect_shape(path, first) if reading.shape == "auto" else reading.shape
    present = {name for _, record in first if isinstance(record, dict) for name in record}
    wanted = [name for name in SHAPES[shape][1] if name in present]
    yield f"{shape} ({', '.join(wanted)})"
    name = str(path)
    last = max(only, default=0) if only is not None else 0
    for line, record in itertools.chain(first, records):
        if only is not None and line > last:
            return
        if only is not None and line not in only:
            continue
        try:
            yield _convert(record, shape, name, line, reading)
        except BadRecord as reason:
            yield Rejected(str(reason), name, line)
        except _Undesirable:
            yield Rejected(UNDESIRABLE, name, line)
        except RecursionError:  # from putting a value into a message
            yield Rejected("nested too deeply", name, line)


UNDESIRABLE = "undesirable label"  # the one reason that is nobody's mistake


class _Undesirable(Exception):
    """The record's label says that it is not to be learned."""


def _rename(record: Raw, columns: Mapping[str, str]) -> Raw:
    """The record with its columns called as the shapes call them."""
    if not columns or not isinstance(record, dict):
        return record
    if missing := [column for column in columns.values() if column not in record]:
        return BadRecord(f"has no column {missing[0]!r:.60} (data.columns)")
    kept = {name: value for name, value in record.items() if name not in columns.values()}
    return kept | {COLUMN_NAMES.get(name, name): record[column] for name, column in columns.items()}


def _convert(record: Raw, shape: str, path: str, line: int, reading: Reading) -> Conversation:
    if isinstance(record, BadRecord):
        raise record
    required, known, reader = SHAPES[shape]
    if not isinstance(record, dict) or not all(name in record for name in required):
        found = _names(record) if isinstance(record, dict) else type(record).__name__
        raise BadRecord(f"expected the fields {', '.join(required)}, found {found}")
    if reading.label_field is not None:
        _check_label(record, reading.label_field)
    fields = {name: _field(record, name) for name in reading.fields}
    if reader is None:
        return Conversation([], _nonempty(_text(record, "text"), "text"), path, line, None, fields)
    try:
        messages = reader(record)
        tools = _tools(record) if "tools" in known else None
    except BadRecord:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, LookupError) as error:
        raise BadRecord(f"a turn is malformed: {type(error).__name__}: {error}"[:200]) from None
    _check_turns(messages)
    return Conversation(messages, None, path, line, tools, fields)


def _check_label(record: dict[str, Any], name: str) -> None:
    """KTO's sets hold good and bad answers side by side; only the good ones are to be imitated."""
    if name not in record:
        raise BadRecord(f"has no field {name!r} (data.label_field)")
    value = str(record[name]).strip().lower()
    if value not in DESIRABLE:
        raise BadRecord(f"{name}: {value!r:.40} is neither desirable nor undesirable (true/false, 1/0, good/bad)")
    if not DESIRABLE[value]:
        raise _Undesirable


def _field(record: dict[str, Any], name: str) -> Any:
    """A field that the split goes by."""
    value = record.get(name)
    if value is None or isinstance(value, (list, dict)) or value != value:
        raise BadRecord(f"{name}: {json.dumps(value, default=str):.40} is no value to split by")
    return value if isinstance(value, (int, float)) else _text({name: str(value)}, name)


def _tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = _as_json(record.get("tools") or None, "tools")
    if not tools:
        return None
    functions = [tool.get("function", tool) for tool in tools] if isinstance(tools, list) else [{}]
    if not all(isinstance(function.get("name"), str) for function in functions):
        raise BadRecord("tools: expected a list of functions with names")
    _check_inside(tools, "tools")
    return tools


def _check_inside(value: Any, name: str, depth: int = 0) -> None:
    """No text in lists and objects may hold what no text has, and nothing may go on for ever."""
    if depth > DEEPEST:
        raise BadRecord(f"{name}: nested too deeply")
    if isinstance(value, str):
        _text({name: value}, name)
    elif isinstance(value, (list, dict)):
        for inner in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
            _check_inside(inner, name, depth + 1)
    elif not isinstance(value, (int, float, type(None))):
        raise BadRecord(f"{name}: has a {type(value).__name__}, which JSON has not")


def _check_turns(messages: list[Message]) -> None:
    """Who speaks after whom; what nobody answered teaches nothing, and goes."""
    for message in messages:
        if message["role"] not in ROLES:
            raise BadRecord(f"unknown role {message['role']!r:.40}: there are {', '.join(ROLES)}")
        if message["role"] != "tool" and not message.get("tool_calls"):
            kind = "an assistant message" if message["role"] == "assistant" else f"a {message['role']} message"
            _nonempty(message["content"], kind)
    spoken = [message["role"] for message in messages[messages[0]["role"] == "system" :]]
    if "assistant" not in spoken:
        raise BadRecord("no assistant message, so there is no target token to train on")
    if spoken[0] != "user":
        raise BadRecord(f"the {spoken[0]} speaks first: there is no prompt")
    for before, after in itertools.pairwise(spoken):
        if after == "system" or (before == after and after != "tool"):
            raise BadRecord(f"{after} after {before}: turns must alternate")
    while messages[-1]["role"] != "assistant":
        messages.pop()


def _names(record: dict[str, Any]) -> str:
    """Its fields, on one line whatever they are called."""
    return repr(", ".join(record))[1:-1][:200]


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = _as_json(record[name], name)
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{name} is not a list of turns")
    return value


def _as_json(value: Any, name: str) -> Any:
    """A value, or what a text spells: tables and older sets keep lists and objects as JSON texts."""
    if not isinstance(value, str):
        return value
    parsed = parse_json(value)
    if isinstance(parsed, BadRecord):
        raise BadRecord(f"{name}: {parsed}")
    return parsed


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise BadRecord(f"{name}: {json.dumps(value, default=str):.60} is not a text")
    if found := GARBAGE.search(value):
        half = "\ud800" <= found[0] <= "\udfff"
        what = "holds half a character (a lone surrogate, or a byte that is not UTF-8)" if half else "holds a character"
        raise BadRecord(f"{name}: {what}" + ("" if half else f" that no text has (U+{ord(found[0]):04X})"))
    return value


def _nonempty(text: str, what: str) -> str:
    if not text.strip():
        raise BadRecord(f"{what} is empty")
    return text
