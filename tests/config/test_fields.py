"""The description of a field, and how text becomes its value; whole configs: test_settings.py."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from nanoft import UserError
from nanoft.config import fields


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("1e-4", float, 1e-4),
        ("TRUE", bool, True),
        ("none", int | None, None),
        ("auto", int | Literal["auto"], "auto"),
        ("50", int | float | Literal["epoch"], 50),
        ("0.25", int | float | Literal["epoch"], 0.25),
        ("epoch", int | float | Literal["epoch"], "epoch"),
        ("8", Literal[4, 8, 16], 8),
        ("[q_proj, v_proj]", tuple[str, ...], ("q_proj", "v_proj")),
        ("[numeric, regex:a|b]", tuple[str, ...], ("numeric", "regex:a|b")),
        ("0.9 0.95", tuple[float, ...], (0.9, 0.95)),
        ("{a: 1}", dict[str, int], {"a": 1}),
    ],
)
def test_text_becomes_a_value_of_the_type(text: str, hint: Any, value: Any) -> None:
    assert fields.parse("section.field", text, hint) == value


@pytest.mark.parametrize(
    ("text", "hint", "says"),
    [
        ("x", int, "an integer"),
        ("yes", bool, "true or false"),
        ("often", int | float | Literal["epoch"], "an integer .* or one of epoch"),
        ("5", Literal[4, 8], "one of 4, 8"),
        ("{a: 1, a: 2}", dict[str, int], "a mapping .*'a' appears a second time"),
        ("{a: on}", dict[str, Any], "a mapping .*quote it, or write true"),
    ],
)
def test_text_of_another_type_is_refused(text: str, hint: Any, says: str) -> None:
    with pytest.raises(UserError, match=rf"^section\.field: .*{says}"):
        fields.parse("section.field", text, hint)
