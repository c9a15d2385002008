"""Read raw records from data sources: files, directories, globs and Hub datasets.

JSON Lines, CSV, TSV and Parquet are streamed, so files may be larger than memory. A record that cannot be read (a line
that is not JSON, a ragged row, bytes that are not UTF-8) is yielded as a BadRecord in its place, and reading continues.
A file that cannot be read as a whole (truncated, damaged, of another type) is a UserError.

A directory, local or on the Hub, may contain several splits: `train_file` then means only its training split.
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
from nanoft.io.hub import download
from nanoft.io.untrusted import one_line

Log = Callable[[str], None]  # called with lines for the user
Raw = Any  # any value in place of a record, or a BadRecord
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
HUB = "hf://datasets/"
HUB_NAME = re.compile(r"([^/@]+)/([^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*?))?/*")
METADATA = ["dataset_info.json", "dataset_infos.json", "*config.json"]  # files about a dataset, not its data
# A split is named by a word in a path: "train", "my_train", "testset"; not "constrained" or "testimony".
SPLIT = re.compile(
    "(?<![a-z])(?:(?P<train>train(?:ing)?)|(?P<validation>valid(?:ation)?|val|dev|eval(?:uation)?)|(?P<test>test(?:ing)?))"
    "(?:_?(?:set|split|data))?(?![a-z])",
    re.IGNORECASE,
)
PREFERRED = {"data.validation_file": ("validation", "test", None, "train")}  # None: not named after a split
SHARD = re.compile(r"[-_.]?(?:(?:part|shard)[-_.]?)?\d+(?:[-_.]of[-_.]\d+)?(?:-[0-9a-f-]{8,})?$")  # -00000-of-00002
MAX_RECORD = 64 << 20  # bytes; a longer line means a file without line ends
MAX_VALUES = 1 << 30  # bytes, uncompressed, of a JSON file that is not JSON Lines and so has to fit in memory
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
OTHER_KINDS = {  # first bytes of a file -> what it is, and how to make it readable
    rb"version https://git-lfs": "is a git-lfs pointer, not the data: run git lfs pull in its repository",
    rb"\x1f\x8b": "is compressed by gzip: add .gz to its name",
    rb"BZh\d|\(\xb5/\xfd|\xfd7zXZ": "is compressed: unpack it with bzip2 -d, zstd -d or xz -d",
    rb"PK\x03\x04": "is a zip archive or a spreadsheet: unpack it with unzip, or export it as CSV",
    rb"PAR1": "is Parquet: rename it to .parquet",
    rb"ARROW1|\xff\xff\xff\xff": "is Arrow: convert its directory with datasets: load_from_disk(...).to_json(...)",
    rb"(?i)\s*<(?:!doctype|html)": "is a web page: download the file itself (on the Hub: /resolve/, not /blob/)",
    rb"\xff\xfe|(\0\0)?\xfe\xff|\0{0,3}([\t-~]\0+){2}": "is UTF-16 or UTF-32: convert it (iconv -f UTF-16, or UTF-32)",
}
NOT_UTF_8 = "is the file Latin-1? then convert it: iconv -f WINDOWS-1252 -t UTF-8"


class BadRecord(Exception):
    """Why a record cannot be used."""


def find_files(spec: str, name: str = "data.train_file", log: Log = lambda line: None) -> list[list[Path]]:
    """The files of each part of `a.jsonl,folder,more/*.csv,hf://datasets/openai/gsm8k/main`.

    Args:
        name: the setting, for messages; a `data.validation_file` is the validation split of a directory.
        log: gets a line for each directory that has other splits, which are not read.
    """
    if not spec.strip():
        raise UserError(f"{name}: empty: give a file ({' '.join(SUFFIXES)}), a directory or hf://datasets/")
    found = []
    for part in [spec] if os.path.exists(spec) else [part.strip() for part in spec.split(",")]:
        place = _download(part, name) if part.startswith(HUB) else part
        files = _files_at(place, part, name, log)
        if not files:
            missing = "no file matches" if glob.has_magic(place) else f"no such file (on the Hub: {HUB}owner/name)"
            if os.path.isdir(place) or place != part:
                missing = f"a directory without data files ({' '.join(SUFFIXES)})"
            raise UserError(f"{name}: {part}: {missing}")
        found.append(files)
    return found


def _files_at(place: str, part: str, name: str, log: Log) -> list[Path]:
    """A file; the split of a directory; the matches of a glob; or the shards whose names begin with `folder/train`."""
    if os.path.isdir(place):
        return _choose_split(_data_files(Path(place), part, name), Path(place), part, name, log)
    if os.path.isfile(place) or "\0" in place:
        return [Path(place)] if os.path.isfile(place) else []
    if found := [Path(path) for path in sorted(glob.glob(place, recursive=True)) if os.path.isfile(path)]:
        return found
    beside = map(Path, sorted(glob.glob(glob.escape(place) + "*")))
    return [p for p in beside if _suffix(p) in SUFFIXES and SHARD.sub("", _stem(p)) == os.path.basename(place)]


def _data_files(directory: Path, part: str, name: str) -> list[Path]:
    found = []
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.suffix == ".arrow" and (path.parent / "state.json").is_file():
            whole = path.parent.parent if (path.parent.parent / "dataset_dict.json").is_file() else path.parent
            split = "['train']" if whole != path.parent else ""
            fix = f"from datasets import load_from_disk; load_from_disk('{whole}'){split}.to_json('data.jsonl')"
            raise UserError(f'{name}: {part}: written by save_to_disk of datasets: convert it: python -c "{fix}"')
        if _suffix(path) in SUFFIXES and path.is_file() and not hidden and not any(map(path.match, METADATA)):
            found.append(path)
    return found


def _choose_split(files: list[Path], root: Path, part: str, name: str, log: Log) -> list[Path]:
    """The files of the wanted split; all files if none is named after a split.

    `main/train-00000-of-00002.parquet` is a shard of the split `main/train`. Several training splits, from several
    configurations (main, socratic) or of several kinds (train_sft, train_gen), are an error.
    """
    groups: dict[str, dict[str, list[Path]]] = {}  # split -> name of each of its candidates -> shards
    for path in files:
        relative = path.relative_to(root)
        places = [Path(*relative.parts[:-1], _stem(path)), *relative.parents]  # from the file's own name upwards
        place, match = next(((p, m) for p in places if (m := SPLIT.search(p.name))), (relative, None))
        label = str(place.with_name(SHARD.sub("", place.name)) if match else place)
        kind = "".join(path.suffixes[-2:]) if match and place == places[0] else ""
        groups.setdefault(str(match and match.lastgroup), {}).setdefault(label + "\0" + kind, []).append(path)
    order = PREFERRED.get(name, ("train", None))
    split = next((str(wanted) for wanted in order if str(wanted) in groups), None)
    candidates = groups[split] if split else {key: value for group in groups.values() for key, value in group.items()}
    if split != "None" and len(candidates) > 1:
        labels = [str(s[0].relative_to(root)) if len(s) == 1 else key.split("\0")[0] for key, s in candidates.items()]
        what = f"{len(labels)} candidate splits ({', '.join(labels)!s:.200})"
        raise UserError(f"{name}: {part}: has {what}: name one, such as {part.rstrip('/')}/{labels[0]}")
    chosen = [path for shards in candidates.values() for path in shards]
    if unread := [str(path.relative_to(root)) for path in files if path not in chosen]:
        log(f"data      {part}: reading only its {split} split, not {', '.join(unread)!s:.200}")
    return chosen


def _download(part: str, name: str) -> str:
    """Fetch the data files of hf://datasets/OWNER/NAME[@REVISION][/PATH]; returns where PATH now lies."""
    named = HUB_NAME.fullmatch(part.removeprefix(HUB))
    if not named:
        raise UserError(f"{name}: {part}: write {HUB}owner/name, or {HUB}owner/name/path for a part of the dataset")
    owner, repository, revision, inside = named.groups(default="")
    if ".." in f"{owner}/{repository}/{revision}/{inside}".split("/"):
        raise UserError(f"{name}: {part}: .. leads out of the dataset: name a file or directory in it")
    endings = [suffix + packed for suffix in SUFFIXES for packed in ("", ".gz")]
    names = ("/*", "", "[0-9]*", "[-_.][0-9]*") if inside else ("*",)  # in a directory; shards of a split
    wanted = [inside + name + ending for name in names for ending in endings]
    patterns: dict[str, Any] = {"allow_patterns": [inside, *wanted], "ignore_patterns": METADATA}
    patterns |= {"repo_type": "dataset", "revision": revision or None}
    return os.path.join(download(f"{owner}/{repository}", f"{name}: {part}:", **patterns), inside)


