"""Atomic writes of files and directories; hashes, and that a changed file is always hashed again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from nanoft import UserError
from nanoft.io import atomic
from nanoft.io.atomic import (
    hash_file,
    hash_files,
    new_directory,
    replace_file,
    write_file,
    write_json,
)

# --- files


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


# --- directories


def files(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def test_a_new_directory_is_complete_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with pytest.raises(ValueError, match="broken"), new_directory(out) as staging:  # noqa: PT012 (left by an error)
        (staging / "x").write_text("1")
        raise ValueError("broken")
    assert files(tmp_path) == {}
    with new_directory(out) as staging:
        (staging / "x").write_text("1")
        assert not out.exists()
    assert files(tmp_path) == {"a/out/x": "1"}
    with pytest.raises(UserError, match=r"^--out: .*out: already exists"), new_directory(out):
        pass


def test_only_the_lock_of_another_process_is_reported_as_one(tmp_path: Path) -> None:
    """Output to a full pipe that does not block raises the same exception."""
    with pytest.raises(UserError, match="cannot be written: Resource"), new_directory(tmp_path / "out"):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    with (
        new_directory(tmp_path / "out"),
        pytest.raises(UserError, match="another process is writing it"),
        new_directory(tmp_path / "out"),
    ):
        pass


def test_a_directory_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    (tmp_path / ".tmp-out-1").mkdir()  # of a process that was killed
    for content in ("old", "new"):
        with new_directory(tmp_path / "out", replace=True) as staging:
            (staging / "x").write_text(content)
        assert files(tmp_path) == {"out/x": content}
    with pytest.raises(ValueError, match="broken"), new_directory(tmp_path / "out", replace=True) as staging:  # noqa: PT012
        (staging / "x").write_text("newer")
        raise ValueError("broken")
    assert files(tmp_path) == {"out/x": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- hashes


def test_a_hash_of_files_is_that_of_their_contents(tmp_path: Path) -> None:
    """Against hashlib."""
    contents = [b"abcdefghi", b""]
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    digests = "".join(hashlib.sha256(content).hexdigest() for content in contents)
    assert hash_files(paths) == hashlib.sha256(digests.encode()).hexdigest()
    with pytest.raises(UserError, match="nothing: cannot be read"):
        hash_files([tmp_path / "nothing"])


def test_a_file_at_rest_is_hashed_once_and_one_that_was_touched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "SETTLED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    read: list[str] = []
    real, memory = hash_file, tmp_path / "home" / "nanoft" / "hashes.json"
    monkeypatch.setattr(atomic, "hash_file", lambda file: read.append(file.name) or real(file))
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("one")
    b.write_text("two")
    first = hash_files([a, b])
    assert hash_files([a, b]) == first != hash_files([b, a])
    assert read == ["a", "b"]
    stat = a.stat()
    a.write_text("ONE")
    os.utime(a, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size, the same time: the inode's time tells
    assert hash_files([a, b]) != first
    a.write_text("one")
    assert hash_files([a, b]) == first
    assert read == ["a", "b", "a", "a"]
    for damage in ("{", "[]", '{"x": 1}', "\\"):
        memory.write_text(damage)
        assert hash_files([a, b]) == first


def test_a_file_that_has_just_changed_is_not_believed_to_be_at_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "a").write_text("one")
    hash_files([tmp_path / "a"])
    assert not (tmp_path / "home").exists()
