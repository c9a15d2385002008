"""The shapes in which data sets write down a conversation, and how each is converted to messages.

Instruction data comes in a few shapes. SHAPES is the table of them: a new shape is one entry, its conversion stands
above. A conversion may assume that the required fields are there; whatever it raises rejects the record.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanoft.data.sources import BadRecord, decode_json

Message = dict[str, Any]
MAX_DEPTH = 100  # of lists and objects in tools and their arguments
ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {"developer": "system", "function": "tool"}  # OpenAI's newer and older names
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
KEPT_FIELDS = ("name", "tool_call_id", "reasoning_content")  # of a message, besides role, content and tool_calls
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

    def first_user_text(self) -> str:
        """The first user message, or the plain text: conversations that begin alike stay on one side of a split."""
        if self.text is not None:
            return self.text
        return next((m["content"] for m in self.messages if m["role"] == "user"), "")

    def prompt(self) -> str:
        """Everything before the first answer."""
        if self.text is not None:
            return self.text
        before = itertools.takewhile(lambda message: message["role"] != "assistant", self.messages)
        return "\n".join(message["content"] for message in before)

    def full_text(self) -> str:
        return "\n".join(m["content"] for m in self.messages) if self.text is None else self.text

    def characters(self) -> int:
        """Characters of all messages together."""
        return len(self.text) if self.text is not None else sum(len(m["content"]) for m in self.messages)


# ---- Raw records to messages


def _messages(record: dict[str, Any]) -> list[Message]:
    """{"messages": [{"role", "content", "tool_calls", "weight", ...}, ...]}, as OpenAI writes it."""
    return [_message(turn) for turn in _list(record, "messages")]


def _message(turn: Any) -> Message:
    role = ROLE_ALIASES.get(turn["role"], turn["role"])
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
            message[name] = text_of(turn, name)
    return {**message, **_training_fields(turn)}


def _training_fields(turn: dict[str, Any]) -> dict[str, Any]:
    """`weight` and `train`: whether a message is a target."""
    found = {name: turn[name] for name in ("weight", "train") if turn.get(name) is not None}
    if found.get("weight", 1) not in (0, 1) or not isinstance(found.get("train", True), bool):
        raise BadRecord(f"weight must be 0 or 1, and train true or false: found {found!r:.60}")
    return found


def _content(value: Any, optional: bool = False) -> str:
    """A text, or OpenAI's list of content parts if all are text."""
    if value is None and optional:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        kinds = {part.get("type") or "text" for part in value} - {"text"}
        if kinds:
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
        return [*_system(record), *_messages({"messages": turns})]
    unknown = [turn["from"] for turn in turns if turn["from"] not in SHAREGPT_ROLES]
    if unknown:
        raise BadRecord(f"unknown speaker {unknown[0]!r:.40}")
    return [*_system(record), *(_sharegpt_turn(turn) for turn in turns)]


def _sharegpt_turn(turn: dict[str, Any]) -> Message:
    value, role = text_of(turn, "value"), SHAREGPT_ROLES[turn["from"]]
    if turn["from"] == "function_call":
        calls = _as_json(value, "function_call")
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": role, "content": "", "tool_calls": [_tool_call(c) for c in calls], **_training_fields(turn)}
    return {"role": role, "content": value, **_training_fields(turn)}


def _alpaca(record: dict[str, Any]) -> list[Message]:
    """{"instruction", "input" (may be empty), "output", "system", "history": [[question, answer], ...] (optional)}."""
    question = text_of(record, "instruction")
    if record.get("input"):
        question = f"{question}\n\n{text_of(record, 'input')}"
    earlier = _as_json(record.get("history") or [], "history")
    if not isinstance(earlier, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        raise BadRecord("history is not a list of [question, answer] pairs")
    turns = [_exchange(_content(asked), _content(answered)) for asked, answered in earlier]
    return [*_system(record), *itertools.chain(*turns), *_exchange(question, text_of(record, "output"))]


def _pair(record: dict[str, Any]) -> list[Message]:
    """{"prompt", "completion"}, both texts or both lists of messages."""
    if isinstance(record["prompt"], list) and isinstance(record["completion"], list):
        turns = [_message(turn) for name in ("prompt", "completion") for turn in _list(record, name)]
        return [*_system(record), *turns]
    return [*_system(record), *_exchange(text_of(record, "prompt"), text_of(record, "completion"))]


def _question_answer(record: dict[str, Any]) -> list[Message]:
    """{"question", "answer", "context" (optional)}."""
    context = f"{text_of(record, 'context')}\n\n" if record.get("context") else ""
    return [*_system(record), *_exchange(context + text_of(record, "question"), text_of(record, "answer"))]


def _summarization(record: dict[str, Any]) -> list[Message]:
    """{"document", "summary"}."""
    question = f"Summarize the following text.\n\n{text_of(record, 'document')}"
    return [*_system(record), *_exchange(question, text_of(record, "summary"))]


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
    return [{"role": "system", "content": text_of(record, "system")}] if record.get("system") else []


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class Shape:
    """One way to write down a conversation."""

    required: tuple[str, ...]  # fields that every record has; `auto` detects the shape by them
    fields: tuple[str, ...]  # all fields that are read, in the order in which they are shown
    to_messages: Callable[[dict[str, Any]], list[Message]] | None  # None: plain text
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of fields in data.columns


SHAPES = {
    "messages": Shape(("messages",), ("messages", "tools"), _messages),
    "sharegpt": Shape(("conversations",), ("system", "conversations", "tools"), _sharegpt),
    "alpaca": Shape(
        ("instruction", "output"),
        ("system", "history", "instruction", "input", "output"),
        _alpaca,
        aliases={"response": "output"},
    ),
    "prompt_completion": Shape(("prompt", "completion"), ("system", "prompt", "completion", "tools"), _pair),
    "question_answer": Shape(("question", "answer"), ("system", "context", "question", "answer"), _question_answer),
    "summarization": Shape(("document", "summary"), ("system", "document", "summary"), _summarization),
    "extractive_qa": Shape(
        ("context", "question", "answers"), ("system", "context", "question", "answers"), _extractive_qa
    ),
    "text": Shape(("text",), ("text",), None),
}
ALIASES = {alias: name for shape in SHAPES.values() for alias, name in shape.aliases.items()}


def parse_tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = _as_json(record.get("tools") or None, "tools")
    if not tools:
        return None
    functions = [tool.get("function", tool) for tool in tools] if isinstance(tools, list) else [{}]
    if not all(isinstance(function.get("name"), str) for function in functions):
        raise BadRecord("tools: expected a list of functions with names")
    _check_value(tools, "tools")
    return tools


def _check_value(value: Any, name: str, depth: int = 0) -> None:
    """Check every text in lists and objects, to a bounded depth."""
    if depth > MAX_DEPTH:
        raise BadRecord(f"{name}: nested too deeply")
    if isinstance(value, str):
        text_of({name: value}, name)
    elif isinstance(value, (list, dict)):
        for inner in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
            _check_value(inner, name, depth + 1)
    elif not isinstance(value, (int, float, type(None))):
        raise BadRecord(f"{name}: has a {type(value).__name__}, which is not JSON")


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = _as_json(record[name], name)
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{name} is not a list of turns")
    return value


def _as_json(value: Any, name: str) -> Any:
    """A value, or the JSON in a string: tables and older data sets store lists and objects so."""
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
