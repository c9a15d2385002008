"""Text for people: durations, wrapped lines and Markdown tables, for the terminal and report.md."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence

LABELED = r"(?!example |event )(warning: |[a-z]+  +)"  # how lines of prose begin; tables and samples begin otherwise


def format_duration(seconds: float) -> str:
    """A duration: 9 s, 2 min 5 s, 3 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def wrap(text: str, indent: int) -> str:
    """Wrap text to 80 columns, all lines but the first indented; a word that is longer stays whole."""
    return textwrap.fill(text, 80, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def for_terminal(text: str, prose: str = LABELED) -> str:
    """The lines that begin with `prose`, wrapped to 80 columns in a terminal; unchanged in a file or a pipe."""
    if not sys.stdout.isatty():
        return text
    return "\n".join(wrap(line, 10) if len(line) > 80 and re.match(prose, line) else line for line in text.split("\n"))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, also readable in a terminal."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
