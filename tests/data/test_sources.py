"""Which files are read, and what happens to files and records that are not what they should be."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow
import pytest
from hub import Hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiers import rest_is_slow

from nanoft import UserError
from nanoft.config import DataConfig
from nanoft.data.formats import Conversation, Rejected, read_file
from nanoft.data.sources import BadRecord, find_files, read_raw

GOOD = b'{"prompt": "Q", "completion": "A"}'


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """A time limit, so that nothing can hang."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(path: Path, **reading: Any) -> tuple[list[Conversation], list[Rejected]]:
    with within(10):
        _, *items = read_file(path, DataConfig(**reading))
    good = [item for item in items if isinstance(item, Conversation)]
    bad = [item for item in items if isinstance(item, Rejected)]
    assert len(good) + len(bad) == len(items)
    return good, bad


def make_parquet(rows: list[Any], **options: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


# ---- Which files


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with files of every kind, which is the current one."""
    names = ["a.json", "b.jsonl", "c.csv.gz", "d/e.PARQUET", "d/f.tsv", "d/g.ndjson", "x.txt", "y,z.jsonl", "[k].json"]
    hidden = [".h.json", ".git/i.json", "dataset_info.json", "d/adapter_config.json"]
    for name in [*names, *hidden, "empty/x.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FOUND = {
    "a.json": [["a.json"]],
    "x.txt": [["x.txt"]],  # (read_raw says what is wrong with it)
    "a.json,b.jsonl": [["a.json"], ["b.jsonl"]],
    " a.json , d ": [["a.json"], ["d/e.PARQUET", "d/f.tsv", "d/g.ndjson"]],
    "*.json*": [["[k].json", "a.json", "b.jsonl", "dataset_info.json", "y,z.jsonl"]],
    "d/?.[tn]*": [["d/f.tsv", "d/g.ndjson"]],
    "**/*.tsv": [["d/f.tsv"]],
    "y,z.jsonl": [["y,z.jsonl"]],
    "[k].json": [["[k].json"]],
    ".": [["[k].json", "a.json", "b.jsonl", "c.csv.gz", "d/e.PARQUET", "d/f.tsv", "d/g.ndjson", "y,z.jsonl"]],
    "d/../.h.json": [["d/../.h.json"]],
}


@pytest.mark.parametrize("spec", FOUND)
def test_files_are_found(tree: Path, spec: str) -> None:
    assert [[str(path) for path in part] for part in find_files(spec)] == FOUND[spec]


NOT_FOUND = {
    "": "empty: give",
    "  ": "empty: give",
    "nothing.json": "nothing.json: no such file",
    "a.json,,b.jsonl": "no such file",
    "a.json,nothing": "nothing: no such file",
    "empty": "empty: a directory without data files",
    "*.xml": r"\*\.xml: no file matches",
    "a\0b": "no such file",
    "hf://datasets/": "write hf://datasets/owner/name",
    "hf://datasets/gsm8k": "write hf://datasets/owner/name",
    "hf://datasets//gsm8k": "write hf://datasets/owner/name",
    "hf://datasets/a/b@/c": "write hf://datasets/owner/name",
}


@pytest.mark.parametrize("spec", NOT_FOUND)
def test_files_that_are_not_there(tree: Path, spec: str) -> None:
    with pytest.raises(UserError, match=f"^data.validation_file: .*{NOT_FOUND[spec]}") as raised:
        find_files(spec, "data.validation_file")
    assert "\n" not in str(raised.value)


# ---- The Hub


HUB_FILES = [
    "main/train.jsonl",
    "main/test.jsonl",
    "socratic/train-00000-of-00002.parquet",
    "socratic/train-00001-of-00002.parquet",
    "socratic/constrained.parquet",
    "train_all/val.csv.gz",
    "train_all/train.tsv",
    "other/a.tsv",
]
HUB_SURPLUS = ["README.md", "data.py", "dataset_infos.json", "main/some_config.json", "weights.bin", "main/notes.txt"]


@pytest.fixture
def hub(tmp_path: Path, serve_hub: Callable[[Any], None]) -> type[Hub]:
    for name in HUB_FILES + HUB_SURPLUS:
        (tmp_path / "remote" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "remote" / name).write_text(name)
    handler = type("ThisHub", (Hub,), {"repository": "datasets/some/data", "files": tmp_path / "remote", "asked": []})
    serve_hub(handler)
    return handler


# Part of the dataset -> (files that are used, files that are fetched).
HUB_PARTS = {
    "/main": (HUB_FILES[:1], HUB_FILES[:2]),
    "/main/": (HUB_FILES[:1], HUB_FILES[:2]),
    "/main/test.jsonl": (HUB_FILES[1:2], HUB_FILES[1:2]),
    "/socratic/train": (HUB_FILES[2:4], HUB_FILES[2:4]),
    "/socratic/train-*.parquet": (HUB_FILES[2:4], HUB_FILES[2:4]),
    "/socratic": (HUB_FILES[2:4], HUB_FILES[2:5]),
    "/train_all": (HUB_FILES[6:7], HUB_FILES[5:7]),
    "/other": (HUB_FILES[7:], HUB_FILES[7:]),
}


@pytest.mark.parametrize("inside", HUB_PARTS)
def test_a_hub_dataset_is_fetched_once_and_only_its_data(
    hub: type[Hub], inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, fetched = HUB_PARTS[inside]
    ((*found,),) = find_files(f"hf://datasets/some/data{inside}")
    assert sorted(path.read_bytes().decode() for path in found) == sorted(used)
    asked = {path.partition(f"/resolve/{hub.commit}/")[2] for path in hub.asked if "/resolve/" in path}
    assert asked == set(fetched)

    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_files(f"hf://datasets/some/data{inside}") == [found]  # from the cache
    assert hub.asked == []


REVISIONS = {
    "@v1/main": "v1",
    "@v1/main/train": "v1",
    "@refs/convert/parquet/main": "refs/convert/parquet",
    "@refs/pr/7/main": "refs/pr/7",
}


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_hub_dataset_has_revisions(hub: type[Hub], revision: str) -> None:
    ((first, *_),) = find_files(f"hf://datasets/some/data{revision}")
    assert first.read_bytes() == HUB_FILES[0].encode()
    asked = {path.replace("%2F", "/") for path in hub.asked}
    assert f"/api/datasets/some/data/revision/{REVISIONS[revision]}" in asked


def test_what_the_cache_holds_besides_the_data_is_not_read(hub: type[Hub]) -> None:
    huggingface_hub.snapshot_download("some/data", repo_type="dataset")  # as another program may have done
    ((*found,),) = find_files("hf://datasets/some/data/main")
    assert [path.name for path in found] == ["train.jsonl"]


NOT_ON_THE_HUB = {
    "no/such": "hf://datasets/no/such: could not be downloaded from the Hub: ",
    "some/data/nothing": "hf://datasets/some/data/nothing: a directory without data files",
    "some/data@../..": "hf://datasets/some/data@../..: .. leads out of the dataset",
    "some/data/a/../..": "hf://datasets/some/data/a/../..: .. leads out of the dataset",
    "some/data@refs/pr/..": "hf://datasets/some/data@refs/pr/..: .. leads out of the dataset",
}


@pytest.mark.parametrize("name", NOT_ON_THE_HUB)
def test_a_hub_dataset_that_cannot_be_had_is_one_line(hub: type[Hub], name: str) -> None:
    with pytest.raises(UserError) as raised:
        find_files(f"hf://datasets/{name}")
    assert str(raised.value).startswith(f"data.train_file: {NOT_ON_THE_HUB[name]}")
    assert "\n" not in str(raised.value)


def test_without_the_hub_it_says_so(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(
        UserError, match=r"^data\.train_file: hf://datasets/some/data: could not be downloaded"
    ) as raised:
        find_files("hf://datasets/some/data")
    assert "\n" not in str(raised.value)


def test_a_gated_data_set_names_its_page(hub: type[Hub]) -> None:
    def refuse(self: Hub, _: bool) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    hub.answer = refuse  # type: ignore[method-assign]
    page = r"accept its terms at https://huggingface\.co/datasets/some/data, then set HF_TOKEN"
    with pytest.raises(UserError, match=rf"^data\.train_file: hf://datasets/some/data: could not .* Hub: {page}"):
        find_files("hf://datasets/some/data")


# ---- Splits and configurations

# Files of a directory -> those that train_file means, and those that validation_file means; a text: the error.
SPLITS: dict[str, tuple[str, str | list[str], str | list[str]]] = {
    "three files": ("train.jsonl validation.jsonl test.jsonl", ["train.jsonl"], ["validation.jsonl"]),
    "shards": ("data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet",
               ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
               ["data/test-00000-of-00001.parquet"]),
    "shards with hashes": ("train-0-of-2-0123456789abcdef.parquet train-1-of-2-fedcba9876543210.parquet val.jsonl",
                           ["train-0-of-2-0123456789abcdef.parquet", "train-1-of-2-fedcba9876543210.parquet"],
                           ["val.jsonl"]),
    "numbered": ("train_0.jsonl train_1.jsonl train_part10.jsonl dev.jsonl",
                 ["train_0.jsonl", "train_1.jsonl", "train_part10.jsonl"], ["dev.jsonl"]),
    "folders": ("train/0000.parquet train/0001.parquet test/0000.parquet",
                ["train/0000.parquet", "train/0001.parquet"], ["test/0000.parquet"]),
    "configurations": ("main/train.jsonl main/test.jsonl socratic/train.jsonl socratic/test.jsonl",
                       "has 2 candidate splits (main/train.jsonl, socratic/train.jsonl): name one, such as ",
                       "has 2 candidate splits (main/test.jsonl, socratic/test.jsonl): name one, such as "),
    "sharded configurations": ("a/train-00000-of-00002.jsonl a/train-00001-of-00002.jsonl b/train-00000-of-00001.jsonl",
                               "has 2 candidate splits (a/train, b/train-00000-of-00001.jsonl): name one, such as ",
                               "has 2 candidate splits (a/train, b/train-00000-of-00001.jsonl): name one, such as "),
    "kinds": ("data/train_sft-00000-of-00001.parquet data/train_gen-00000-of-00001.parquet data/test_sft.parquet",
              "(data/train_gen-00000-of-00001.parquet, data/train_sft-00000-of-00001.parquet): name one, such as ",
              ["data/test_sft.parquet"]),
    "the same twice": ("train.jsonl train.parquet", "(train.jsonl, train.parquet)", "(train.jsonl, train.parquet)"),
    "no split": ("a.jsonl b/c.jsonl", ["a.jsonl", "b/c.jsonl"], ["a.jsonl", "b/c.jsonl"]),
    "one without a name": ("chats.jsonl more.jsonl valid.jsonl", ["chats.jsonl", "more.jsonl"], ["valid.jsonl"]),
    "held out alone": ("val.jsonl", ["val.jsonl"], ["val.jsonl"]),
    "held out twice": ("test.jsonl val.jsonl", "has 2 candidate splits (test.jsonl, val.j", ["val.jsonl"]),
    "other words": ("testimony.jsonl constrained.jsonl", ["constrained.jsonl", "testimony.jsonl"],
                    ["constrained.jsonl", "testimony.jsonl"]),
    "upper case": ("TRAIN.jsonl TestSet.jsonl", ["TRAIN.jsonl"], ["TestSet.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("field", ["data.train_file", "data.validation_file"])
@pytest.mark.parametrize("name", SPLITS)
def test_a_directory_means_one_split(tmp_path: Path, name: str, field: str) -> None:
    files, *expected = SPLITS[name]
    for file in files.split():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(GOOD)
    wanted, said = expected[field == "data.validation_file"], list[str]()
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=re.escape(wanted)) as raised:
            find_files(str(tmp_path), field)
        assert str(raised.value).startswith(f"{field}: {tmp_path}: has ")
        place = str(raised.value).rpartition("name one, such as ")[2]
        assert find_files(place, field)[0]  # what it says to name
        return
    (found,) = find_files(f"{tmp_path}/", field, said.append)
    assert [str(path.relative_to(tmp_path)) for path in found] == wanted
    unread = sorted(set(files.split()) - set(wanted))
    assert [all(name in line for name in unread) for line in said] == [True] * bool(unread)


def test_the_shards_of_a_split_are_found_by_its_name(tmp_path: Path) -> None:
    names = [f"{split}-0000{n}-of-00002.jsonl.gz" for split in ("train", "train_sft", "test") for n in (0, 1)]
    for name in names:
        (tmp_path / name).write_bytes(PACKED)
    assert find_files(f"{tmp_path}/train,{tmp_path}/train_sft") == [
        [tmp_path / n for n in names[i : i + 2]] for i in (0, 2)
    ]
    with pytest.raises(UserError, match="no such file"):
        find_files(f"{tmp_path}/tr")


def test_a_hub_dataset_with_several_configurations_is_not_guessed(hub: type[Hub]) -> None:
    with pytest.raises(UserError) as raised:
        find_files("hf://datasets/some/data")
    what = "has 3 candidate splits (main/train.jsonl, socratic/train, train_all/train.tsv)"
    fix = "name one, such as hf://datasets/some/data/main/train.jsonl"
    assert str(raised.value) == f"data.train_file: hf://datasets/some/data: {what}: {fix}"


@pytest.mark.parametrize("place", ["saved", "saved/test", "."])
def test_what_save_to_disk_wrote_is_named_with_the_command_that_converts_it(tmp_path: Path, place: str) -> None:
    for name in ("dataset_dict.json", "test/state.json", "test/data-00000-of-00001.arrow", "test/dataset_info.json"):
        (tmp_path / "saved" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "saved" / name).write_text("{}")
    with pytest.raises(UserError) as raised:
        find_files(str(tmp_path / place))
    assert "written by save_to_disk of datasets: convert it: python -c" in str(raised.value)
    assert f"load_from_disk('{tmp_path}/saved')['train'].to_json('data.jsonl')" in str(raised.value)


# ---- Files and records that are not what they should be


def lines(*parts: bytes) -> bytes:
    return b"".join(part + b"\n" for part in parts)


def array(*parts: bytes) -> bytes:
    return b"[" + b",\n".join(parts) + b"]"


def answer(value: bytes) -> bytes:
    """A record whose completion is exactly the value."""
    return b'{"prompt": "Q", "completion": ' + value + b"}"


def turns(*parts: bytes) -> bytes:
    return b'{"messages": [' + b", ".join(parts) + b"]}"


HEAD = b"prompt,completion\n"
USER, ASSISTANT = b'{"role": "user", "content": "Q"}', b'{"role": "assistant", "content": "A"}'
PARQUET = make_parquet([{"prompt": f"Q{n}", "completion": "A"} for n in range(3000)])
PRETTY = json.dumps(json.loads(GOOD), indent=4).encode()
NESTED = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": c}]} for c in ("A", None)]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
PACKED = gzip.compress(lines(*[GOOD] * 2000), mtime=0)


HALF = "contains a lone surrogate"
ONE_RECORD_NEEDED = "it needs at least one record"

# Name -> (content, the error as a text; or the number of good records and a piece of each reason in order).
Outcome = str | tuple[int | str, ...]
CORPUS: dict[str, tuple[bytes, Outcome]] = {
    # what a file is made of
    "zero.jsonl": (b"", ONE_RECORD_NEEDED),
    "zero.json": (b"", ONE_RECORD_NEEDED),
    "zero.csv": (b"", ONE_RECORD_NEEDED),
    "zero.tsv": (b"", ONE_RECORD_NEEDED),
    "zero.parquet": (b"", "not valid Parquet"),
    "zero.jsonl.gz": (b"", ONE_RECORD_NEEDED),
    "blank.jsonl": (b"\xef\xbb\xbf \n\r\n\t\n", ONE_RECORD_NEEDED),
    "blank.json": (b" \n" * 1000, ONE_RECORD_NEEDED),
    "blank.csv": (b"\n\n\n", ":1: the header is []"),
    "bom.jsonl": (b"\xef\xbb\xbf" + lines(GOOD), (1,)),
    "bom.json": (b"\xef\xbb\xbf" + array(GOOD), (1,)),
    "bom.csv": (b"\xef\xbb\xbf" + HEAD + b"Q,A\n", (1,)),
    "bom twice.jsonl": (b"\xef\xbb\xbf" * 2 + lines(GOOD, GOOD), (1, "not valid JSON")),
    "bom.jsonl.gz": (gzip.compress(b"\xef\xbb\xbf" + lines(GOOD)), (1,)),
    "utf-16.jsonl": (lines(GOOD).decode().encode("utf-16"), "is UTF-16 or UTF-32: convert it (iconv"),
    "utf-16be.json": ("\ufeff[]".encode("utf-16-be"), "is UTF-16 or UTF-32: convert it (iconv"),
    "utf-16.csv": ("prompt,completion\nQ,A\n".encode("utf-16"), "is UTF-16 or UTF-32: convert it (iconv"),
    "utf-16 without bom.jsonl": (lines(GOOD).decode().encode("utf-16-le"), "is UTF-16 or UTF-32: convert it (iconv"),
    "utf-16 without bom.json": (array(GOOD).decode().encode("utf-16-be"), "is UTF-16 or UTF-32: convert it (iconv"),
    "utf-16 without bom.csv": (HEAD.decode().encode("utf-16-le"), "is UTF-16 or UTF-32: convert it (iconv"),
    "utf-32.jsonl": (lines(GOOD).decode().encode("utf-32"), "is UTF-16 or UTF-32: convert it (iconv"),
    "utf-32 without bom.jsonl": (lines(GOOD).decode().encode("utf-32-le"), "is UTF-16 or UTF-32: convert it (iconv"),
    "utf-32be without bom.jsonl": (lines(GOOD).decode().encode("utf-32-be"), "is UTF-16 or UTF-32: convert it (iconv"),
    "utf-32.jsonl.gz": (gzip.compress(lines(GOOD).decode().encode("utf-32")), "is UTF-16 or UTF-32: convert it (iconv"),
    "latin-1.jsonl": (
        lines(*[answer('"é"'.encode("latin-1"))] * 2, GOOD),
        (1, *["iconv -f WINDOWS-1252 -t UTF-8"] * 2),
    ),
    "mixed encodings.jsonl": (
        lines(GOOD, answer('"é"'.encode()), answer('"é"'.encode("latin-1")), answer('"日"'.encode("shift-jis")), GOOD),
        (3, "not UTF-8 at byte 32", "not UTF-8 at byte 32"),
    ),
    "mixed encodings.json": (array(GOOD, answer(b'"caf\xe9"'), GOOD), (2, f"completion: {HALF}")),
    "mixed encodings object.json": (b'{"data": ' + array(GOOD, answer(b'"\xe9"')) + b"}", (1, f"completion: {HALF}")),
    "cut off character.jsonl": (lines(GOOD) + answer(b'"\xc3'), (1, "not UTF-8")),
    "cut off character.json": (b"[" + answer(b'"\xf0\x9f'), "not valid JSON"),
    "overlong.jsonl": (lines(GOOD, answer(b'"\xc0\xaf"')), (1, "not UTF-8")),
    "encoded surrogate.jsonl": (lines(GOOD, answer(b'"\xed\xa0\x80"')), (1, "not UTF-8")),
    "nul bytes.jsonl": (lines(GOOD) + b"\0" * 5000, (1, "not valid JSON")),
    "all nul.json": (b"\0" * 5000, "not valid JSON"),
    "all nul.csv": (b"\0" * 5000, ONE_RECORD_NEEDED),
    "noise.jsonl": (bytes(range(256)) * 20, "not valid JSON"),
    "gzip.jsonl": (PACKED, "is compressed by gzip: add .gz to its name"),
    "zip.jsonl": (b"PK\x03\x04" + bytes(50), "is a zip archive or a spreadsheet: "),
    "zstd.jsonl": (b"(\xb5/\xfd" + bytes(50), "zstd -d"),
    "parquet.jsonl": (PARQUET, "is Parquet: rename it to .parquet"),
    "arrow.arrow": (b"\xff\xff\xff\xff" + bytes(50), "load_from_disk(...).to_json(...)"),
    "text.json": (b"Once upon a time\nthere was\n", "not valid JSON: Expecting value: line 1 column 1"),
    "html.jsonl": (b"<!DOCTYPE html>\n<html>404</html>\n", "is a web page"),
    "pointer.jsonl": (POINTER, "is a git-lfs pointer, not the data: run git lfs pull"),
    "pointer.parquet": (POINTER, "is a git-lfs pointer, not the data: run git lfs pull"),
    "pointer.csv.gz": (POINTER, "is a git-lfs pointer, not the data: run git lfs pull"),
    # gzip
    "good.jsonl.gz": (PACKED, (2000,)),
    "two members.jsonl.gz": (gzip.compress(lines(GOOD)) * 2, (2,)),
    "not gzip.jsonl.gz": (lines(GOOD), "damaged after 0 records: Not a gzipped file"),
    "truncated.jsonl.gz": (PACKED[:-20], "records: Compressed file ended before"),
    "no trailer.jsonl.gz": (PACKED[:-8], "damaged after 2,000 records"),
    "corrupt.jsonl.gz": (PACKED[:60] + bytes(20) + PACKED[80:], "damaged after"),
    "crc.jsonl.gz": (PACKED[:-8] + b"\1\2\3\4" + PACKED[-4:], "damaged after 2,000 records: CRC check failed"),
    "length.jsonl.gz": (PACKED[:-4] + b"\0\0\0\1", "Incorrect length"),
    "garbage behind.jsonl.gz": (PACKED + b"garbage", "damaged after 2,000 records"),
    "truncated.json.gz": (gzip.compress(array(*[GOOD] * 9))[:-12], "damaged after"),
    "truncated.csv.gz": (gzip.compress(HEAD + b"Q,A\n" * 9)[:-12], "damaged after"),
    "corrupt.csv.gz": (gzip.compress(HEAD)[:12] + b"\xff\xff\xff\xff\xff\xff\xff", "damaged after 0 records"),
    "table.parquet.gz": (gzip.compress(PARQUET), (3000,)),
    "truncated.parquet.gz": (gzip.compress(PARQUET)[:-12], "not valid Parquet"),
    # JSON as a whole
    "truncated.json": (array(GOOD, GOOD)[:-9], "not valid JSON: Unterminated string"),
    "truncated between.json": (array(GOOD, GOOD)[:-1], "not valid JSON: Expecting ',' delimiter"),
    "only the bracket.json": (b"[", "not valid JSON"),
    "empty array.json": (b" [ ] ", ONE_RECORD_NEEDED),
    "trailing comma.json": (b"[" + GOOD + b", ]", "not valid JSON: Expecting value"),
    "leading comma.json": (b"[, " + GOOD + b"]", "not valid JSON"),
    "two commas.json": (b"[" + GOOD + b",, " + GOOD + b"]", "not valid JSON"),
    "missing comma.json": (b"[" + GOOD + b"\n" + GOOD + b"]", "not valid JSON: Expecting ',' delimiter"),
    "semicolon.json": (b"[" + GOOD + b";" + GOOD + b"]", "not valid JSON: Expecting ',' delimiter"),
    "garbage behind.json": (array(GOOD) + b" x", "not valid JSON"),
    "two arrays.json": (array(GOOD) + b"\n" + array(GOOD), "no fields, but is a list"),
    "half a character behind.json": (array(GOOD) + b"\xf0\x9f", "not valid JSON"),
    "nul behind.json": (array(GOOD) + b"\0", "not valid JSON"),
    "object with an array.json": (b'{"version": 1, "data": ' + array(GOOD, GOOD) + b"}", (2,)),
    "object with two arrays.json": (
        b'{"train": [%s], "test": [%s]}' % (GOOD, GOOD),
        "found 2 arrays: 'train, test': write one of them to its own file: jq -c '.train[]' FILE",
    ),
    "object with an empty array.json": (b'{"data": []}', ONE_RECORD_NEEDED),
    "object with an array of texts.json": (b'{"data": ["a", "b"]}', "found a table by columns (data)"),
    "columns.json": (b'{"prompt": ["Q"], "completion": ["A"]}', "to_json(FILE, orient='records', lines=True)"),
    "columns of pandas.json": (
        b'{"prompt": {"5": "Q"}, "completion": {"5": "A"}}',
        "found a table by columns (prompt, c",
    ),
    "split of pandas.json": (
        b'{"columns": ["a"], "index": [5], "data": [["Q"]]}',
        "a table by columns (columns, index",
    ),
    "one record with a list.json": (b'{"prompt": "Q", "completion": "A", "tags": ["a", "b"]}', (1,)),
    "empty object.json": (b"{}", "unknown shape"),
    "object of objects.json": (b'{"1": %s, "2": %s}' % (GOOD, GOOD), "unknown shape: its first record has the fields"),
    "one record.json": (GOOD, (1,)),
    "one pretty record.json": (json.dumps(json.loads(GOOD), indent=4).encode(), (1,)),
    "one record with turns.json": (turns(USER, ASSISTANT), (1,)),
    "one pretty record with tools.json": (
        json.dumps({**json.loads(turns(USER, ASSISTANT)), "tools": [{"name": "f"}]}, indent=1).encode(),
        (1,),
    ),
    "pretty array.json": (json.dumps([json.loads(GOOD)] * 3, indent="\t").encode(), (3,)),
    "pretty record.jsonl": (json.dumps(json.loads(GOOD), indent=4).encode(), (1,)),
    "pretty records.jsonl": (json.dumps(json.loads(GOOD), indent=4).encode() * 2, (2,)),
    "pretty records.json": (json.dumps(json.loads(GOOD), indent=4).encode() * 2, (2,)),
    "pretty records, truncated.jsonl": (PRETTY * 2 + PRETTY[:20], "not valid JSON"),
    "pretty records, one bad.jsonl": (PRETTY + PRETTY.replace(b'"A"', b"[]") + PRETTY, (2, "completion")),
    "lines with commas.jsonl": (GOOD + b",\n" + GOOD + b",\n", (2,)),
    "two commas.jsonl": (GOOD + b",\n,\n" + GOOD, (1, "Extra data", "Expecting value")),
    "glued.jsonl": (GOOD * 3, (3,)),
    "garbage behind the first.jsonl": (lines(GOOD + b" x", GOOD, GOOD), (2, "not valid JSON: Extra data")),
    "lines.json": (lines(GOOD, GOOD, GOOD), (3,)),
    "lines and blank lines.json": (b"\n\n" + b"\r\n\r\n".join([GOOD, GOOD, b"{", GOOD]), (3, "not valid JSON")),
    "lines, the second broken.json": (lines(GOOD, b"{"), (1, "not valid JSON")),
    "lines, the first broken.json": (lines(b"{", GOOD), "not valid JSON: Expecting property name"),
    "lines of arrays.json": (lines(array(GOOD), array(GOOD)), "no fields, but is a list"),
    "array.jsonl": (array(GOOD, GOOD).replace(b"\n", b"") + b"\n", (2,)),
    "pretty array.jsonl": (json.dumps([json.loads(GOOD)], indent=1).encode(), (1,)),
    "array over lines.jsonl": (array(GOOD, GOOD), (2,)),
    "array, a record on each line.jsonl": (b"\n[ \n" + GOOD + b",\n" + GOOD + b"\n]\n", (2,)),
    "array, a record on each line.ndjson": (lines(b"[", GOOD, b"]"), (1,)),
    "lines, the first broken.jsonl": (lines(b"[1", GOOD), (1, "not valid JSON")),
    "arrays on lines.jsonl": (lines(b"[" + GOOD + b"]", b"[" + GOOD + b"]"), "no fields, but is a list"),
    "number.json": (b"42", "its first record has no fields, but is a int"),
    "string.json": (b'"hello"', "no fields, but is a str"),
    "null.json": (b"null", "no fields, but is a NoneType"),
    "true.json": (b"true\n", "no fields, but is a bool"),
    "nan.json": (b"NaN", "no fields, but is a float"),
    "comment.json": (b"// data\n" + array(GOOD), "not valid JSON"),
    "python.json": (b"[{'prompt': 'Q', 'completion': 'A'}]", "not valid JSON: Expecting property name"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
    "deep and closed.json": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "deep object.json": (b'{"a":' * 100_000, "nested too deeply"),
    "form feed.json": (b"\f" + array(GOOD), "not valid JSON"),
    # records in an array
    "odd records.json": (
        array(GOOD, b"null", b"1.5e+3", b"-7", b'"x"', b"[]", b"[[]]", b"true", b"{}", GOOD),
        (2, "NoneType", "float", "int", "str", "list", "list", "bool", "found "),
    ),
    "nan in array.json": (array(GOOD, answer(b"NaN")), (1, "completion: NaN is not a string")),
    "nan in an unused field.jsonl": (lines(GOOD[:-1] + b', "score": NaN}', GOOD[:-1] + b', "x": [-Infinity]}'), (2,)),
    "nan in arguments.jsonl": (
        lines(turns(USER, b'{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": NaN}}]}')),
        (0, "arguments: contains a value of type float"),
    ),
    "long number in array.json": (array(GOOD, b"1" * 5000), "not valid JSON: Exceeds the limit"),
    "raw newline in array.json": (array(GOOD, answer(b'"a\nb"')), "not valid JSON: Invalid control"),
    "windows array.json": (array(GOOD, GOOD).replace(b"\n", b"\r\n"), (2,)),
    # records on lines
    "truncated.jsonl": (lines(GOOD, GOOD)[:-10], (1, "not valid JSON: Unterminated string")),
    "no newline at the end.jsonl": (lines(GOOD) + GOOD, (2,)),
    "windows.jsonl": (lines(GOOD, b"", GOOD).replace(b"\n", b"\r\n"), (2,)),
    "old mac.jsonl": (lines(GOOD, GOOD).replace(b"\n", b"\r"), (2,)),
    "two on a line.jsonl": (lines(GOOD, GOOD + GOOD, GOOD + b", " + GOOD), (1, "Extra data", "Extra data")),
    "comma behind.jsonl": (lines(GOOD, GOOD + b","), (1, "Extra data")),
    "constants.jsonl": (
        lines(GOOD, answer(b"NaN"), answer(b"Infinity"), answer(b"-Infinity")),
        (1, *(f"completion: {value} is not a string" for value in ("NaN", "Infinity", "-Infinity"))),
    ),
    "numbers.jsonl": (
        lines(GOOD, answer(b"5"), answer(b"1e999"), answer(b"1" * 5000), answer(b"0." + b"1" * 5000), answer(b"01")),
        (
            3,  # 5 and 0.1...
            "Infinity is not a string",
            "Exceeds the limit",
            "delimiter",
        ),
    ),
    "long integer.jsonl": (lines(GOOD, answer(b"1" * 400)), (2,)),
    "nulls.jsonl": (
        lines(GOOD, answer(b"null"), b'{"prompt": null, "completion": null}', b"null"),
        (1, "completion: null is not a string", "prompt: null is not a string", "found NoneType"),
    ),
    "records of other types.jsonl": (
        lines(GOOD, b"[]", b'"Q"', b"0", b"false", b"{}", b"[" + GOOD + b"]"),
        (1, "found list", "found str", "found int", "found bool", "found ", "found list"),
    ),
    "lists for texts.jsonl": (
        lines(GOOD, *map(answer, (b"[]", b'["A"]', b'[["A"]]', b'{"text": "A"}', b"[5]"))),
        (
            1,
            "completion is not a list of turns",
            *(f"completion: a turn needs a role and content, found {value}" for value in ('"A"', '["A"]')),
            "completion: a turn has no role: its fields are text",
            "completion: a turn needs a role and content, found 5",
        ),
    ),
    "deep.jsonl": (
        lines(
            GOOD,
            *(answer(b"[" * n + b"]" * n) for n in (100, 5_000, 100_000)),
            *(answer(b'{"a":' * n + b"1" + b"}" * n) for n in (100, 100_000)),
        ),
        (1, "content, found [[[", "nested too deeply", "nested too deeply", "a turn has no role", "nested too deeply"),
    ),
    "duplicate keys.jsonl": (lines(b'{"prompt": 5, "prompt": "Q", "completion": "A"}'), (1,)),
    "other fields.jsonl": (
        lines(GOOD, GOOD, b'{"text": ""}', b'{"Prompt": "", "completion": ""}', rb'{"a\nb\ud800": 1, "\u65e5": 2}'),
        (2, "found text", "found Prompt, completion", r"found a\nb\ud800, 日"),
    ),
    "strange fields.jsonl": (lines(b'{"a\\nb": 1, "\\ud800": 2}'), r"has the fields a\nb, \ud800: map them"),
    "lone surrogates.jsonl": (
        lines(GOOD, answer(rb'"\ud83d"'), answer(rb'"\ude00\ud83d"'), answer(rb'"\ud83d\ude00"')),
        (2, HALF, HALF),
    ),
    "noncharacters.jsonl": (
        lines(GOOD, *(answer(rf'"a\u{code}b"'.encode()) for code in ("FFFF", "FDD0"))),
        (1, *(f"contains a reserved Unicode noncharacter (U+{code})" for code in ("FFFF", "FDD0"))),
    ),
    "control characters.jsonl": (
        lines(GOOD, *(answer(rf'"a\u{code}b"'.encode()) for code in ("0000", "0007", "001B", "007F", "009F"))),
        (6,),
    ),
    "white space.jsonl": (lines(answer('"a\u2028b\u0085c\u00a0\ufeff"'.encode()), answer(rb'"\t\n\f\r.\u200b"')), (2,)),
    "raw control characters.jsonl": (lines(GOOD, answer(b'"a\x01b"'), answer(b'"a\tb"')), (1, "Invalid", "Invalid")),
    "empty texts.jsonl": (
        lines(GOOD, answer(b'""'), answer(rb'" \n\t "'), b'{"prompt": " ", "completion": "A"}', answer(rb'"\u2028"')),
        (1, *["an assistant message is empty"] * 2, "a user message is empty", "an assistant message is empty"),
    ),
    "bad escapes.jsonl": (lines(GOOD, answer(rb'"\x"'), answer(rb'"\u12"')), (1, "Invalid", "Invalid")),
    # turns
    "turns.jsonl": (
        lines(
            turns(USER, ASSISTANT),
            turns(),
            turns(USER),
            turns(ASSISTANT, USER),
            turns(b"null"),
            turns(b'"Q"', b'"A"'),
            turns(b'["user", "Q"]'),
            turns(b"5"),
            turns(b"{}"),
            turns(b'{"role": "user"}'),
            turns(b'{"content": "Q"}'),
            turns(USER, b'{"role": "alien", "content": "A"}'),
            turns(USER, b'{"role": null, "content": "A"}'),
            turns(USER, b'{"role": ["assistant"], "content": "A"}'),
            turns(USER, b'{"role": "assistant", "content": null}'),
            turns(USER, b'{"role": "assistant", "content": {"text": "A"}}'),
            turns(USER, ASSISTANT, ASSISTANT),
            turns(USER, USER, ASSISTANT),
            turns(USER, b'{"role": "assistant", "content": [["A"]]}'),
            b'{"messages": null}',
            b'{"messages": {"role": "user"}}',
            b'{"messages": "Q"}',
            b'{"messages": "[]"}',
            b'{"messages": 7}',
        ),
        (
            3,
            "messages is not a list of turns",
            "no assistant message",
            "the first message is from the assistant",
            *["a turn needs a role and content"] * 4,
            "a turn has no role: its fields are ",
            "a turn has no content: its fields are role",
            "a turn has no role: its fields are content",
            "unknown role 'alien'",
            "the role null is not a string",
            'the role ["assistant"] is not a string',
            "content: null is not a string",
            'content: {"text": "A"} is not a string',
            'content: [["A"]] is not a string',
            "messages is not a list of turns",
            "messages is not a list of turns",
            "messages: not valid JSON",
            "messages is not a list of turns",
            "messages is not a list of turns",
        ),
    ),
    # tables
    "good.csv": (HEAD + b'Q,A\n"Q, ""quoted""\nover lines","A"\n', (2,)),
    "header only.csv": (HEAD, ONE_RECORD_NEEDED),
    "ragged.csv": (HEAD + b"Q,A\nQ\nQ,A,B\n\nQ,A\n", (2, "1 columns where the header has 2", "3 columns where")),
    "unclosed quote.csv": (HEAD + b'Q,A\n"Q,A\nQ,A\n', ":3: the quote opened here is never closed"),
    "unclosed header.csv": (b'prompt,"completion\nQ,A\n', ":1: the header is not valid CSV"),
    "stray quote.csv": (HEAD + b'Q,A\n"Q"x,A\nQ,A"B\n', (2, "not valid CSV")),
    "duplicate header.csv": (b"prompt,completion,prompt\nQ,A,Q\n", ":1: the header is ['prompt'"),
    "index without a name.csv": (b",prompt,completion\n0,Q,A\n", (1,)),
    "two empty names.csv": (b",,prompt,completion\n0,0,Q,A\n", ":1: the header is ['index', '', 'prompt'"),
    "blank header.csv": (b"prompt,completion, \nQ,A,B\n", ":1: the header is"),
    "no header.csv": (b"Q,A\nQ,B\n", "unknown shape: its first record has the fields Q, A"),
    "nul.csv": (HEAD + b"Q,A\nQ,A\0B\nQ,A\n", (3,)),
    "spaces.csv": (b'prompt, completion\n"Q, please", "A, sir"\n', (1,)),
    "blank rows.csv": (HEAD + b"\nQ,A\n,,\n,\nQ,A\n", (2,)),
    "backslash.csv": (HEAD + b'Q,A\n"Say \\"x\\"",A\n', (1, 'a quote within quotes must be doubled: ""')),
    "latin-1.csv": (HEAD + "Q,A\nQ,café\nQ,A\n".encode("latin-1"), (2, f"completion: {HALF}")),
    "latin-1 header.csv": (b"prompt,completion,caf\xe9\nQ,A,B\n", (1,)),
    "latin-1 header unknown.csv": (b"caf\xe9,b\nQ,A\n", r"the fields caf\udce9, b"),
    "semicolon.csv": (b"prompt;completion\nQ;A, or B\n", (1,)),
    "tabs.csv": (b"prompt\tcompletion\nQ\tA, or B\n", (1,)),
    "pipes.csv": (b"prompt|completion\nQ|A\n", (1,)),
    "wrong delimiter.csv": (b"prompt:completion\nQ:A\n", "unknown shape: its first record has the fields prompt:comp"),
    "commas.tsv": (HEAD + b"Q,A\n", "unknown shape: its first record has the fields prompt,completion"),
    "good.tsv": (b"prompt\tcompletion\nQ, Q\tA\n", (1,)),
    "windows.csv": (HEAD.replace(b"\n", b"\r\n") + b'Q,A\r\n"Q\r\nQ",A\r\n', (2,)),
    "old mac.csv": (HEAD.replace(b"\n", b"\r") + b"Q,A\rQ,A\r", ":1: the header is not valid CSV"),
    "empty cells.csv": (HEAD + b"Q,A\nQ,\n,A\n,\n", (1, *["message is empty"] * 2)),
    "json.csv": (lines(GOOD, GOOD), ":1: the header is not valid CSV"),
    "line separators.csv": (HEAD + 'Q,"a\u2028b"\nQ,a\x0cb\x85c\n'.encode(), (2,)),
    "json cells.csv": (
        b"messages\n" + b"".join(b'"%s"\n' % c.replace(b'"', b'""') for c in (array(USER, ASSISTANT), b"[{", b"x")),
        (1, "messages: not valid JSON", "messages: not valid JSON"),
    ),
    # Parquet
    "good.parquet": (PARQUET, (3000,)),
    "not one.parquet": (lines(GOOD), "not valid Parquet"),
    "magic only.parquet": (b"PAR1PAR1", "not valid Parquet"),
    "truncated.parquet": (PARQUET[:-100], "not valid Parquet"),
    "no start.parquet": (PARQUET[100:], "not valid Parquet"),
    "footer.parquet": (PARQUET[:-8] + b"\xff\xff\xff\x7f" + PARQUET[-4:], "not valid Parquet"),
    "pages.parquet": (b"PAR1" + bytes(len(PARQUET) // 2) + PARQUET[4 + len(PARQUET) // 2 :], "not valid Parquet"),
    "no rows.parquet": (make_parquet([{"prompt": "Q", "completion": "A"}][:0]), ONE_RECORD_NEEDED),
    "nulls.parquet": (
        make_parquet([{"prompt": p, "completion": c} for p, c in (("Q", "A"), ("Q", None), (None, "A"))]),
        (1, "completion: null", "prompt: null"),
    ),
    "nested.parquet": (make_parquet(NESTED), (1, "a turn has no content: its fields are role")),
    "bytes.parquet": (make_parquet([{"prompt": "Q", "completion": b"A\xff"}]), (0, "is not a string")),
    "numbers.parquet": (make_parquet([{"prompt": "Q", "completion": 1.5}]), (1,)),
    "bad text.parquet": (
        make_parquet([{"prompt": "Q", "completion": "caf@"}], compression=None, use_dictionary=False).replace(
            b"caf@", b"caf\xe9"
        ),
        "not valid Parquet: 'utf-8' codec",
    ),
    # names
    "data.txt": (lines(GOOD), "unknown file type '.txt'"),
    "data": (lines(GOOD), "unknown file type ''"),
    "data.jsonl.bz2": (lines(GOOD), "unknown file type '.bz2'"),
    "DATA.JSONL": (lines(GOOD), (1,)),
    "data.ndjson": (lines(GOOD), (1,)),
}


def assert_one_line(message: str) -> None:
    """Also one that can be printed and written to a file."""
    assert "\n" not in message
    assert "\r" not in message
    assert message.encode("utf-8")


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(tmp_path: Path, name: str) -> None:
    content, expected = CORPUS[name]
    path = tmp_path / name
    path.write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(UserError) as raised:
            read(path)
        message = str(raised.value)
        assert message.startswith(f"{path}:")
        assert expected in message
        assert len(message) < len(str(path)) + 600
        assert_one_line(message)
        return
    count, *reasons = expected
    good, bad = read(path)
    assert (len(good), len(bad)) == (count, len(reasons)), [item.reason for item in bad]
    for item, reason in zip(bad, reasons, strict=True):
        assert str(reason) in item.reason
        assert item.file == str(path)
        assert len(item.reason) < 300
        assert_one_line(item.reason)
    found = [item.line for item in good] + [item.line for item in bad]
    assert len(set(found)) == len(found)


def test_the_corpus_has_sixty_cases_and_more() -> None:
    assert len(CORPUS) >= 60


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nothing")
    for name, what in (("folder.json", "Is a directory"), ("nothing.csv", "No such file"), ("link.jsonl", "No such")):
        with pytest.raises(UserError, match=f"{name}: cannot be read after 0 records: .*{what}") as raised:
            read(tmp_path / name)
        assert_one_line(str(raised.value))


@pytest.mark.parametrize("delimiter", ["", ",,", "\\t", '"', "\n"])
def test_a_delimiter_is_one_character(tmp_path: Path, delimiter: str) -> None:
    (tmp_path / "a.csv").write_bytes(HEAD + b"Q,A\n")
    with pytest.raises(UserError, match=r"^data\.delimiter: .* cannot separate the columns of .*a\.csv: give one"):
        read(tmp_path / "a.csv", delimiter=delimiter)


def test_a_delimiter_goes_before_what_is_found(tmp_path: Path) -> None:
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_text("prompt:completion\n1,1,1\t1:A\n")
        ((conversation,), _) = read(tmp_path / name, delimiter=":")
        assert conversation.prompt() == "1,1,1\t1"


# ---- Lines and positions


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(GOOD, b"", b"{", GOOD))
    assert [line for line, _ in read_raw(path)] == [1, 3, 4]
    path = tmp_path / "a.csv"
    path.write_bytes(b'"a\nb",c\n1,2\n"1\n1\n1",2\n\n1\n3,4\n')
    found = list(read_raw(path))
    assert [line for line, _ in found] == [3, 4, 8, 9]
    assert found[0] == (3, {"a\nb": "1", "c": "2"})
    assert isinstance(found[2][1], BadRecord)
    path = tmp_path / "a.json"
    path.write_bytes(b"\n\n" + array(GOOD, b"1", GOOD))
    assert [line for line, _ in read_raw(path)] == [1, 2, 3]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_ticks_go_up_to_the_size(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    record = {"prompt": "Q" * 100, "completion": "A"}
    write_as(path, [{**record, "prompt": f"{n} {record['prompt']}"} for n in range(2000)])
    ticks: list[int] = []
    assert len(list(read_raw(path, on_progress=ticks.append))) == 2000
    assert len(ticks) >= 2000 // 256
    assert ticks[-1] == path.stat().st_size
    assert max(ticks) == ticks[-1]


def test_records_come_before_the_file_has_been_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + b"x" * 4_000_000)
    assert next(read_raw(tmp_path / "a.jsonl")) == (1, json.loads(GOOD))


# ---- Long lines

CHILD = """
import resource, sys, time
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
from nanoft import UserError
from nanoft.config import DataConfig
from nanoft.data.formats import Conversation
from nanoft.data.formats import read_file
start = time.process_time()
try:
    _, *items = read_file(Path(sys.argv[1]), DataConfig())
    print("".join("+" if isinstance(item, Conversation) else "-" for item in items))
except UserError as error:
    print(error)
assert time.process_time() - start < 3
"""
LONG = 100_000_000
LONG_LINES = {
    "line.jsonl": (b"%s\n{", b"}\n%s\n", r"^\+-\+$"),
    "text.jsonl": (b'%s\n{"prompt": "', b'", "completion": "A"}\n%s\n', r"^\+-\+$"),
    "spaces.jsonl": (b"%s\n", b"\n%s\n", r"^\+-\+$"),
    "array.json": (b'[%s,\n{"prompt": "', b'"},\n%s]', r"^\+-\+$"),
    "object.json": (b'{"n": 1, "data": "', b'"}', r"unknown shape"),
    "cell.csv": (b"prompt,completion\nQ,A\nQ,", b"\nQ,A\n", r"^\+-\+$"),
    "header.csv": (b"prompt,", b"\nQ,A\n", r"the header is not valid CSV"),
    "quote.csv": (b'prompt,completion\nQ,A\nQ,"', b'"\nQ,A\n', r"^\+-\+$"),
}


@pytest.mark.parametrize("name", rest_is_slow(LONG_LINES, "line.jsonl"))
def test_a_line_of_100_megabytes_takes_little_time_and_memory(tmp_path: Path, name: str) -> None:
    before, behind, expected = LONG_LINES[name]
    path = tmp_path / name
    with open(path, "wb") as file:
        file.write(before.replace(b"%s", GOOD))
        filling = b" " if name.startswith("spaces") else b"x"
        for _ in range(100):
            file.write(filling * (LONG // 100))
        file.write(behind.replace(b"%s", GOOD))
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, timeout=30)
    path.unlink()
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(expected, done.stdout.strip()), done.stdout[:300]


# ---- The same records in every kind of file


def write_as(path: Path, records: list[dict[str, str]]) -> None:
    """By the standard library's own writers, and pyarrow's."""
    kind = path.suffixes[0]
    if kind == ".json":
        content = json.dumps(records, ensure_ascii=len(records) % 2 == 0, indent=len(records) % 3 or None).encode()
    elif kind == ".jsonl":
        content = "".join(json.dumps(r, ensure_ascii=len(records) % 2 == 0) + "\n" for r in records).encode()
    elif kind == ".parquet":
        content = make_parquet(records)
    else:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(records[0]), delimiter="\t" if kind == ".tsv" else ",", quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(records)
        content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def examples(number: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=slow)


TEXT = st.text(max_size=12)  # every character but halves
KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")


# A row of empty cells is a blank line.
ROWS = st.fixed_dictionaries({"a": TEXT, "日 b": TEXT, "c": TEXT}).filter(lambda row: any(row.values()))


@examples(60)
@given(rows=st.lists(ROWS, min_size=1, max_size=5))
def test_every_kind_of_file_gives_the_same_records(scratch: Path, rows: list[dict[str, str]]) -> None:
    for kind in KINDS:
        path = scratch / f"rows{kind}"
        write_as(path, rows)
        assert [record for _, record in read_raw(path)] == rows, kind


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@examples(60)
@given(records=st.lists(JSON_VALUES, min_size=1, max_size=5), indent=st.sampled_from([None, 0, 3]), plain=st.booleans())
def test_an_array_is_read_as_by_json(scratch: Path, records: list[Any], indent: int | None, plain: bool) -> None:
    path = scratch / "pieces.json"
    text = json.dumps(records, indent=indent, ensure_ascii=plain)
    path.write_text(text, encoding="utf-8")
    assert repr([record for _, record in read_raw(path)]) == repr(json.loads(text))


@examples(40)
@given(
    records=st.lists(st.dictionaries(TEXT, JSON_VALUES, max_size=3), min_size=2, max_size=4),
    cut=st.integers(1, 10_000),
)
def test_a_truncated_array_never_passes(scratch: Path, records: list[Any], cut: int) -> None:
    path = scratch / "cut.json"
    content = json.dumps(records).encode()
    path.write_bytes(content[: -1 - cut % (len(content) - 1)])
    with within(5), pytest.raises(UserError, match="not valid JSON"):
        list(read_raw(path))


def assert_ends_well(path: Path) -> None:
    """In records, good or bad, or in a line that names the file."""
    try:
        with within(5):
            shape, *items = read_file(path, DataConfig())
    except UserError as error:
        shape, items = str(error), []
        messages = [shape]
    else:
        messages = [item.reason for item in items if isinstance(item, Rejected)]
    assert isinstance(shape, str)
    assert items or shape.startswith(f"{path}:")
    for message in messages:
        assert_one_line(message)


@examples(250)
@given(
    content=st.binary(max_size=200), start=st.sampled_from([b"", b"[", b"{", b"PAR1", b"a,b\n", b"\x1f\x8b", b'[{"'])
)
def test_random_bytes_end_in_records_or_one_line(scratch: Path, content: bytes, start: bytes) -> None:
    for kind in (*KINDS, ".parquet.gz"):
        path = scratch / f"noise{kind}"
        path.write_bytes(start + content)
        assert_ends_well(path)


@examples(120)
@given(
    kind=st.sampled_from(KINDS),
    changes=st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 30),
)
def test_damaged_files_end_in_records_or_one_line(
    scratch: Path, kind: str, changes: list[tuple[int, int]], cut: int
) -> None:
    path = scratch / f"damaged{kind}"
    write_as(path, [{"prompt": f"Question {n}", "completion": "Answer"} for n in range(8)])
    content = bytearray(path.read_bytes())
    for place, byte in changes:
        content[place % len(content)] = byte
    path.write_bytes(content[: len(content) - cut])
    assert_ends_well(path)
