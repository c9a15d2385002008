"""Data sources to raw records: files, directories, globs and Hub datasets, read one record after another.

JSON, JSON Lines, CSV, TSV and Parquet are streamed, so the size of a file does not matter. A record that cannot be
read (a line that is not JSON, a ragged row, bytes that are not UTF-8) is yielded as a BadRecord in its place, and
reading goes on. A file that cannot be read as a whole (truncated, damaged, of another kind) is a UserError.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from nanoft import UserError

Raw = Any  # any value in place of a record, or a BadRecord
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
HUB = "hf://datasets/"
HUB_NAME = re.compile(r"([^/@]+)/([^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*?))?/*")
METADATA = ["dataset_info.json", "dataset_infos.json", "*config.json"]  # describe a dataset, are not its data
TRAIN = re.compile("(?<![a-z])train", re.IGNORECASE)  # in a path: "train", "my_train"; not "constrained"
MAX_RECORD = 64 << 20  # bytes; a longer line is a file without line ends
MAX_OBJECT = 512 << 20  # bytes, uncompressed, of a file that is one JSON object: it is read into memory
CHUNK = 1 << 20
WHITE_SPACE = re.compile(r"[ \t\r\n]*")


class BadRecord(ValueError):
    """Why a record cannot be used."""


def find_files(spec: str, name: str = "data.train_file") -> list[list[Path]]:
    """The files of each part of `a.jsonl,folder,more/*.csv,hf://datasets/openai/gsm8k/main`; name: for messages."""
    if not spec.strip():
        raise UserError(f"{name}: is empty: give a file ({' '.join(SUFFIXES)}), a directory or hf://datasets/")
    found = []
    for part in [spec] if os.path.exists(spec) else [part.strip() for part in spec.split(",")]:
        if part.startswith(HUB):
            found.append(_download(part, name))
        elif os.path.isdir(part):
            found.append(_data_files(Path(part), part, name))
        elif os.path.isfile(part):
            found.append([Path(part)])
        elif not glob.has_magic(part) or os.path.exists(part):
            raise UserError(f"{name}: {part}: no such file (a dataset on the Hub is {HUB}owner/name)")
        else:
            found.append(sorted(Path(path) for path in glob.glob(part, recursive=True) if os.path.isfile(path)))
            if not found[-1]:
                raise UserError(f"{name}: {part}: no file matches")
    return found


def _data_files(directory: Path, part: str, name: str) -> list[Path]:
    found = []
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if _suffix(path) in SUFFIXES and path.is_file() and not hidden and not any(map(path.match, METADATA)):
            found.append(path)
    if not found:
        raise UserError(f"{name}: {part}: a directory without data files ({' '.join(SUFFIXES)})")
    return found


def _download(part: str, name: str) -> list[Path]:
    """The data files of hf://datasets/OWNER/NAME[@REVISION][/PATH]; only those of the train split if there are more."""
    named = HUB_NAME.fullmatch(part.removeprefix(HUB))
    if not named:
        raise UserError(f"{name}: {part}: write {HUB}owner/name, followed by a path for a part of the dataset")
    owner, repository, revision, inside = named.groups(default="")
    if ".." in f"{owner}/{repository}/{revision}/{inside}".split("/"):
        raise UserError(f"{name}: {part}: .. leads out of the dataset: name a file or directory in it")
    endings = [f"*{suffix}{packed}" for suffix in SUFFIXES for packed in ("", ".gz")]
    wanted = [inside, *(f"{inside}/{ending}" for ending in endings)] if inside else endings
    from huggingface_hub import snapshot_download

    try:
        patterns: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": METADATA}
        root = snapshot_download(f"{owner}/{repository}", repo_type="dataset", revision=revision or None, **patterns)
    except Exception as error:  # the Hub client raises many kinds: no network, no such dataset, gated, bad name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: {part}: could not be downloaded from the Hub: {reason}") from None
    place = Path(root, inside)
    found = [place] if inside and place.is_file() else _data_files(place, part, name)
    return [path for path in found if TRAIN.search(str(path.relative_to(place)))] or found


