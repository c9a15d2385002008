"""report.html: report.md as one self-contained page, light or dark as the browser prefers.

It is converted from report.md (headings, tables, lists, paragraphs and blocks of answers), so both have the same
content. The curves of plots/curves.svg are embedded; the page refers to no other file or address and has no script.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from string import Template

from nanoft.io.atomic import replace_file

PAGE = Template((Path(__file__).parent / "page.html").read_text("utf-8"))
ANSWER = re.compile(r" *(prompt|wanted|base|tuned): (.*)")  # a line of a block of answers
KINDS = {"#": "heading", "|": "table", "-": "list", "!": "picture", "": "space"}  # by the first character of a line


def write(directory: Path) -> Path:
    """Write report.html of a run, from report.md and its curves, if drawn; returns its path."""
    replace_file(path := directory / "report.html", document(directory.resolve().name, report_of(directory)))
    return path


def report_of(directory: Path) -> str:
    """The report of a run as HTML."""
    report, curves = directory / "report.md", directory / "plots" / "curves.svg"
    text = report.read_text("utf-8", errors="replace") if report.is_file() else f"{directory} has no report yet."
    return from_markdown(text, {"plots/curves.png": curves.read_text("utf-8")} if curves.is_file() else {})


def document(title: str, body: str) -> bytes:
    """A page of HTML."""
    return PAGE.substitute(title=escape(title), body=body).encode("utf-8", "backslashreplace")


def from_markdown(text: str, pictures: Mapping[str, str]) -> str:
    """Convert the Markdown of report.md to HTML; `pictures`: path -> SVG."""
    parts = re.split(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)  # every second one is a block of text
    made = ([_block(part)] if number % 2 else _lines(part, pictures) for number, part in enumerate(parts))
    return "\n".join(itertools.chain(*made))


def _lines(text: str, pictures: Mapping[str, str]) -> Iterator[str]:
    joined = re.sub(r"\n  (?=\w)", " ", text)  # what continues an item of a list
    for kind, group in itertools.groupby(joined.splitlines(), lambda line: KINDS.get(line[:1], "paragraph")):
        lines = list(group)
        if kind == "heading":
            level = len(lines[0]) - len(lines[0].lstrip("#"))
            yield f"<h{level}>{escape(lines[0][level:].strip())}</h{level}>"
        elif kind == "table":
            cells = [[_text(c.strip()) for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
            yield table(cells[0], cells[2:])
        elif kind == "list":
            yield "<ul>" + "".join(f"<li>{_text(line[1:].strip())}</li>" for line in lines) + "</ul>"
        elif kind == "picture":
            path = lines[0].partition("(")[2].rstrip(")")
            yield _inline(pictures[path]) if path in pictures else "<p>The curves have not been drawn.</p>"
        elif kind == "paragraph":
            yield f"<p>{'<br>'.join(map(_text, lines))}</p>"


def table(header: list[str], rows: list[list[str]], kind: str = "figures") -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table class="{kind}">\n<tr>{head}</tr>\n{body}</table></div>'


def _block(text: str) -> str:
    """A block of answers as a table, with the answers to a prompt side by side; any other block unchanged."""
    blocks = [[ANSWER.fullmatch(line) for line in block.splitlines()] for block in text.strip("\n").split("\n\n")]
    if not all(match for block in blocks for match in block):
        return f"<pre>{escape(text)}</pre>"
    cells = [[(match[1], escape(match[2])) for match in block if match] for block in blocks]
    return table([name for name, _ in cells[0]], [[text for _, text in row] for row in cells], "answers")


def _text(text: str) -> str:
    """Text in HTML; `**` is kept as bold, and an escaped bar becomes one."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text.replace("\\|", "|")))


def _inline(svg: str) -> str:
    """Embed a picture by matplotlib: without addresses and unused ids, in the page's colors."""
    svg = re.sub(r'<metadata>.*?</metadata>| xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", svg)  # of clip paths and markers
    return svg.replace("#ffffff", "none").replace("#000000", "currentColor").replace("#d9d9d9", "var(--line)")
