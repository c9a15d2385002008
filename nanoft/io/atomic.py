"""TODO."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterable
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
        _sync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`; os.write may write less than it is given."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]


def hash_file(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file so that a reader sees the old content or the new one, never a mixture."""
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    aside.unlink(missing_ok=True)
    write_file(aside, [content])
    os.replace(aside, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power loss, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not sync directories
            raise
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """fsync; on macOS that leaves the drive's own cache, and F_FULLFSYNC does not."""
    os.fsync(descriptor)
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):  # not every volume knows it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
