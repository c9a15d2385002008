"""Convert records to conversations: record shapes, their conversions, and validation of the turns.

SHAPES is the table of shapes: a new shape is an entry there, with its conversion above the table. A conversion may
assume that the required fields exist; a BadRecord, TypeError, AttributeError, ValueError or LookupError rejects the
record, with its file, line and reason. The shape is detected from the first thousand records (`detection.py`). ROLES
has the names of roles. With `data.format=package.module:function`, a function of the user converts each record instead.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from nanoft import UserError
from nanoft.config import DataConfig
from nanoft.config.fields import nearest
from nanoft.config.functions import UNTRUSTED, import_function, is_function
from nanoft.data import preferences
from nanoft.data.detection import Shape, detect_shape, names_of, normalized_name, require_label_choice
from nanoft.data.preferences import PAIR_SHAPES, UNDESIRABLE, Skipped, is_desirable
from nanoft.data.sources import BadRecord, Raw, read_raw
from nanoft.data.values import as_json, check_value, nonempty, number_of, optional_text, text_of

Message = dict[str, Any]
DETECT_FROM = 1000  # records from which a file's shape is detected
# Role -> its other names. Names are compared in lower case, with _ for spaces and hyphens.
ROLES = {
    "system": ("developer",),
    "user": ("human", "prompter"),
    "assistant": ("gpt", "chatgpt", "bing", "bard", "ai", "model", "bot", "chatbot"),
    "tool": ("function", "observation", "ipython", "tool_response", "tool_result", "function_response"),
    "function_call": ("tool_call",),  # of the assistant: its text is the call, or a list of calls, as JSON
}
ROLE_OF = {other: role for role, names in ROLES.items() for other in (role, *names)}
TURN_KEYS = {"from": "role", "value": "content"}  # ShareGPT's
TRAINING_FIELDS = ("weight", "train", "training", "loss")  # fields of a message that say whether it is a target
# Other fields of a message: name in the data -> name here.
KEPT_FIELDS = {
    **{name: name for name in ("name", "tool_call_id")},
    **dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "reasoning_content"),
}
KNOWN_FIELDS = {"role", "content", "tool_calls", "function_call", *KEPT_FIELDS, *TRAINING_FIELDS}
UNUSED = "unused fields"  # temporary key of a message during conversion
TEMPLATE_ARGS = "chat_template_kwargs"  # field of a record: variables for the chat template, as in TRL
RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}  # template variables that nanoft sets
RESERVED |= {"bos_token", "eos_token", "pad_token", "unk_token"}
JSON_TURNS = re.compile(r"""\s*\[\s*{\s*['"](?:role|content|from|value)['"]""")  # a list of turns, stored as a text
MALFORMED = "malformed"
# What an objective learns from: answers, pairs of answers, labeled answers, or sampled answers to prompts.
Learns = Literal["turns", "pairs", "labels", "prompts"]
# Fields with the reference answer that rewards compare with; the first one present is used.
REFERENCES = ("answer", "solution", "reference", "reference_answer", "ground_truth", "target")
SORTED = json.JSONEncoder(sort_keys=True)  # made once, since making it takes as long as encoding a record
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")  # except white space (tab, newline, form feed, ...)


@dataclass(frozen=True)
class Conversation:
    """One record: messages or a plain text, the tools offered to the model, and its place in the file."""

    messages: list[Message]
    text: str | None
    file: str
    line: int  # from 1; in a JSON array or a Parquet file, the record's number
    tools: list[dict[str, Any]] | None = None
    fields: dict[str, Any] = field(default_factory=dict)  # of the record: those that the split needs; for rewards, all
    prompt_characters: int = 0  # length of the text's prompt, which is not a target
    template_args: dict[str, Any] = field(default_factory=dict)  # variables for the chat template
    notes: tuple[str, ...] = ()  # warnings about fields without effect
    worse: tuple[list[Message], ...] = ()  # the same prompt with worse answers
    label: float = 1.0  # 1: the answer is desirable, 0: it is not; of a pair: the margin of the better answer
    answer_at: int = -1  # the message where the answer begins, from which `worse` differs

    @property
    def versions(self) -> tuple[list[Message], ...]:
        return (self.messages, *self.worse)

    @functools.cached_property
    def content_hash(self) -> int:
        """Of text, messages and tools, 64 bits; 10^6 different records collide with a probability of 3 in 10^8."""
        content = SORTED.encode([self.text, *self.versions, self.tools, self.label])
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")

    def full_text(self, system: bool = True) -> str:
        """All texts, with or without system messages, which whole data sets share."""
        every = itertools.chain(*self.versions)
        return self.text or "\n".join(m["content"] for m in every if system or m["role"] != "system")

    def characters(self) -> int:
        return len(self.text or "") + sum(len(m["content"]) for m in itertools.chain(*self.versions))

    def answers(self) -> list[str]:
        """What the assistant says, or the plain text without its prompt."""
        said = [message["content"] for message in self.messages if message["role"] == "assistant"]
        return said if self.text is None else [self.text[self.prompt_characters :]]

    def prompt(self, system: bool = True) -> str:
        """Everything before the last answer, or the plain text; conversations are compared by it."""
        before = (m for m in self.messages[: self.answer_at] if system or m["role"] != "system")
        said = (m["content"] + (json.dumps(m["tool_calls"]) if "tool_calls" in m else "") for m in before)
        return (self.text or "")[: self.prompt_characters or None] or "\n".join(said)


def turns_of(record: dict[str, Any], name: str, roles: Mapping[str, str]) -> list[Message] | str:
    """[{"role", "content", "tool_calls", "weight", ...}, ...], OpenAI's form; a prompt may also be a text."""
    value = record[name]
    may_be_text = name in ("prompt", "completion", "chosen", "rejected") and not isinstance(value, (list, dict))
    if may_be_text and not JSON_TURNS.match(text := text_of(record, name)):
        return text
    turns = [value] if isinstance(value, dict) and name != "messages" else as_json(value, name)
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"{name} is not a list of turns")
    return [_message(turn, name, roles) for turn in turns]


def _message(turn: Any, name: str, roles: Mapping[str, str]) -> Message:
    """ShareGPT's {"from": "Human", "value": "Q"} becomes {"role": "user", "content": "Q"}."""
    if not isinstance(turn, dict):
        raise BadRecord(f"{name}: a turn needs a role and content, found {json.dumps(turn, default=str):.40}")
    turn = dict(turn)
    for other, key in TURN_KEYS.items():
        if key not in turn and other in turn:
            turn[key] = turn.pop(other)
    calls = as_json(turn.get("tool_calls") or None, "tool_calls")
    if turn.get("function_call"):  # OpenAI's older field for a single call
        if calls:
            raise BadRecord(f"{name}: a turn has tool_calls and function_call: keep one of them")
        calls = [as_json(turn["function_call"], "function_call")]
    if missing := [key for key in TURN_KEYS.values() if key not in turn and not (calls and key == "content")]:
        raise BadRecord(f"{name}: a turn has no {missing[0]}: its fields are {names_of(turn)}")
    given, said = turn["role"], turn.get("content")
    if not isinstance(given, str):
        raise BadRecord(f"{name}: the role {json.dumps(given, default=str):.40} is not a string")
    role = roles.get(given) or ROLE_OF.get(given) or ROLE_OF.get(normalized_name(given))
    if role is None:
        fix = " or ".join(f"data.roles='{{{given!s:.40}: {role}}}'" for role in ("user", "assistant"))
        raise BadRecord(f"unknown role {given!r:.40}: set {fix} (or {', '.join(ROLES)})")
    if role == "function_call":
        role, said, found = "assistant", None, as_json(said, "function_call")
        calls = found if isinstance(found, list) else [found]
    message: Message = {"role": role, "content": "" if calls and said is None else _content(said, role)}
    if calls:
        if role != "assistant":
            raise BadRecord(f"tool_calls: {role!r:.40} cannot call tools: only the assistant can")
        message["tool_calls"] = [_tool_call(call) for call in calls]
    return message | _other_fields(turn)


def _other_fields(turn: dict[str, Any]) -> dict[str, Any]:
    """The fields of a message besides its content; UNUSED lists the names of unknown ones."""
    if turn.keys() <= {"role", "content"}:
        return {}
    kept: dict[str, Any] = {}
    for name, standard in KEPT_FIELDS.items():
        if turn.get(name) is not None and kept.setdefault(standard, text_of(turn, name)) != text_of(turn, name):
            raise BadRecord(f"{name} and {standard} differ: keep one of them")
    found = {name: turn[name] for name in TRAINING_FIELDS if turn.get(name) is not None}
    if any(value not in (0, 1) for value in found.values()) or len({bool(value) for value in found.values()}) > 1:
        rule = "weight must be 0 or 1, train must be true or false, and they must not contradict each other"
        raise BadRecord(f"{rule}: found {found!r:.60}")
    trained = {name if name == "weight" else "train": value for name, value in found.items()}
    unused = [name for name in turn if name not in KNOWN_FIELDS and turn[name] not in (None, "", [], {})]
    return kept | trained | ({UNUSED: unused} if unused else {})


def _content(value: Any, role: str = "") -> str:
    """The content as a text: of a list of parts, their texts; of a tool's result, JSON."""
    is_parts = isinstance(value, list) and all(isinstance(part, dict) for part in value)
    is_text = is_parts and value and all("text" in part for part in value)
    if role == "tool" and isinstance(value, (dict, list)) and not is_text:
        check_value(value, "content")
        return json.dumps(value, ensure_ascii=False)
    for part in value if is_parts else ():
        if (kind := part.get("type") or "text") != "text":
            raise BadRecord(f"content: has a part of type {kind!r:.40}: only text is supported")
        if "text" not in part:
            raise BadRecord(f"content: a part has no text: its fields are {names_of(part)}")
    return "".join(text_of(part, "text") for part in value) if is_parts else text_of({"content": value}, "content")


def _tool_call(call: Any) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments"}}; arguments given as a JSON string are parsed."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise BadRecord(f"tool_calls: {json.dumps(call, default=str):.60} is not a function call with a name")
    arguments = as_json(function.get("arguments") or {}, "arguments")
    if not isinstance(arguments, dict):
        raise BadRecord(f"tool_calls: arguments {arguments!r:.40} are not a JSON object")
    check_value(arguments, "arguments")
    inner = {"name": nonempty(text_of(function, "name"), "a tool's name"), "arguments": arguments}
    return {**({"id": text_of(call, "id")} if call.get("id") else {}), "type": "function", "function": inner}


def _alpaca(record: dict[str, Any]) -> list[Message]:
    """{"instruction", "input" (may be empty), "output", "system", "history": [[question, answer], ...] (optional)}."""
    asked = "\n\n".join(filter(str.strip, (optional_text(record, "instruction"), optional_text(record, "input"))))
    earlier = as_json(record.get("history") or [], "history")
    if not isinstance(earlier, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        raise BadRecord("history is not a list of [question, answer] pairs")
    turns = [_exchange(_content(question), _content(answer)) for question, answer in earlier]
    return [*itertools.chain(*turns), *_exchange(asked, text_of(record, "output"))]


def _pair(record: dict[str, Any]) -> list[Message]:
    """{"prompt", "completion"}: texts or lists of messages; only those of the completion are targets."""
    asked, answered = record["prompt"], record["completion"]
    before = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    after = [{"role": "assistant", "content": answered}] if isinstance(answered, str) else answered
    return [*({**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in before), *after]


def _question_answer(record: dict[str, Any]) -> list[Message]:
    """{"question", "answer", "context" (optional)}."""
    context = optional_text(record, "context")
    return _exchange(f"{context}\n\n" * bool(context) + text_of(record, "question"), text_of(record, "answer"))


def _summarization(record: dict[str, Any]) -> list[Message]:
    """{"document", "summary"}."""
    return _exchange(f"Summarize the following text.\n\n{text_of(record, 'document')}", text_of(record, "summary"))


def _squad(record: dict[str, Any]) -> list[Message]:
    """{"context", "question", "answers": {"text": [...], ...} | [...]}, SQuAD's form; the first answer is used."""
    answers = as_json(record["answers"], "answers")
    answers = answers["text"] if isinstance(answers, dict) else answers
    first = answers[0] if isinstance(answers, list) and answers else answers
    if not first:
        raise BadRecord("answers: is empty")
    return _question_answer({**record, "answer": first["text"] if isinstance(first, dict) else first})


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _prompt(record: dict[str, Any]) -> list[Message]:
    """{"prompt": a text or messages, any of REFERENCES, other fields for rewards}; the reference may be missing."""
    return _pair({**record, "completion": _reference(record)})


def _reference(record: dict[str, Any]) -> str:
    """The reference answer of a prompt's record: a text, another value as JSON, or empty."""
    found = next((record[name] for name in REFERENCES if record.get(name) not in (None, "")), "")
    return json.dumps(found) if isinstance(found, bool) else _content(found, "tool")


SHAPES = {
    "messages": Shape(("messages",), ("messages", "tools"), itemgetter("messages")),
    "sharegpt": Shape(("conversations",), ("system", "conversations", "tools"), itemgetter("conversations")),
    "alpaca": Shape(("instruction", "output"), ("system", "history", "instruction", "input", "output"), _alpaca),
    "prompt_completion": Shape(("prompt", "completion"), ("system", "prompt", "completion", "tools"), _pair),
    "question_answer": Shape(("question", "answer"), ("system", "context", "question", "answer"), _question_answer),
    "summarization": Shape(("document", "summary"), ("system", "document", "summary"), _summarization),
    "extractive_qa": Shape(("context", "question", "answers"), ("system", "context", "question", "answers"), _squad),
    "raw_prompt_completion": Shape(("prompt", "completion"), ("prompt", "completion"), None),  # without a chat template
    "text": Shape(("text",), ("text",), None),
}
TURNS = (*preferences.TURNS, "completion", "chosen", "rejected")  # fields that hold lists of turns
CHATS = {name: shape for name, shape in SHAPES.items() if shape.to_messages}
SHAPES_OF: dict[Learns, dict[str, Shape]] = {  # shapes that an objective can learn from
    "turns": SHAPES,
    "pairs": PAIR_SHAPES,
    "labels": PAIR_SHAPES | CHATS,
    "prompts": CHATS | {"prompt": Shape(("prompt",), ("system", "prompt", "tools"), _prompt)},
}


def parse_tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that are offered: `tools`, or OpenAI's older `functions`."""
    tools = as_json(record.get("tools") or record.get("functions") or None, "tools")
    if not tools:
        return None
    tools = [as_json(tool, "tools") for tool in tools] if isinstance(tools, list) else tools
    is_list = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    functions = [tool.get("function", tool) for tool in tools] if is_list else [{}]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise BadRecord("tools: expected a list of functions with names")
    check_value(tools, "tools")
    return tools if record.get("tools") else [{"type": "function", "function": function} for function in functions]


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used, and its place in the file."""

    reason: str
    file: str
    line: int
    kind: str = MALFORMED  # its category in the report


def check_format(name: str, learns: Learns = "turns") -> None:
    """Raise a UserError if data.format is not auto, a known shape or package.module:function."""
    names = ("auto", *SHAPES_OF[learns], "package.module:function")
    if name not in names[:-1] and not is_function(name.removeprefix(UNTRUSTED)):
        raise UserError(f"data.format: {name!r:.60} is not known{nearest(name, names)}")


def format_function(name: str) -> Callable[..., Any] | None:
    """Import the user's function that data.format names; None if it names a shape."""
    if name.startswith(UNTRUSTED):
        name = name.removeprefix(UNTRUSTED)
        raise UserError(f"data.format: {name}: a run's config.json must not name code to run: add data.format={name}")
    return import_function(name, "data.format", "(record)") if is_function(name) else None


def read_file(
    path: Path,
    data: DataConfig,
    on_progress: Callable[[int], None] = lambda position: None,  # called now and then with the number of bytes read
    only: Collection[int] | None = None,  # lines to convert; None: all
    learns: Learns = "turns",
) -> Iterator[Conversation | Rejected | str]:
    """Yield a description of the shape of a file's records, and then all records in order."""
    check_format(data.format, learns)
    if odd := [role for role in data.roles.values() if role not in ROLES]:
        raise UserError(f"data.roles: {odd[0]!r:.40} is not a role{nearest(str(odd[0]), ROLES)}")
    function, columns, shapes = format_function(data.format), data.columns, SHAPES_OF[learns]
    raw = read_raw(path, data.delimiter, on_progress)
    records = ((line, _rename(record, columns)) for line, record in raw)
    first = list(itertools.islice(records, DETECT_FROM))
    shape, found = data.format, dict[str, str]()  # field -> column
    if function is None:
        others = {name: other for known in SHAPES_OF.values() for name, other in known.items() if name not in shapes}
        shape, found = detect_shape(path, shapes, shape, first, others)
        if learns == "turns" and data.label_field is None and shape != "text":
            require_label_choice(path, first)
        for name in sorted({*columns} - {*shapes[shape].fields}):  # others may be a field of the split, or unused
            if "did you mean" in (near := nearest(name, shapes[shape].fields)):
                raise UserError(f"data.columns: {name!r:.60} is not a field of {shape}{near}")
    said = [name if name == column else f"{name} ({column})" for name, column in found.items()]
    yield shape if said in ([shape], []) else f"{shape}: {', '.join(said)}"
    last = max(only, default=0) if only is not None else math.inf
    for line, record in itertools.chain(first, records):
        if line > last:
            return
        if only is not None and line not in only:
            continue
        try:
            if isinstance(record, dict):
                record = record | {name: record[column] for name, column in found.items() if column in record}
            yield convert(record, shape, function, str(path), line, data, learns)
        except BadRecord as reason:
            yield Rejected(str(reason), str(path), line, reason.kind if isinstance(reason, Skipped) else MALFORMED)
        except RecursionError:  # from formatting a value for a message
            yield Rejected("nested too deeply", str(path), line)


def _rename(record: Raw, columns: Mapping[str, str]) -> Raw:
    if not columns or not isinstance(record, dict):
        return record
    if missing := [column for column in columns.values() if column not in record]:
        return BadRecord(f"has no column {missing[0]!r:.60} (data.columns)")
    kept = {name: value for name, value in record.items() if name not in columns.values()}
    return kept | {name: record[column] for name, column in columns.items()}


def convert(
    record: Raw, shape: str, function: Any, path: str, line: int, data: DataConfig, learns: Learns
) -> Conversation:
    """A record of a shape, read from a place; a BadRecord if it does not have this shape."""
    if isinstance(record, BadRecord):
        raise record
    shapes = SHAPES_OF[learns]
    required = shapes[shape].required if function is None else ()
    if not isinstance(record, dict) or not all(name in record for name in required):
        found = names_of(record) if isinstance(record, dict) else type(record).__name__
        raise BadRecord(f"expected {'the fields ' + ', '.join(required) if required else 'an object'}, found {found}")
    if learns == "turns" and data.label_field not in (None, "ignore") and not is_desirable(record, data.label_field):
        raise Skipped(UNDESIRABLE)
    if limit := data.score_limit:
        name, least = limit
        if (score := number_of(record, name, "data.min_score")) < least:
            raise Skipped("below data.min_score", f"{name}: {score:g} is below data.min_score={least:g}")
    read, label = record, 1.0
    if function is not None:
        record, shape = _call(function, record, f"{path}:{line}: data.format={shape}", learns)
    required, to_messages, is_compared = shapes[shape].required, shapes[shape].to_messages, shape in PAIR_SHAPES
    if learns == "labels" and not is_compared:
        label = float(is_desirable(read | record, data.label_field))
    elif learns == "pairs":  # the margin of the better answer
        label = number_of(read | record, data.margin_field) if data.margin_field else 0.0
    split_by = (data.stratify_field, data.split_group, data.split_time)
    fields = {name: _split_field(read, name) for name in split_by if name not in (None, "length")}
    fields = {**read, **fields} if learns == "prompts" else fields
    if learns != "turns" and any(record[name] in (None, "", []) for name in required):
        raise Skipped(preferences.EMPTY)
    if to_messages is None:
        *before, learned = [text_of(record, name) for name in required]
        text = "".join(before) + nonempty(learned, required[-1])
        return Conversation([], text, path, line, None, fields, sum(map(len, before)))
    try:
        fields_read = shapes[shape].fields
        record = preferences.one_prompt(record) if is_compared else record
        given = [name for name in fields_read if name in TURNS and (name in required or record.get(name))]
        record = record | {name: turns_of(record, name, data.roles) for name in given}
        versions = to_messages(record) if is_compared else [to_messages(record)]
        if learns == "prompts" and versions[0][-1]["role"] != "assistant":  # messages that end with the question
            versions = [_pair({"prompt": versions[0], "completion": _reference(read | record)})]
        said = (turns[-1]["content"].strip() or turns[-1].get("tool_calls") for turns in versions)
        if learns in ("pairs", "labels") and not all(said):
            raise Skipped(preferences.EMPTY)
        if "system" in fields_read and (system := optional_text(record, "system")):
            versions = [[{"role": "system", "content": system}, *messages] for messages in versions]
        tools = parse_tools(record) if "tools" in fields_read else None
    except (TypeError, AttributeError, ValueError, LookupError):
        raise BadRecord(f"does not have the form of {shape} (docs/data.md)") from None
    template_args = as_json(record.get(TEMPLATE_ARGS) or {}, TEMPLATE_ARGS)
    if not isinstance(template_args, dict) or RESERVED & template_args.keys():
        raise BadRecord(f"{TEMPLATE_ARGS}: must be an object without {', '.join(sorted(RESERVED))}")
    check_value(template_args, TEMPLATE_ARGS)
    for messages in versions:
        _check_turns(messages, may_be_empty=learns == "prompts")
    unused = dict.fromkeys(name for messages in versions for message in messages for name in message.pop(UNUSED, ()))
    notes = tuple(f"the field {name!r:.60} of a message is not used" for name in unused)
    is_single = learns in ("labels", "prompts") and not is_compared
    best, *worse = [preferences.last_answer(versions[0])] if is_single else versions
    is_answer = (m["role"] == "assistant" and is_trained(m) for m in best)
    answer_at = next(itertools.compress(itertools.count(), is_answer), -1) if learns != "turns" else -1
    return Conversation(best, None, path, line, tools, fields, 0, template_args, notes, tuple(worse), label, answer_at)


def _call(
    function: Callable[..., Any], record: dict[str, Any], where: str, learns: Learns
) -> tuple[dict[str, Any], str]:
    try:
        found = function(record)
    except Exception as error:  # a mistake in the user's own function
        raise UserError(f"{where}: {type(error).__name__}: {error}") from None
    found = {"messages": found} if isinstance(found, list) else {"text": found} if isinstance(found, str) else found
    for name, shape in SHAPES_OF[learns].items() if isinstance(found, dict) else ():
        if found.keys() >= {*shape.required}:
            return found, name
    what = f"the fields {names_of(found)}" if isinstance(found, dict) else type(found).__name__
    raise BadRecord(f"data.format: the function returned {what}: return the fields of a shape (docs/data.md)")


def _split_field(record: dict[str, Any], name: str) -> Any:
    value = record.get(name)
    if value is None or isinstance(value, (list, dict)) or value != value:
        raise BadRecord(f"{name}: {json.dumps(value, default=str):.40} cannot be used to split the data")
    return value if isinstance(value, (int, float)) else text_of({name: str(value)}, name)


def _check_turns(messages: list[Message], may_be_empty: bool) -> None:
    """Check the roles, and drop unanswered messages at the end; the chat template checks the order of turns."""
    for message in messages:
        is_answer = message["role"] == "assistant" and not message.get("tool_calls") and is_trained(message)
        is_answer = is_answer and not may_be_empty
        if is_answer or message["role"] == "user":
            nonempty(message["content"], "an assistant message" if is_answer else "a user message")
    if all(message["role"] != "assistant" for message in messages):
        raise BadRecord("no assistant message, so there are no target tokens")
    while messages[-1]["role"] != "assistant":
        messages.pop()
    if all(message["role"] != "user" for message in messages):
        raise BadRecord(f"the first message is from the {messages[0]['role']}: there is no prompt")


def is_trained(message: Message) -> bool:
    """Whether a message may be a target, by OpenAI's field `weight` and axolotl's `train`."""
    return bool(message.get("train", True)) and message.get("weight", 1) != 0