def _suffix(path: Path) -> str:  # without .gz
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def read_raw(
    path: Path, delimiter: str | None = None, on_progress: Callable[[int], None] = lambda position: None
) -> Iterator[tuple[int, Raw]]:
    """Stream the (line, record) pairs of one file; `on_progress` is called now and then with the bytes read."""
    suffix, count = _suffix(path), 0
    if suffix not in READERS:
        raise UserError(f"{path}: unknown file type {path.suffix!r}: give {' '.join(SUFFIXES)}, also as .gz")
    try:
        with open(path, "rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
            head = stream.read(4) if suffix != ".parquet" else b""
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{path}: is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
            stream.seek(3 if head.startswith(codecs.BOM_UTF8) else 0)
            for count, item in enumerate(READERS[suffix](stream, path, delimiter), start=1):
                if count % 256 == 0:
                    on_progress(raw.tell())
                yield item
            on_progress(os.fstat(raw.fileno()).st_size)
    except (OSError, EOFError, zlib.error) as error:
        what = "damaged" if path.name.endswith(".gz") else "cannot be read"
        raise UserError(f"{path}: {what} after {count:,} records: {error}") from None
    if not count:
        raise UserError(f"{path}: the file is empty: it needs at least one record")


def _lines(stream: IO[bytes]) -> Iterator[bytes]:  # split at newlines only; an over-long one is cut at MAX_RECORD
    while line := stream.readline(MAX_RECORD):
        if len(line) == MAX_RECORD and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_RECORD)) and not rest.endswith(b"\n"):
                pass
        yield line


def _read_lines(stream: IO[bytes], path: Path, delimiter: str | None) -> Iterator[tuple[int, Raw]]:
    for number, line in enumerate(_lines(stream), start=1):
        if len(line) >= MAX_RECORD:
            yield number, BadRecord(f"longer than {MAX_RECORD >> 20} MiB")
        elif line.strip():
            yield number, _parse_line(line)


def _parse_line(line: bytes | bytearray) -> Raw:
    try:
        return decode_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start + 1}")
    except BadRecord as error:
        return error


def _read_json(stream: IO[bytes], path: Path, delimiter: str | None) -> Iterator[tuple[int, Raw]]:
    """An array of records, an object with one, a single record, or JSON Lines in spite of the name."""
    start = stream.tell()
    opening = next((byte for byte in iter(lambda: stream.read(1), b"") if not byte.isspace()), b"")
    stream.seek(start)
    if opening == b"[":
        yield from _read_array(stream, path)
    elif opening:
        lines = (line for line in _lines(stream) if line.strip())
        is_lines = isinstance(_parse_line(next(lines)), dict) and next(lines, None) is not None
        stream.seek(start)
        yield from (_read_lines if is_lines else _read_object)(stream, path, delimiter)


def _read_array(stream: IO[bytes], path: Path) -> Iterator[tuple[int, Raw]]:
    text, number = _JsonText(stream, path), 0
    text.take("[")
    while text.peek() != "]":
        if number:
            text.take(",")
        number += 1
        yield number, text.value(number)
    if not number:
        raise UserError(f"{path}: the array is empty: it needs at least one record")
    text.take("]")
    if text.peek():
        raise UserError(f"{path}: not valid JSON: extra data after the array")


