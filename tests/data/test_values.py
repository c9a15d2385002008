"""Values of a record: texts, JSON in texts, and what tools and arguments may hold."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from nanoft.data.sources import BadRecord
from nanoft.data.values import MAX_DEPTH, as_json, check_value, nonempty, optional_text, text_of


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(("value", "text"), [("x", "x"), (7, "7"), (-0.5, "-0.5"), (1e300, "1e+300")])
def test_numbers_are_texts_as_json_writes_them(value: Any, text: str) -> None:
    assert text_of({"a": value}, "a") == text
    assert isinstance(value, str) or json.loads(text) == value


@pytest.mark.parametrize("value", [True, None, ["x"], {"x": 1}, math.nan, math.inf])
def test_other_values_are_no_texts(value: Any) -> None:
    with pytest.raises(BadRecord, match=r"^a: .* is not a string$"):
        text_of({"a": value}, "a")


@pytest.mark.parametrize(
    ("text", "why"), [("\ud800", "a lone surrogate"), ("x\ufdd0", r"U\+FDD0"), ("\uffff", r"U\+FFFF")]
)
def test_a_text_that_is_not_unicode_is_refused(text: str, why: str) -> None:
    with pytest.raises(BadRecord, match=why):
        text_of({"a": text}, "a")


def test_an_optional_text_may_be_missing_null_or_a_tables_nan() -> None:
    assert [optional_text(fields, "a") for fields in ({}, {"a": None}, {"a": math.nan}, {"a": "x"})] == [
        "",
        "",
        "",
        "x",
    ]


def test_a_text_of_white_space_is_empty() -> None:
    assert nonempty(" x", "it") == " x"
    with pytest.raises(BadRecord, match=r"^it is empty$"):
        nonempty(" \n\t", "it")


def test_json_in_a_text_is_parsed_and_named_if_it_cannot_be() -> None:
    assert as_json('[1, {"a": null}]', "tools") == [1, {"a": None}]
    assert as_json([1], "tools") == [1]
    with pytest.raises(BadRecord, match=r"^tools: "):
        as_json("[1", "tools")


def test_values_that_json_has_not_are_refused_at_any_depth() -> None:
    check_value({"a": [1, None, True, "x", 2.5]}, "tools")
    for bad in (math.nan, math.inf, b"x", {"a": [math.nan]}, {"\ud800": 1}):
        with pytest.raises(BadRecord, match=r"^tools: "):
            check_value(bad, "tools")


def test_nesting_is_limited() -> None:
    check_value(nested(MAX_DEPTH), "tools")
    with pytest.raises(BadRecord, match="nested too deeply"):
        check_value(nested(MAX_DEPTH + 1), "tools")
