"""Records to conversations: detect the shape of a file, convert each record, check its turns.

The shape is detected from the first thousand records; where two shapes fit equally well, the user has to choose. With
`data.format=package.module:function` the user's own function converts each record instead: it returns messages, a
prompt and a completion, or text. A record that cannot be used is rejected with its file, line and reason.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.config import DataConfig
from nanoft.config.fields import nearest
from nanoft.config.functions import UNTRUSTED, import_function, is_function
from nanoft.data.formats import ALIASES, ROLES, SHAPES, Conversation, Message, nonempty, parse_tools, text_of
from nanoft.data.sources import BadRecord, Raw, read_raw

DETECT_FROM = 1000  # records from which a file's shape is detected
RETURNED = ("messages", "prompt_completion", "text")  # shapes that the user's own function may return
UNDESIRABLE = "undesirable label"  # the one reason that is not a mistake in the data
DESIRABLE = {"true": True, "1": True, "desirable": True, "chosen": True, "good": True, "yes": True} | {
    "false": False, "0": False, "undesirable": False, "rejected": False, "bad": False, "no": False,
    "1.0": True, "0.0": False,  # from tables with missing values
}  # fmt: skip


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
        fields = tuple(sorted(str(name) for name in wanted))
        return cls(data.format, data.columns, data.delimiter, data.label_field, fields)


def check_format(name: str) -> None:
    """Check data.format against SHAPES.

    Raises:
        UserError: it is neither auto, nor an entry of the table, nor package.module:function.
    """
    if name not in ("auto", *SHAPES) and not is_function(name.removeprefix(UNTRUSTED)):
        names = ("auto", *SHAPES, "package.module:function")
        raise UserError(f"data.format: {name!r:.60} is not known{nearest(name, names)}")


def format_function(name: str) -> Callable[..., Any] | None:
    """The user's own function that data.format names, imported; None if it names a shape.

    Raises:
        UserError: it cannot be imported, or its name comes from a run's config.json.
    """
    check_format(name)
    if name.startswith(UNTRUSTED):
        name = name.removeprefix(UNTRUSTED)
        raise UserError(f"data.format: {name} is code, which config.json cannot name: add data.format={name} again")
    return import_function(name, "data.format", "(record)") if is_function(name) else None


def detect_shape(path: Path, records: list[tuple[int, Raw]]) -> str:
    """The shape whose required fields most records have; `text` only if nothing else fits.

    Raises:
        UserError: no shape fits, or two fit equally well.
    """
    votes = dict.fromkeys(SHAPES, 0)
    for _, record in records:
        if isinstance(record, dict):
            fitting = [name for name, shape in SHAPES.items() if all(field in record for field in shape.required)]
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
    found = f"the fields {_names(first)}" if isinstance(first, dict) else f"no fields: it is a {type(first).__name__}"
    known = "; ".join(f"{name} ({', '.join(shape.required)})" for name, shape in SHAPES.items())
    raise UserError(
        f"{path}: unknown shape: its first record has {found}: map them with data.columns to one of {known}"
    )


def read_file(
    path: Path,
    options: ReadOptions,
    on_progress: Callable[[int], None] = lambda position: None,
    only: Collection[int] | None = None,
) -> Iterator[Conversation | Rejected | str]:
    """All records of a file in order; before them, a description of the shape they are read in.

    Args:
        on_progress: called now and then with the number of bytes read.
        only: lines to convert; None: all. Reading ends with the last of them.
    Raises:
        UserError: the file cannot be read, or the user's own function failed.
    """
    shape, function = options.shape, format_function(options.shape)
    raw = read_raw(path, options.delimiter, on_progress)
    records = ((line, _rename(record, options.columns)) for line, record in raw)
    first = list(itertools.islice(records, DETECT_FROM))
    if function is not None:
        yield shape
    else:
        shape = detect_shape(path, first) if shape == "auto" else shape
        present = {name for _, record in first if isinstance(record, dict) for name in record}
        found = [name for name in SHAPES[shape].fields if name in present]
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
        except _Undesirable:
            yield Rejected(UNDESIRABLE, str(path), line)
        except RecursionError:  # from putting a value into a message
            yield Rejected("nested too deeply", str(path), line)


class _Undesirable(Exception):
    """The record's label says that it must not be learned."""


def _rename(record: Raw, columns: Mapping[str, str]) -> Raw:
    """The record with its columns named as the shapes name them."""
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
    if options.label_field is not None:
        _check_label(record, options.label_field)
    fields = {name: _split_field(record, name) for name in options.fields}
    if function is not None:
        record, shape = _call(function, record, f"{path}:{line}: data.format={shape}")
    to_messages = SHAPES[shape].to_messages
    if to_messages is None:
        return Conversation([], nonempty(text_of(record, "text"), "text"), path, line, None, fields)
    try:
        messages = to_messages(record)
        tools = parse_tools(record) if "tools" in SHAPES[shape].fields else None
    except BadRecord:
        raise
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise BadRecord(f"a turn is malformed: {type(error).__name__}: {error}"[:200]) from None
    _check_turns(messages)
    return Conversation(messages, None, path, line, tools, fields)


def _call(function: Callable[..., Any], record: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """What the user's function makes of a record, and its shape; a list stands for messages, a string for text."""
    try:
        found = function(record)
    except Exception as error:  # the function is the user's program, and so is the mistake
        raise UserError(f"{where}: {type(error).__name__}: {error}") from None
    found = {"messages": found} if isinstance(found, list) else {"text": found} if isinstance(found, str) else found
    for shape in RETURNED if isinstance(found, dict) else ():
        if all(name in found for name in SHAPES[shape].required):
            return found, shape
    what = f"the fields {_names(found)}" if isinstance(found, dict) else type(found).__name__
    raise BadRecord(f"data.format: the function returned {what}: expected messages, prompt and completion, or text")


def _check_label(record: dict[str, Any], name: str) -> None:
    """Data for KTO holds good and bad answers side by side; only the good ones are imitated."""
    if name not in record:
        raise BadRecord(f"has no field {name!r} (data.label_field)")
    value = str(record[name]).strip().lower()
    if value not in DESIRABLE:
        raise BadRecord(f"{name}: {value!r:.40} is neither desirable nor undesirable (true/false, 1/0, good/bad)")
    if not DESIRABLE[value]:
        raise _Undesirable


def _split_field(record: dict[str, Any], name: str) -> Any:
    """A field that the split depends on."""
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
    """The names of its fields, on one line."""
    return repr(", ".join(record))[1:-1][:200]
