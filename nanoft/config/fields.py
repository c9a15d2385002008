"""Types of config fields: whether a value fits, and how a string on the command line is read as one."""

from __future__ import annotations

import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import field
from typing import Any, Literal, get_args, get_origin

from nanoft import UserError
from nanoft.io.untrusted import parse_yaml

NAMES = r"[\[(]?[\w.:/-]+([,\s]+[\w.:/-]+)*[\])]?"  # a list of names: q_proj,v_proj; numeric,run:runs/judge


def bounded(default: Any, low: float, high: float = math.inf) -> Any:
    """A dataclass field whose value must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error message about an unknown name: the closest known name, or all of them."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean {prefix}{match[0]}?" if match else f": choose one of {', '.join(known)}"


def parse(key: str, text: str, hint: Any) -> Any:
    """Convert `text` to the type of a field; `none` means no value where the type allows it."""
    options = _options(hint)
    if type(None) in options and text.lower() in ("none", "null", ""):
        return None
    if len(options) > 1 and any(text in get_args(option) for option in options):  # auto, beside numbers
        return text
    kind = next(option for option in options if option is not type(None))
    kind = float if {int, float} <= {*options} and not re.fullmatch(r"[+-]?\d+", text) else kind
    try:
        if get_origin(kind) is Literal:
            return next(choice for choice in get_args(kind) if str(choice) == text)
        if get_origin(kind) is tuple:
            if get_args(kind)[0] is str and not re.fullmatch(NAMES, text):
                if text[:1] + text[-1:] == "[]" and re.search("[<,]", text):  # [<|a|>], [numeric, max_words:9]
                    return tuple(map(str, parse_yaml(text)))
                return (text,) if text else ()  # one regular expression
            return tuple(get_args(kind)[0](part) for part in text.strip("[]()").replace(",", " ").split())
        if get_origin(kind) is dict:
            return parse_yaml(text)  # in its inline form: {instruction: q, response: a}
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (StopIteration, KeyError, ValueError) as error:
        reason = f": {error}" if get_origin(kind) is dict else ""
        raise UserError(f"{key}: {text!r:.100} is not {_describe(hint)}{reason}") from None


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise a UserError if `value` is not of type `hint`."""
    if not any(_fits(value, option) for option in _options(hint)):
        raise UserError(f"{name}: {value!r:.100} is not {_describe(hint)}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if get_origin(kind) in (tuple, list):
        return isinstance(value, get_origin(kind)) and all(_fits(part, get_args(kind)[0]) for part in value)
    if get_origin(kind) is dict:
        fits = isinstance(value, dict) and all(_fits(part, get_args(kind)[1]) for part in value.values())
        return fits and all(isinstance(key, str) for key in value)
    if kind is Any:
        return True
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind and (kind is not int or abs(value) < 2**63)  # bool is not an int here


def _describe(hint: Any) -> str:
    if len(_options(hint)) > 1:
        return " or ".join(_describe(option) for option in _options(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of names" if get_args(hint)[0] is str else "a list of numbers"
    if get_origin(hint) is dict:
        return "a mapping such as {name: value}"
    names = {int: "an integer (64 bits)", float: "a finite number", bool: "true or false", str: "a string"}
    return names.get(hint, "none")