def _suffix(path: Path) -> str:  # without .gz
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _stem(path: Path) -> str:  # without .gz and the suffix
    return Path(path.name.removesuffix(".gz")).stem


def read_raw(
    path: Path, delimiter: str | None = None, on_progress: Callable[[int], None] = lambda position: None
) -> Iterator[tuple[int, Raw]]:
    """Stream the (line, record) pairs of one file; `on_progress` is called now and then with the bytes read."""
    suffix, count = _suffix(path), 0
    try:
        with open(path, "rb") as raw:
            is_packed, own = path.name.endswith(".gz"), b"PAR1" if suffix == ".parquet" else codecs.BOM_UTF8
            _refuse_other_kinds(raw.read(64), path, b"\x1f\x8b" if is_packed else own)
            if suffix not in READERS:
                raise UserError(f"{path}: unknown file type {path.suffix!r}: give {' '.join(SUFFIXES)}, also as .gz")
            raw.seek(0)
            stream: Any = gzip.GzipFile(fileobj=raw) if is_packed else raw
            head = stream.read(64)
            _refuse_other_kinds(head, path, own)
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
        raise UserError(f"{path}: empty: it needs at least one record")


def _refuse_other_kinds(head: bytes, path: Path, expected: bytes) -> None:
    found = next((message for pattern, message in OTHER_KINDS.items() if re.match(pattern, head)), None)
    if found and not head.startswith(expected):
        raise UserError(f"{path}: {found}")


