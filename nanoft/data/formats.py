"""Records to conversations: record shapes, their detection, and validation of the turns.

SHAPES is the table of shapes: a new one is an entry, with its conversion above the table. A conversion may assume that
the required fields exist; whatever it raises rejects the record, with its file, line and reason. The shape is detected
from the first thousand records; where two fit equally well, the user has to choose. With
`data.format=package.module:function` the user's own function converts each record instead.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.config import DataConfig
from nanoft.config.fields import nearest
from nanoft.config.functions import UNTRUSTED, import_function, is_function
from nanoft.data.sources import BadRecord, Raw, decode_json, read_raw

Message = dict[str, Any]
DETECT_FROM = 1000  # records from which a file's shape is detected
MAX_DEPTH = 100  # nesting of lists and objects in tools and their arguments
ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {"developer": "system", "function": "tool"}  # OpenAI's newer and older names
SHAREGPT_ROLES = {
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    **dict.fromkeys(("human", "user"), "user"),
    "system": "system",
}
TRAINING_FIELDS = ("weight", "train")  # of a message: whether it is a target
KEPT_FIELDS = ("name", "tool_call_id", "reasoning_content")  # of a message, besides role, content and tool_calls
UNDESIRABLE = "undesirable label"  # the one reason that is not a mistake in the data
GOOD = ("true", "1", "1.0", "desirable", "chosen", "good", "yes")  # 1.0 and 0.0: from tables with missing values
BAD = ("false", "0", "0.0", "undesirable", "rejected", "bad", "no")
# Control characters except white space (tab, newline, form feed, ...); lone surrogates; noncharacters.
INVALID = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True)
class Conversation:
    """One record: messages or a plain text, the tools offered to the model, and where it was read."""

    messages: list[Message]
    text: str | None
    file: str
    line: int  # from 1; in a JSON array or a Parquet file, the record's number
    tools: list[dict[str, Any]] | None = None
    fields: dict[str, Any] = field(default_factory=dict)  # those of ReadOptions.fields

    def full_text(self) -> str:
        return self.text or "\n".join(message["content"] for message in self.messages)

    def characters(self) -> int:
        return len(self.text or "") + sum(len(message["content"]) for message in self.messages)

    def first_user_text(self) -> str:
        """The first user message, or the plain text; conversations that share it stay on one side of a split."""
        return self.text or next((m["content"] for m in self.messages if m["role"] == "user"), "")

    def prompt(self) -> str:
        """Everything before the first answer."""
        before = itertools.takewhile(lambda message: message["role"] != "assistant", self.messages)
        return self.text or "\n".join(message["content"] for message in before)


def _messages(record: dict[str, Any]) -> list[Message]:
    """{"messages": [{"role", "content", "tool_calls", "weight", ...}, ...]}, as OpenAI writes it."""
    return [_message(turn) for turn in _list(record, "messages")]


def _message(turn: Any) -> Message:
    role = ROLE_ALIASES.get(turn["role"], turn["role"])
    calls = turn.get("tool_calls") or None
    if "content" not in turn and not calls:
        raise KeyError("content")
    content = turn.get("content")
    message: Message = {"role": role, "content": "" if calls and content is None else _content(content)}
    if calls:
        if role != "assistant":
            raise BadRecord(f"tool_calls: {role!r:.40} cannot call tools: only the assistant can")
        message["tool_calls"] = [_tool_call(call) for call in _as_json(calls, "tool_calls")]
    for name in KEPT_FIELDS:
        if turn.get(name) is not None:
            message[name] = text_of(turn, name)
    return {**message, **_training_fields(turn)}


def _training_fields(turn: dict[str, Any]) -> dict[str, Any]:
    found = {name: turn[name] for name in TRAINING_FIELDS if turn.get(name) is not None}
    if found.get("weight", 1) not in (0, 1) or not isinstance(found.get("train", True), bool):
        raise BadRecord(f"weight must be 0 or 1, and train true or false: found {found!r:.60}")
    return found


def _content(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        if kinds := {part.get("type") or "text" for part in value} - {"text"}:
            raise BadRecord(f"content: has a part of type {sorted(map(str, kinds))[0]!r:.40}: only text is supported")
        return "".join(text_of(part, "text") for part in value)
    return text_of({"content": value}, "content")


def _tool_call(call: Any) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments"}}; arguments given as a JSON string are parsed."""
    function = call.get("function", call)
    arguments = _as_json(function.get("arguments", {}), "arguments")
    if not isinstance(arguments, dict):
        raise BadRecord(f"tool_calls: arguments {arguments!r:.40} are not a JSON object")
    _check_value(arguments, "arguments")
    inner = {"name": nonempty(text_of(function, "name"), "a tool's name"), "arguments": arguments}
    return {**({"id": text_of(call, "id")} if call.get("id") else {}), "type": "function", "function": inner}


