"""The pictures of the README: the terminal and the curves of the demo, from a run that this script starts.

    python docs/pictures/demo.py [DIRECTORY] [section.field=value ...]

It runs `python train.py configs/tiny.py` in a terminal of 100 columns, keeps what stands on the screen afterwards, and
writes terminal.svg and curves.svg beside this script, or into the directory. Settings are passed on. Speeds and times
are those of the machine, so the files differ from run to run.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMAND = "python train.py configs/tiny.py"
COLUMNS = 100
WIDTH, HEIGHT, MARGIN = 8.4, 18, 18  # of a cell, in pixels at a font size of 14
COLORS = {"": "#e6edf3", "32": "#7ee787", "2": "#8b949e"}  # of the SGR codes that nanoft prints
BUTTONS = ("#ff5f57", "#febc2e", "#28c840")
ESCAPE = re.compile(r"\x1b\[([\d;]*)([A-Za-z])")
Cell = tuple[str, str]  # a letter, and its SGR code
# Of the lines on the screen, those of these topics are shown, by their first word; an indented line belongs to the one
# above it. Of steps the first and the last are shown, of tables the last, of samples the first.
SHOWN = {"data", "device", "model", "training", "example", "plan", "verdict", "answers", "result"}


def run_in_terminal(words: list[str], directory: Path) -> str:
    """What a program writes to a terminal of COLUMNS columns; it starts with an empty cache."""
    fresh = {**os.environ, "XDG_CACHE_HOME": str(directory / "cache")}
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    with subprocess.Popen(words, cwd=directory, env=fresh, stdin=writer, stdout=writer, stderr=writer) as program:
        os.close(writer)
        written = bytearray()
        while True:
            try:
                part = os.read(reader, 65536)
            except OSError:  # the program has closed its end
                part = b""
            if not part:
                break
            written += part
    os.close(reader)
    if program.returncode:
        raise SystemExit(written.decode(errors="replace"))
    return written.decode()


def screen(written: str) -> list[list[Cell]]:
    """The lines that remain on a screen: a carriage return overwrites, ESC[A goes up, ESC[K erases."""
    lines: list[list[Cell]] = [[]]
    row = column = at = 0
    style = ""
    while at < len(written):
        if found := ESCAPE.match(written, at):
            count, code = found.groups()
            at = found.end()
            if code == "A":
                row = max(0, row - int(count or 1))
            elif code == "K":
                del lines[row][column:]
            elif code == "m":
                style = "" if count in ("", "0") else count
            continue
        letter = written[at]
        at += 1
        if letter == "\n":
            row += 1
            lines += [[]] * (row == len(lines))
            lines[row] = list(lines[row])
        elif letter == "\r":
            column = 0
        else:
            line = lines[row]
            line += [(" ", "")] * (column + 1 - len(line))
            line[column] = (letter, style)
            column += 1
    return lines


def text_of(line: list[Cell]) -> str:
    return "".join(letter for letter, _ in line).rstrip()


def selected(lines: list[list[Cell]]) -> list[list[Cell]]:
    """The lines that the picture shows, cut at the edge of the screen; what is left out becomes one line with dots."""
    blocks: list[tuple[str, list[list[Cell]]]] = []  # of lines with the same topic, one below the other
    for line in lines:
        text = text_of(line)
        begins = re.match(r"[|]|\S+| prompt", text)
        topic = begins[0].strip() if begins else ""
        if blocks and (not topic or (topic == blocks[-1][0] and topic not in ("step", "prompt"))):
            blocks[-1][1].append(line)
        else:
            blocks.append((topic, [line]))
    of = {name: [at for at, (topic, _) in enumerate(blocks) if topic == name] for name in ("|", "step", "prompt")}
    chosen = {*of["|"][-1:], *of["step"][:1], *of["step"][-1:], *of["prompt"][:1]}
    dots, found = [("⋮", "2")], list[list[Cell]]()
    for at, (topic, block) in enumerate(blocks):
        if topic in SHOWN or at in chosen:
            block = block[:3] if topic == "training" else block  # of the modules a few
            found += [line[start : start + COLUMNS] for line in block for start in range(0, len(line) or 1, COLUMNS)]
        elif found[-1:] != [dots]:
            found.append(dots)
    while found and not text_of(found[-1]):
        found.pop()
    return found


def draw(lines: list[list[Cell]]) -> str:
    """An SVG of a terminal; each word group has a fixed length, whatever the viewer's font."""
    wide, high = round(COLUMNS * WIDTH + 2 * MARGIN), len(lines) * HEIGHT + 2 * MARGIN + 22
    fonts = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}">',
        f'<rect width="{wide}" height="{high}" rx="8" fill="#0d1117" stroke="#30363d"/>',
        *(f'<circle cx="{20 + 18 * n}" cy="18" r="5.5" fill="{color}"/>' for n, color in enumerate(BUTTONS)),
        f'<g font-family="{fonts}" font-size="14">',
    ]
    for row, line in enumerate(lines):
        y = MARGIN + 22 + row * HEIGHT + 13
        for start, end in stretches(line):
            said, style = "".join(letter for letter, _ in line[start:end]), line[start][1]
            place = f'x="{MARGIN + start * WIDTH:.1f}" y="{y}" textLength="{(end - start) * WIDTH:.1f}"'
            color = COLORS.get(style, COLORS[""])
            parts.append(f'<text {place} fill="{color}">{escape(said)}</text>')
    return "\n".join([*parts, "</g>", "</svg>"]) + "\n"


def stretches(line: list[Cell]) -> list[tuple[int, int]]:
    """Where the texts of a line start and end: of one color each, without two spaces in a row."""
    found = []
    for match in re.finditer(r"\S+( \S+)*", text_of(line)):
        start, end = match.span()
        cuts = [at for at in range(start + 1, end) if line[at][1] != line[at - 1][1]]
        found += zip([start, *cuts], [*cuts, end], strict=True)
    return [(start, end) for start, end in found if text_of(line[start:end]).strip()]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of the README from a run of the demo.")
    parser.add_argument("words", nargs="*", metavar="DIRECTORY|section.field=value")
    words = parser.parse_args(argv).words
    directory = Path(words.pop(0)) if words and "=" not in words[0] else HERE
    with tempfile.TemporaryDirectory() as place:
        demo = [str(ROOT / "train.py"), str(ROOT / "configs" / "tiny.py"), "output.dir=runs/tiny"]
        run = [sys.executable, *demo, *words]
        written = run_in_terminal(run, Path(place)).replace(f"{ROOT}{os.sep}", "")
        lines = [[(letter, "") for letter in f"$ {COMMAND}"], *selected(screen(written))]
        (directory / "terminal.svg").write_text(draw(lines), encoding="utf-8")
        plot = [sys.executable, "-m", "nanoft", "plot", "runs/tiny"]
        subprocess.run(plot, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
        shutil.copy(Path(place) / "runs" / "tiny" / "plots" / "curves.svg", directory)


if __name__ == "__main__":
    main(sys.argv[1:])