def _lines(stream: IO[bytes]) -> Iterator[bytes]:  # split at newlines only; a line is cut at MAX_RECORD bytes
    while line := stream.readline(MAX_RECORD):
        yield line
        while len(line) == MAX_RECORD and not line.endswith(b"\n"):
            line = stream.readline(MAX_RECORD)


def _parse_line(line: bytes) -> Raw:
    if len(line) >= MAX_RECORD:
        return BadRecord(f"longer than {MAX_RECORD >> 20} MiB")
    try:
        return decode_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start + 1}: {NOT_UTF_8}")
    except BadRecord as error:
        return error


def _read_json(stream: IO[bytes], path: Path, delimiter: str | None) -> Iterator[tuple[int, Raw]]:
    """JSON Lines, an array, concatenated values, or an object: by content, because file names are often wrong."""
    start = stream.tell()
    is_lines = _is_lines(stream, path)
    stream.seek(start)
    if not is_lines:
        yield from _read_values(stream, path)
        return
    for number, line in enumerate(_lines(stream), start=1):
        if line.strip() or len(line) == MAX_RECORD:
            yield number, _parse_line(line)


def _is_lines(stream: IO[bytes], path: Path) -> bool:
    """Whether one of the first hundred lines is an object; in a file called .json, the first line of several."""
    first = itertools.takewhile(lambda line: line.strip() != b"[", _lines(stream))  # which begins an array
    lines = (line for line in itertools.islice(first, 100) if line.strip())
    is_object = (line.startswith(b"{") and isinstance(_parse_line(line), dict) for line in lines)
    return next(is_object, False) and any(lines) if _suffix(path) == ".json" else any(is_object)


def _read_values(stream: IO[bytes], path: Path) -> Iterator[tuple[int, Raw]]:
    """The values of an array, of a text that concatenates them (commas are allowed), or of one object."""
    pieces = iter(lambda: stream.read(1 << 20), b"")
    content = b"".join(itertools.islice(pieces, (MAX_VALUES >> 20) + 1))
    if len(content) > MAX_VALUES:
        raise UserError(f"{path}: longer than {MAX_VALUES >> 20} MiB, and not JSON Lines: convert it to JSON Lines")
    text = content.decode("utf-8", "surrogateescape")  # a byte that is not UTF-8 rejects its record
    values: list[Any] = []
    at = _next(text, 0)
    while at < len(text):
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: {_reason(error)}") from None
        values.append(value)
        at = _next(text, at)
        at = _next(text, at + text.startswith(",", at))
    if len(values) == 1:
        values = values[0] if isinstance(values[0], list) else _records_of(values[0], path)
    yield from enumerate(values, start=1)