def _sharegpt(record: dict[str, Any]) -> list[Message]:
    """{"conversations": [{"from": "human" | "gpt" | ..., "value"}, ...], "system" (optional)}."""
    turns = _list(record, "conversations")
    if all(isinstance(turn, dict) and "from" not in turn and "role" in turn for turn in turns):
        return _messages({"messages": turns})
    messages: list[Message] = []
    for turn in turns:
        if turn["from"] not in SHAREGPT_ROLES:
            raise BadRecord(f"unknown speaker {turn['from']!r:.40}")
        message: Message = {"role": SHAREGPT_ROLES[turn["from"]], "content": text_of(turn, "value")}
        if turn["from"] == "function_call":
            found = _as_json(message["content"], "function_call")
            calls = found if isinstance(found, list) else [found]
            message |= {"content": "", "tool_calls": [_tool_call(call) for call in calls]}
        messages.append({**message, **_training_fields(turn)})
    return messages


def _alpaca(record: dict[str, Any]) -> list[Message]:
    """{"instruction", "input" (may be empty), "output", "system", "history": [[question, answer], ...] (optional)}."""
    added = f"\n\n{text_of(record, 'input')}" if record.get("input") else ""
    earlier = _as_json(record.get("history") or [], "history")
    if not isinstance(earlier, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        raise BadRecord("history is not a list of [question, answer] pairs")
    turns = [_exchange(_content(asked), _content(answered)) for asked, answered in earlier]
    return [*itertools.chain(*turns), *_exchange(text_of(record, "instruction") + added, text_of(record, "output"))]


def _pair(record: dict[str, Any]) -> list[Message]:
    """{"prompt", "completion"}, both texts or both lists of messages."""
    if isinstance(record["prompt"], list) and isinstance(record["completion"], list):
        return [_message(turn) for name in ("prompt", "completion") for turn in _list(record, name)]
    return _exchange(text_of(record, "prompt"), text_of(record, "completion"))


def _question_answer(record: dict[str, Any]) -> list[Message]:
    """{"question", "answer", "context" (optional)}."""
    context = f"{text_of(record, 'context')}\n\n" if record.get("context") else ""
    return _exchange(context + text_of(record, "question"), text_of(record, "answer"))


def _summarization(record: dict[str, Any]) -> list[Message]:
    """{"document", "summary"}."""
    return _exchange(f"Summarize the following text.\n\n{text_of(record, 'document')}", text_of(record, "summary"))


def _squad(record: dict[str, Any]) -> list[Message]:
    """{"context", "question", "answers": {"text": [...], ...} | [...]}, as SQuAD writes it; the first answer counts."""
    answers = _as_json(record["answers"], "answers")
    answers = answers["text"] if isinstance(answers, dict) else answers
    first = answers[0] if isinstance(answers, list) and answers else answers
    if not first:
        raise BadRecord("answers: is empty")
    return _question_answer({**record, "answer": first["text"] if isinstance(first, dict) else first})


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class Shape:
    """One way to write down a conversation."""

    required: tuple[str, ...]  # fields that every record has; `auto` detects the shape by them
    fields: tuple[str, ...]  # all fields that are read, in the order in which they are shown
    to_messages: Callable[[dict[str, Any]], list[Message]] | None  # None: plain text


SHAPES = {
    "messages": Shape(("messages",), ("messages", "tools"), _messages),
    "sharegpt": Shape(("conversations",), ("system", "conversations", "tools"), _sharegpt),
    "alpaca": Shape(("instruction", "output"), ("system", "history", "instruction", "input", "output"), _alpaca),
    "prompt_completion": Shape(("prompt", "completion"), ("system", "prompt", "completion", "tools"), _pair),
    "question_answer": Shape(("question", "answer"), ("system", "context", "question", "answer"), _question_answer),
    "summarization": Shape(("document", "summary"), ("system", "document", "summary"), _summarization),
    "extractive_qa": Shape(("context", "question", "answers"), ("system", "context", "question", "answers"), _squad),
    "text": Shape(("text",), ("text",), None),
}
ALIASES = {"response": "output"}  # other names of fields in data.columns


def _parse_tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = _as_json(record.get("tools") or None, "tools")
    if not tools:
        return None
    functions = [tool.get("function", tool) for tool in tools] if isinstance(tools, list) else [{}]
    if not all(isinstance(function.get("name"), str) for function in functions):
        raise BadRecord("tools: expected a list of functions with names")
    _check_value(tools, "tools")
    return tools


def _check_value(value: Any, name: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise BadRecord(f"{name}: nested too deeply")
    if isinstance(value, str):
        text_of({name: value}, name)
    elif isinstance(value, (list, dict)):
        for inner in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
            _check_value(inner, name, depth + 1)
    elif not isinstance(value, (int, float, type(None))):
        raise BadRecord(f"{name}: contains a value of type {type(value).__name__}, which JSON does not have")


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = _as_json(record[name], name)
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{name} is not a list of turns")
    return value


def _as_json(value: Any, name: str) -> Any:
    """A value, parsed if it is a string: tables and older data sets store lists and objects as JSON strings."""
    if not isinstance(value, str):
        return value
    try:
        return decode_json(value)
    except BadRecord as reason:
        raise BadRecord(f"{name}: {reason}") from None


def text_of(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise BadRecord(f"{name}: {json.dumps(value, default=str):.60} is not a string")
    if found := INVALID.search(value):
        if "\ud800" <= found[0] <= "\udfff":
            raise BadRecord(f"{name}: contains a lone surrogate, or a byte that is not UTF-8")
        kind = "control character" if found[0] < "\xa0" else "reserved Unicode noncharacter"
        raise BadRecord(f"{name}: contains a {kind} (U+{ord(found[0]):04X})")
    return value


def nonempty(text: str, what: str) -> str:
    if not text.strip():
        raise BadRecord(f"{what} is empty")
    return text


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used, and where it was read."""

    reason: str
    file: str
    line: int


@dataclass(frozen=True)
class ReadOptions:
    """How files are read: the fields of the `data` section that say so."""

    shape: str = "auto"  # an entry of SHAPES, or package.module:function
    columns: Mapping[str, str] = field(default_factory=dict)  # name in nanoft -> name in the file
    delimiter: str | None = None  # of CSV files; None: detected from the header
    label_field: str | None = None  # keep only records that it marks as desirable
    fields: tuple[str, ...] = ()  # kept with each conversation, for the split

    @classmethod
    def from_config(cls, data: DataConfig) -> ReadOptions:
        wanted = {data.split_stratify or data.label_field, data.split_group, data.split_time} - {None, "length"}
        return cls(data.format, data.columns, data.delimiter, data.label_field, tuple(sorted(map(str, wanted))))


def check_format(name: str) -> None:
    """Raise a UserError if data.format is neither auto, nor an entry of SHAPES, nor package.module:function."""
    names = ("auto", *SHAPES, "package.module:function")
    if name not in names[:-1] and not is_function(name.removeprefix(UNTRUSTED)):
        raise UserError(f"data.format: {name!r:.60} is not known{nearest(name, names)}")


def format_function(name: str) -> Callable[..., Any] | None:
    """The user's own function that data.format names, imported; None if it names a shape."""
    check_format(name)
    if name.startswith(UNTRUSTED):
        name = name.removeprefix(UNTRUSTED)
        raise UserError(f"data.format: {name} is code, which config.json cannot name: add data.format={name} again")
    return import_function(name, "data.format", "(record)") if is_function(name) else None


def detect_shape(path: Path, records: list[tuple[int, Raw]]) -> str:
    """The shape whose required fields most records have; `text` only if nothing else fits."""
    votes = dict.fromkeys(SHAPES, 0)
    for _, record in records:
        if isinstance(record, dict):
            fitting = [name for name, shape in SHAPES.items() if record.keys() >= {*shape.required}]
            for name in [name for name in fitting if name != "text"] or fitting:
                votes[name] += 1
    best = [name for name in votes if votes[name] and votes[name] == max(votes.values())]
    if len(best) > 1:
        choices = " or ".join(f"data.format={name} ({', '.join(SHAPES[name].required)})" for name in best)
        raise UserError(f"{path}: its records fit {len(best)} shapes: choose {choices}")
    if best:
        return best[0]
    line, first = records[0]
    if isinstance(first, BadRecord):
        raise UserError(f"{path}:{line}: {first}")
    has = f"the fields {_names(first)}" if isinstance(first, dict) else f"no fields: it is a {type(first).__name__}"
    known = "; ".join(f"{name} ({', '.join(shape.required)})" for name, shape in SHAPES.items())
    raise UserError(f"{path}: unknown shape: its first record has {has}: map them with data.columns to one of {known}")


def read_file(
    path: Path,
    options: ReadOptions,
    on_progress: Callable[[int], None] = lambda position: None,  # called now and then with the number of bytes read
    only: Collection[int] | None = None,  # lines to convert; None: all
) -> Iterator[Conversation | Rejected | str]:
    """All records of a file in order; before them, a description of the shape they are read in."""
    shape, function = options.shape, format_function(options.shape)
    raw = read_raw(path, options.delimiter, on_progress)
    records = ((line, _rename(record, options.columns)) for line, record in raw)
    first = list(itertools.islice(records, DETECT_FROM))
    shape = detect_shape(path, first) if shape == "auto" else shape
    present = {name for _, record in first if isinstance(record, dict) for name in record}
    found = [name for name in SHAPES[shape].fields if name in present] if function is None else [shape]
    yield shape if found == [shape] else f"{shape}: {', '.join(found)}"
    last = max(only, default=0) if only is not None else math.inf
    for line, record in itertools.chain(first, records):
        if line > last:
            return
        if only is not None and line not in only:
            continue
        try:
            yield _convert(record, shape, function, str(path), line, options)
        except BadRecord as reason:
            yield Rejected(str(reason), str(path), line)
        except RecursionError:  # from putting a value into a message
            yield Rejected("nested too deeply", str(path), line)


def _rename(record: Raw, columns: Mapping[str, str]) -> Raw:
    if not columns or not isinstance(record, dict):
        return record
    if missing := [column for column in columns.values() if column not in record]:
        return BadRecord(f"has no column {missing[0]!r:.60} (data.columns)")
    kept = {name: value for name, value in record.items() if name not in columns.values()}
    return kept | {ALIASES.get(name, name): record[column] for name, column in columns.items()}


def _convert(record: Raw, shape: str, function: Any, path: str, line: int, options: ReadOptions) -> Conversation:
    if isinstance(record, BadRecord):
        raise record
    required = SHAPES[shape].required if function is None else ()
    if not isinstance(record, dict) or not all(name in record for name in required):
        found = _names(record) if isinstance(record, dict) else type(record).__name__
        raise BadRecord(f"expected {'the fields ' + ', '.join(required) if required else 'an object'}, found {found}")
    if (label := options.label_field) is not None:  # data for KTO has good and bad answers: only good ones are imitated
        if label not in record:
            raise BadRecord(f"has no field {label!r} (data.label_field)")
        value = str(record[label]).strip().lower()
        if value not in GOOD + BAD:
            raise BadRecord(f"{label}: {value!r:.40} is neither desirable nor undesirable (true/false, 1/0, good/bad)")
        if value in BAD:
            raise BadRecord(UNDESIRABLE)
    fields = {name: _split_field(record, name) for name in options.fields}
    if function is not None:
        record, shape = _call(function, record, f"{path}:{line}: data.format={shape}")
    to_messages = SHAPES[shape].to_messages
    if to_messages is None:
        return Conversation([], nonempty(text_of(record, "text"), "text"), path, line, None, fields)
    try:
        messages = to_messages(record)
        if record.get("system") and "system" in SHAPES[shape].fields:
            messages.insert(0, {"role": "system", "content": text_of(record, "system")})
        tools = _parse_tools(record) if "tools" in SHAPES[shape].fields else None
    except BadRecord:
        raise
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise BadRecord(f"a turn is malformed: {type(error).__name__}: {error}"[:200]) from None
    _check_turns(messages)
    return Conversation(messages, None, path, line, tools, fields)


def _call(function: Callable[..., Any], record: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    try:
        found = function(record)
    except Exception as error:  # the function is the user's program, and so is the mistake
        raise UserError(f"{where}: {type(error).__name__}: {error}") from None
    found = {"messages": found} if isinstance(found, list) else {"text": found} if isinstance(found, str) else found
    for shape in ("messages", "prompt_completion", "text") if isinstance(found, dict) else ():
        if all(name in found for name in SHAPES[shape].required):
            return found, shape
    what = f"the fields {_names(found)}" if isinstance(found, dict) else type(found).__name__
    raise BadRecord(f"data.format: the function returned {what}: expected messages, prompt and completion, or text")


def _split_field(record: dict[str, Any], name: str) -> Any:
    value = record.get(name)
    if value is None or isinstance(value, (list, dict)) or value != value:
        raise BadRecord(f"{name}: {json.dumps(value, default=str):.40} is not a value to split by")
    return value if isinstance(value, (int, float)) else text_of({name: str(value)}, name)


def _check_turns(messages: list[Message]) -> None:
    """Check the order of roles, and drop unanswered messages at the end."""
    for message in messages:
        if message["role"] not in ROLES:
            raise BadRecord(f"unknown role {message['role']!r:.40}: expected one of {', '.join(ROLES)}")
        if message["role"] != "tool" and not message.get("tool_calls"):
            kind = "an assistant message" if message["role"] == "assistant" else f"a {message['role']} message"
            nonempty(message["content"], kind)
    spoken = [message["role"] for message in messages[messages[0]["role"] == "system" :]]
    if "assistant" not in spoken:
        raise BadRecord("no assistant message, so there are no target tokens")
    if spoken[0] != "user":
        raise BadRecord(f"the first message is from the {spoken[0]}: there is no prompt")
    for before, after in itertools.pairwise(spoken):
        if after == "system" or (before == after and after != "tool"):
            raise BadRecord(f"{after} after {before}: turns must alternate")
    while messages[-1]["role"] != "assistant":
        messages.pop()


def _names(record: dict[str, Any]) -> str:
    return repr(", ".join(record))[1:-1][:200]
