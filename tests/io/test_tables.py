"""Durations and tables as people read them."""

from __future__ import annotations

import pytest

from nanoft.io.tables import format_duration, markdown_table, wrap


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.7, "1 h 0 min"),
        (11_400, "3 h 10 min"),
        (360_000, "100 h 0 min"),
    ],
)
def test_a_duration_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_long_lines_are_wrapped_and_long_words_stay_whole() -> None:
    assert wrap("name  ok    " + "word " * 10, 12) == ("name  ok    " + "word " * 10).rstrip()
    lines = wrap("name  ok    " + "word " * 20 + "x" * 90, 12).splitlines()
    assert [len(line) <= 80 for line in lines] == [True, True, False]
    assert all(line.startswith(" " * 12) and line[12] != " " for line in lines[1:])


def test_a_table_is_aligned_markdown() -> None:
    text = markdown_table(["", "base", "tuned"], [["perplexity", "12.3", "4"], ["x", "1", "largest of all"]])
    assert text == (
        "|            | base | tuned          |\n"
        "|------------|------|----------------|\n"
        "| perplexity | 12.3 | 4              |\n"
        "| x          | 1    | largest of all |"
    )
    assert markdown_table(["only"], []) == "| only |\n|------|"