def _next(text: str, at: int) -> int:  # the next character that is not white space
    return WHITE_SPACE.match(text, at).end()  # type: ignore[union-attr]  # always matches


def _records_of(whole: Any, path: Path) -> list[Any]:
    """The records of the only array in {"version": ..., "data": [...]}; an object without one is itself a record."""
    if not isinstance(whole, dict):
        return [whole]
    wanted = f"{path}: expected an array of records, or an object with one: found"
    arrays = {n: v for n, v in whole.items() if isinstance(v, list) and (not v or isinstance(v[0], dict))}
    by_columns = (isinstance(v, list) or (isinstance(v, dict) and all(map(str.isdigit, v))) for v in whole.values())
    if whole and not arrays and all(by_columns):
        fix = "write records, in pandas with to_json(FILE, orient='records', lines=True)"
        raise UserError(f"{wanted} a table by columns ({', '.join(whole)!s:.100}): {fix}")
    if not arrays or any("role" in opening or "from" in opening for opening, *_ in filter(None, arrays.values())):
        return [whole]
    if len(arrays) > 1:
        fix = f"write one of them to its own file: jq -c '.{next(iter(arrays))}[]' FILE > NEW.jsonl"
        raise UserError(f"{wanted} {len(arrays)} arrays: {', '.join(arrays)!r:.100}: {fix}")
    return next(iter(arrays.values()))


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
    spaced = first.count(f"{delimiter} ") == first.count(delimiter) > 0  # "a, b": the values have spaces too
    rows = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    try:
        names = next(rows)
    except csv.Error as error:
        raise UserError(f"{path}:1: the header is not valid CSV: {error}") from None
    names[:1] = [name or "index" for name in names[:1]]  # pandas writes an index column without a name
    if not names or not all(map(str.strip, names)) or len(set(names)) < len(names):
        raise UserError(f"{path}:1: the header is {names!r:.80}: it needs a unique name for each column")
    row: list[str] | None = names
    while row is not None:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
            if not row or not any(row):
                continue  # a blank line; spreadsheets write only delimiters
            if len(row) != len(names):
                yield line, BadRecord(f"{len(row)} columns where the header has {len(names)}")
            else:
                yield line, dict(zip(names, row, strict=True))
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise UserError(f"{path}:{line}: the quote opened here is never closed") from None
            yield line, BadRecord(f'not valid CSV: {error} (a quote within quotes must be doubled: "")')


def _read_parquet(stream: IO[bytes], path: Path, delimiter: str | None) -> Iterator[tuple[int, Raw]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install -e '.[parquet]'") from None
    try:
        table = parquet.ParquetFile(stream)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(1024))
        for number, row in enumerate(rows, start=1):
            yield number, {name: _without_nulls(value) for name, value in row.items()}
    except Exception as error:  # pyarrow raises many types, also for dates and strings that Python cannot represent
        raise UserError(f"{path}: not valid Parquet: {one_line(error)}") from None


def _without_nulls(value: Any) -> Any:
    """A value of a table, without the null members of its structs: in Parquet all structs have the same members."""
    if isinstance(value, dict):
        return {name: _without_nulls(member) for name, member in value.items() if member is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# Arguments: a stream positioned after its byte-order mark, the path for messages, the delimiter of tables.
READERS: dict[str, Callable[[IO[bytes], Path, str | None], Iterator[tuple[int, Raw]]]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _read_json),
    **dict.fromkeys((".csv", ".tsv"), _read_table),
    ".parquet": _read_parquet,
}


DECODER = json.JSONDecoder()  # NaN and Infinity are Python's, not JSON's: refused where they are used


def decode_json(text: str) -> Any:
    """Parse a JSON text; raises BadRecord."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(_reason(error)) from None


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON: {error}"
