"""Built once, kept, and checked: a directory of files under a hash of everything that they depend on.

What takes minutes to make (a tokenized data set) is made once, in the user's cache directory. It is built aside and
made real by one rename, with a hash of each file in a manifest that is written last. An entry that does not match its
manifest, whatever happened to it, is built again and never used. A user without a home, or with one that may not be
written, has it made for this process alone.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.checkpoint import MANIFEST
from nanoft.io.atomic import replace_file, sync_directory

KEEP = 16  # entries; the ones that were not used for longest go
HASH_AT_ONCE = 8 << 20  # bytes
DEAD_AFTER = 86400  # seconds after which a build that did not end is swept away
MEMO = "hashes.json"  # of files that have not changed since they were hashed
KNOWN = 1000  # files whose hashes are kept
SETTLED = 2_000_000_000  # nanoseconds: a file that changed later than this before it was hashed may change unnoticed


def cached(key: str, build: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    """The entry of that key, built by `build(directory)` if it is not there, or not whole.

    Raises:
        UserError: the cache cannot be written; or whatever `build` raises.
    """
    home = cache_home()
    entry = home / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        if not _is_whole(entry):
            if os.path.lexists(entry):
                say(f"warning: {entry}: the cached data is damaged: it is built again")
            try:
                home.mkdir(parents=True, exist_ok=True)
                aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=home))
            except OSError as error:
                say(f"warning: {home}: the cache cannot be written ({error.strerror}): the data is prepared for once")
                return _build_for_once(build)
            _build(aside, entry, build)
            _prune(home, entry)
        with contextlib.suppress(OSError):  # a cache that somebody else keeps
            os.utime(entry)  # used now
    except OSError as error:
        raise UserError(f"{home}: the cache cannot be written ({error.strerror}): set XDG_CACHE_HOME") from None
    return entry


def cache_home() -> Path:
    """In the user's cache directory; for a user without a home a place where nothing can be kept."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoft"
    except RuntimeError:  # no fixed name in the shared temporary directory: others could put data there
        return Path(os.devnull) / "nanoft"


def _build_for_once(build: Callable[[Path], None]) -> Path:
    entry = Path(tempfile.mkdtemp(prefix="nanoft-"))
    atexit.register(shutil.rmtree, entry, ignore_errors=True)
    build(entry)
    return entry


def _build(aside: Path, entry: Path, build: Callable[[Path], None]) -> None:
    try:
        build(aside)
        hashes = {path.name: hash_files([path]) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps(hashes), encoding="utf-8")
        for path in aside.iterdir():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        if not _is_whole(entry):  # else another process has built the same meanwhile
            shutil.rmtree(entry, ignore_errors=True)
            os.rename(aside, entry)
        sync_directory(entry.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_whole(entry: Path) -> bool:
    """Whether the entry is there, every byte as it was written."""
    try:
        hashes = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        return {path.name for path in entry.iterdir()} == {MANIFEST, *hashes} and all(
            hash_files([entry / name]) == digest for name, digest in hashes.items()
        )
    except (OSError, ValueError, UserError, TypeError):
        return False


def _prune(home: Path, newest: Path) -> None:
    """Let go of what was not used for longest, and of what builds that died left behind."""
    entries = sorted((p for p in home.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    whole = [path for path in entries if not path.name.startswith(".tmp-")]
    dead = [p for p in entries if p.name.startswith(".tmp-") and time.time() - p.stat().st_mtime > DEAD_AFTER]
    for path in [*whole[KEEP:], *dead]:
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)


def hash_unless_known(files: Sequence[Path]) -> str:
    """One SHA-256 over the hashes of files; one that has not been touched since it was hashed is not read again.

    As git does it: size, inode, and the times of the last change to content and to inode, in nanoseconds, must all be
    those of the last time, and the file must have been at rest by then.

    Raises:
        UserError: a file cannot be read.
    """
    memo, digests = cache_home() / MEMO, []
    known = _read_memo(memo)
    for file in files:
        state, before = _state(file), known.get(os.path.abspath(file))
        if state is not None and isinstance(before, list) and before[:-1] == state:
            digests.append(str(before[-1]))
            continue
        digests.append(hash_files([file]))
        if state is not None:
            known[os.path.abspath(file)] = [*state, digests[-1]]
    with contextlib.suppress(OSError):  # a memo that cannot be written only costs time
        memo.parent.mkdir(parents=True, exist_ok=True)
        replace_file(memo, json.dumps(dict(list(known.items())[-KNOWN:])).encode())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _state(file: Path) -> list[int] | None:
    """What changes whenever a file does; None if it changed so recently that it may do so again unseen."""
    try:
        stat = os.stat(file)
    except OSError:
        return None  # hash_files says it
    at_rest = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns] if at_rest else None


def _read_memo(path: Path) -> dict[str, Any]:
    try:
        memo = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return memo if isinstance(memo, dict) else {}


def hash_files(files: Sequence[Path]) -> str:
    """One SHA-256 over sizes and contents, pieces of the files hashed side by side.

    Raises:
        UserError: a file cannot be read.
    """

    def hash_piece(piece: tuple[Path, int]) -> bytes:
        with open(piece[0], "rb") as stream:
            stream.seek(piece[1])
            return hashlib.sha256(stream.read(HASH_AT_ONCE)).digest()

    try:
        sizes = [os.path.getsize(file) for file in files]
        pieces = [(f, at) for f, size in zip(files, sizes, strict=True) for at in range(0, size, HASH_AT_ONCE)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = b"".join(pool.map(hash_piece, pieces))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return hashlib.sha256(json.dumps(sizes).encode() + digests).hexdigest()