class _JsonText:
    """A JSON text read value by value through a sliding window."""

    def __init__(self, stream: IO[bytes], path: Path):
        self.stream, self.path = stream, path
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # bad bytes: lone surrogates
        self.window, self.at = "", 0

    def peek(self) -> str:  # the next character that is not white space; empty at the end
        while True:
            self.at = WHITE_SPACE.match(self.window, self.at).end()  # type: ignore[union-attr]  # always matches
            if self.at < len(self.window):
                return self.window[self.at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> None:
        found = self.peek()
        if found != wanted:
            what = f"found {found!r}" if found else "the file ends"
            raise UserError(f"{self.path}: not valid JSON: expected {wanted!r} between records, {what}")
        self.at += 1

    def value(self, number: int) -> Any:
        """The next value; near the end of the window it is parsed again with more text: 1 may begin 1.5e3."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.window, self.at)
                reason, length = "", end - self.at
            except RecursionError:
                raise UserError(f"{self.path}: record {number}: nested too deeply") from None
            except json.JSONDecodeError as error:
                reason = f"{error.msg}: character {error.pos - self.at + 1:,} of the record"
            except ValueError as error:
                reason = str(error)
            if not reason and (end + 2 < len(self.window) or not self._more()):
                self.at += length
                return value
            too_long = f"longer than {MAX_RECORD >> 20} MiB, or " * (len(self.window) - self.at > MAX_RECORD)
            if reason and (too_long or not self._more()):
                raise UserError(f"{self.path}: record {number}: {too_long}not valid JSON: {reason}")

    def _more(self) -> bool:
        """Extend the window by at least half, so that a long value is parsed only a few times."""
        self.window, self.at = self.window[self.at :], 0
        read = self.stream.read(max(CHUNK, len(self.window) // 2))
        self.window += self.decoder.decode(read, final=not read)
        return bool(read)


def _read_object(stream: IO[bytes], path: Path, delimiter: str | None) -> Iterator[tuple[int, Raw]]:
    """The records of the only array in {"version": ..., "data": [...]}; without one, or of turns: one record."""
    content = bytearray()
    while piece := stream.read(CHUNK):  # piece by piece: a small .gz can hold a terabyte
        content += piece
        if len(content) > MAX_OBJECT:
            raise UserError(f"{path}: one object of more than {MAX_OBJECT >> 20} MiB: convert it to JSON Lines")
    whole = _parse_line(content)
    if isinstance(whole, BadRecord):
        raise UserError(f"{path}: {whole}")
    wanted = f"{path}: expected an array of records, or an object with one: found"
    if not isinstance(whole, dict):
        raise UserError(f"{wanted} {type(whole).__name__}")
    arrays = {name: value for name, value in whole.items() if isinstance(value, list)}
    openings = [value[0] for value in arrays.values() if value and isinstance(value[0], dict)]
    if not arrays or any("role" in opening or "from" in opening for opening in openings):
        arrays = {"": [whole]}
    if len(arrays) > 1:
        raise UserError(f"{wanted} {len(arrays)} arrays: {', '.join(arrays)!r:.100}")
    ((name, records),) = arrays.items()
    if not records:
        raise UserError(f"{path}: the array {name!r:.60} is empty: it needs at least one record")
    yield from enumerate(records, start=1)


def _read_table(stream: IO[bytes], path: Path, delimiter: str | None) -> Iterator[tuple[int, Raw]]:
    """CSV and TSV with a header; a byte that is not UTF-8 becomes a lone surrogate, which rejects the record."""
    csv.field_size_limit(MAX_RECORD // 4)  # characters, of four bytes each in memory
    text = (line.decode("utf-8", "surrogateescape") for line in _lines(stream))
    first = next(text, "")
    if not first:
        return
    if delimiter is None:
        delimiter = "\t" if _suffix(path) == ".tsv" else max(",;\t|", key=first.count)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UserError(f"data.delimiter: {delimiter!r} cannot separate the columns of {path}: give one character")
    rows = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
    try:
        names = next(rows)
    except csv.Error as error:
        raise UserError(f"{path}:1: the header is not valid CSV: {error}") from None
    if not names or not all(map(str.strip, names)) or len(set(names)) < len(names):
        raise UserError(f"{path}:1: the header has {names!r:.80}: it needs one name for each column")
    row: list[str] | None = names
    while row is not None:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
            if row and len(row) != len(names):
                yield line, BadRecord(f"{len(row)} columns where the header has {len(names)}")
            elif row:
                yield line, dict(zip(names, row, strict=True))
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise UserError(f"{path}:{line}: the quote opened here is never closed") from None
            yield line, BadRecord(f"not valid CSV: {error}")


def _read_parquet(stream: IO[bytes], path: Path, delimiter: str | None) -> Iterator[tuple[int, Raw]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install -e '.[parquet]'") from None
    try:
        table = parquet.ParquetFile(stream)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(1024))
        yield from enumerate(rows, start=1)
    except Exception as error:  # pyarrow raises many kinds, also for dates and strings that Python cannot hold
        raise UserError(f"{path}: not valid Parquet: {' '.join(str(error).split())}") from None


# Arguments: a stream positioned after its byte-order mark, the path for messages, the delimiter of tables.
READERS: dict[str, Callable[[IO[bytes], Path, str | None], Iterator[tuple[int, Raw]]]] = {
    ".json": _read_json,
    **dict.fromkeys((".jsonl", ".ndjson"), _read_lines),
    **dict.fromkeys((".csv", ".tsv"), _read_table),
    ".parquet": _read_parquet,
}


def refuse_constant(constant: str) -> None:
    """For a JSON decoder: NaN and Infinity are Python's, not JSON's."""
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def decode_json(text: str) -> Any:
    """Parse a JSON text; raises BadRecord."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise BadRecord("nested too deeply") from None
    except ValueError as error:
        raise BadRecord(f"not valid JSON: {error}") from None
