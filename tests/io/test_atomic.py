"""Files that are whole or not there; tests/test_checkpoint.py cuts the power between any two operations."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from nanoft.io.atomic import hash_file, replace_file, write_file


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
