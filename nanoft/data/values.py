"""Validate the values of a record: texts, JSON in texts, tools and their arguments; a BadRecord says what is wrong."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

from nanoft.data.sources import NOT_UTF_8, BadRecord, decode_json

MAX_DEPTH = 100  # of lists and objects in tools and their arguments
INVALID = re.compile("[\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")  # lone surrogates and noncharacters


def check_value(value: Any, name: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise BadRecord(f"{name}: nested too deeply")
    if isinstance(value, str):
        text_of({name: value}, name)
    elif isinstance(value, (list, dict)):
        for inner in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
            check_value(inner, name, depth + 1)
    elif value != value or value in (math.inf, -math.inf) or not isinstance(value, (int, float, type(None))):
        raise BadRecord(f"{name}: contains a value of type {type(value).__name__}, which JSON cannot represent")


def as_json(value: Any, name: str) -> Any:
    """A value, parsed if it is a string, since tables and older data sets store lists and objects as JSON strings."""
    if not isinstance(value, str):
        return value
    try:
        return decode_json(value)
    except BadRecord as reason:
        raise BadRecord(f"{name}: {reason}") from None


def text_of(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):  # an int may exceed a float
        return json.dumps(value)
    if not isinstance(value, str):
        raise BadRecord(f"{name}: {json.dumps(value, default=str):.60} is not a string")
    if not value.isascii() and (found := INVALID.search(value)):
        if "\ud800" <= found[0] <= "\udfff":
            raise BadRecord(f"{name}: contains a lone surrogate, or a byte that is not UTF-8: {NOT_UTF_8}")
        raise BadRecord(f"{name}: contains a reserved Unicode noncharacter (U+{ord(found[0]):04X})")
    return value


def optional_text(fields: dict[str, Any], name: str) -> str:
    """A text; empty if the field is missing, null, or a table's NaN."""
    value = fields.get(name)
    return "" if value is None or value != value else text_of(fields, name)


def number_of(fields: dict[str, Any], name: str, setting: str = "") -> float:
    """A finite number, which tables may store as a text; `setting` is the setting that names the field."""
    value = fields.get(name)
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRecord(f"{name}: {value!r:.40} is not a number" + f" ({setting})" * bool(setting))
    return number


def nonempty(text: str, what: str) -> str:
    if not text.strip():
        raise BadRecord(f"{what} is empty")
    return text
