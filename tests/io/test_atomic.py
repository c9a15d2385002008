"""Files that are written: whole or not at all, with the bytes, the hash and the permissions that are expected."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from nanoft.io.atomic import hash_file, replace_file, write_file, write_json


def test_a_new_file_never_replaces_one_and_obeys_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "x", [b"one"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "x", [b"two"])
    assert (tmp_path / "x").read_bytes() == b"one"


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:3]))
    content = bytes(range(200))
    noted = write_file(tmp_path / "x", [content[:77], content[77:]])
    assert (tmp_path / "x").read_bytes() == content
    assert noted == hash_file(tmp_path / "x") == {"size": 200, "sha256": hashlib.sha256(content).hexdigest()}


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_bytes(b"old")
    replace_file(tmp_path / "best.json", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"best.json": b"new"}


def test_json_is_readable_and_holds_any_file_name(tmp_path: Path) -> None:
    content = {"name": "Grüße", "file": os.fsdecode(b"l\xe4ufe"), "n": [1, 2.5, None]}
    noted = write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "Grüße" in text
    assert text.endswith("}\n")
    assert noted == hash_file(tmp_path / "x.json")


def test_a_file_is_what_its_hash_says(tmp_path: Path) -> None:
    pieces = [b"abc", memoryview(b"defg"), b""]
    expected = {"size": 7, "sha256": hashlib.sha256(b"abcdefg").hexdigest()}
    assert write_file(tmp_path / "a", pieces) == expected == hash_file(tmp_path / "a")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", pieces)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "a", b"old")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    replace_file(tmp_path / "a", b"newer")  # what was left aside is in nobody's way
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"newer"
