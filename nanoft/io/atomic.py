"""Writing files so that a crash or a power loss leaves the old content or the new one, never a mixture.

A new file is fsynced before anything refers to it, a small file is replaced by renaming a complete one over it, and a
directory is fsynced after its entries change, because a file's fsync does not cover its name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a new file and fsync it; return its size in bytes and SHA-256, computed while writing."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the umask decides who may read it
    try:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            write_all(descriptor, piece)
        os.fsync(descriptor)
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves data in the drive's cache
            with contextlib.suppress(OSError):  # not supported by every volume
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`; os.write may write less than it is given."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]


def write_json(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write a new JSON file; see `write_file`."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return write_file(path, [text.encode("utf-8", "backslashreplace")])  # a lone surrogate becomes \udcNN


def hash_file(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file atomically."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    write_file(temporary, [content])
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power loss, if the file system supports that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync directories
            raise
    finally:
        os.close(descriptor)
