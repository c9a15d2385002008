"""Hashes of files: of small ones, of large ones in parallel, and remembered while a file does not change."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanoft import UserError
from nanoft.io.atomic import replace_file

PIECE = 8 << 20  # bytes hashed at once
SETTLED = 2_000_000_000  # nanoseconds; a file that was modified more recently may change again unnoticed


def hash_named_files(paths: Iterable[Path]) -> str:
    """One SHA-256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)  # updates it
    return digest.hexdigest()


def hash_content(path: Path) -> str:
    """SHA-256 over the size of a file and the hashes of its pieces, which are computed in parallel."""

    def hash_piece(start: int) -> bytes:
        with open(path, "rb") as stream:
            stream.seek(start)
            return hashlib.sha256(stream.read(PIECE)).digest()

    try:
        size = os.path.getsize(path)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = b"".join(pool.map(hash_piece, range(0, size, PIECE)))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return hashlib.sha256(json.dumps([size]).encode() + digests).hexdigest()


def hash_remembered(files: Sequence[Path], memory: Path) -> str:
    """One SHA-256 over the `hash_content` of files; a file that did not change since is not read again.

    As git does it: size, inode, mtime and ctime in nanoseconds must all be equal, and the file must have been at rest
    when it was hashed. `memory` is a JSON file with the hashes of earlier calls.
    """
    digests: list[str] = []
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    for file in files:
        state, before = _state(file), known.get(os.path.abspath(file))
        if state is not None and isinstance(before, list) and before[:-1] == state:
            digests.append(str(before[-1]))
            continue
        digests.append(hash_content(file))
        if state is not None:
            known[os.path.abspath(file)] = [*state, digests[-1]]
    with contextlib.suppress(OSError):  # without it, the files are hashed again
        memory.parent.mkdir(parents=True, exist_ok=True)
        replace_file(memory, json.dumps(dict(list(known.items())[-1000:])).encode())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _state(file: Path) -> list[int] | None:
    """What changes whenever a file does; None if it was modified too recently."""
    try:
        stat = os.stat(file)
    except OSError:
        return None  # hash_content raises
    at_rest = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns] if at_rest else None
