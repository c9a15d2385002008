"""Hashes of files, by hand; and that a file which may have changed is always read again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from nanoft import UserError
from nanoft.io import atomic
from nanoft.io.atomic import hash_content, hash_named_files, hash_remembered


def test_hash_of_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same by hand."""
    monkeypatch.setattr(atomic, "PIECE", 4)
    (tmp_path / "a").write_bytes(b"abcdefghi")
    pieces = b"".join(hashlib.sha256(piece).digest() for piece in (b"abcd", b"efgh", b"i"))
    assert hash_content(tmp_path / "a") == hashlib.sha256(b"[9]" + pieces).hexdigest()
    (tmp_path / "a").write_bytes(b"")
    assert hash_content(tmp_path / "a") == hashlib.sha256(b"[0]").hexdigest()
    with pytest.raises(UserError, match="nothing: cannot be read"):
        hash_content(tmp_path / "nothing")


def test_a_file_at_rest_is_hashed_once_and_one_that_was_touched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "SETTLED", 0)
    read: list[str] = []
    real, memory = hash_content, tmp_path / "home" / "hashes.json"
    monkeypatch.setattr(atomic, "hash_content", lambda file: read.append(file.name) or real(file))
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("one")
    b.write_text("two")
    first = hash_remembered([a, b], memory)
    assert hash_remembered([a, b], memory) == first != hash_remembered([b, a], memory)
    assert read == ["a", "b"]
    stat = a.stat()
    a.write_text("ONE")
    os.utime(a, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size, the same time: the inode's time tells
    assert hash_remembered([a, b], memory) != first
    a.write_text("one")
    assert hash_remembered([a, b], memory) == first
    assert read == ["a", "b", "a", "a"]
    for damage in ("{", "[]", '{"x": 1}', "\\"):
        memory.write_text(damage)
        assert hash_remembered([a, b], memory) == first
    with pytest.raises(UserError, match="nothing: cannot be read"):
        hash_remembered([tmp_path / "nothing"], memory)


def test_a_file_that_has_just_changed_is_not_believed_to_be_at_rest(tmp_path: Path) -> None:
    memory = tmp_path / "hashes.json"
    (tmp_path / "a").write_text("one")
    hash_remembered([tmp_path / "a"], memory)
    assert memory.read_text() == "{}"


def test_a_hash_tells_names_and_contents_apart(tmp_path: Path) -> None:
    for name, content in (("a", "1"), ("b", "2"), ("ab", "1"), ("c", "1")):
        (tmp_path / name).write_text(content)
    groups = [["a"], ["b"], ["c"], ["ab"], ["a", "b"], ["b", "a"], []]
    digests = [hash_named_files([tmp_path / name for name in group]) for group in groups]
    assert len(set(digests)) == len(groups)
    (tmp_path / "a").write_text("3")
    assert hash_named_files([tmp_path / "a"]) != digests[0]
