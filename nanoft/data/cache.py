"""A cache of directories: built once, kept under a hash of everything they depend on, verified at each use.

An entry is built in a temporary directory, gets a manifest with a hash of each file, and is renamed into place. An
entry that does not match its manifest is rebuilt. Without a writable cache the data is built for this process only.
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
from collections.abc import Callable
from pathlib import Path

from nanoft import UserError
from nanoft.checkpoint import MANIFEST
from nanoft.io.atomic import sync_directory
from nanoft.io.hashing import hash_content

MAX_ENTRIES = 16  # the least recently used ones are deleted
STALE_AFTER = 86400  # seconds after which an unfinished build is deleted


def load_or_build(key: str, build: Callable[[Path], None], log: Callable[[str], None]) -> tuple[Path, bool]:
    """The entry of a key, and whether it was in the cache; if not, `build(directory)` makes it."""
    home = cache_home()
    entry = home / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        found = _is_intact(entry)
        if not found:
            if os.path.lexists(entry):
                log(f"warning: {entry}: the cached data is damaged: rebuilding it")
            try:
                home.mkdir(parents=True, exist_ok=True)
                temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=home))
            except OSError as error:
                log(f"warning: {home}: the cache is not writable ({error.strerror}): the data is not cached")
                entry = Path(tempfile.mkdtemp(prefix="nanoft-"))
                atexit.register(shutil.rmtree, entry, ignore_errors=True)
                build(entry)
                return entry, False
            _build(temporary, entry, build)
            _prune(home, entry)
        with contextlib.suppress(OSError):  # the cache may belong to another user
            os.utime(entry)  # used now
    except OSError as error:
        raise UserError(f"{home}: the cache cannot be written ({error.strerror}): set XDG_CACHE_HOME") from None
    return entry, found


def cache_home() -> Path:
    """In the user's cache directory; without a home directory, a path where nothing can be written."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoft"
    except RuntimeError:  # not a fixed name in the shared temporary directory: others could put data there
        return Path(os.devnull) / "nanoft"


def _build(temporary: Path, entry: Path, build: Callable[[Path], None]) -> None:
    try:
        build(temporary)
        hashes = {path.name: hash_content(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(hashes), encoding="utf-8")
        for path in temporary.iterdir():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        if not _is_intact(entry):  # else another process has built it meanwhile
            shutil.rmtree(entry, ignore_errors=True)
            os.rename(temporary, entry)
        sync_directory(entry.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_intact(entry: Path) -> bool:
    """Whether the entry exists, with every byte as it was written."""
    try:
        hashes = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        is_complete = {path.name for path in entry.iterdir()} == {MANIFEST, *hashes}
        return is_complete and all(hash_content(entry / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, UserError, TypeError):
        return False


def _prune(home: Path, newest: Path) -> None:
    """Delete the least recently used entries, and what builds that died left behind."""
    entries = sorted((p for p in home.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    complete = [path for path in entries if not path.name.startswith(".tmp-")]
    stale = [p for p in entries if p.name.startswith(".tmp-") and time.time() - p.stat().st_mtime > STALE_AFTER]
    for path in [*complete[MAX_ENTRIES:], *stale]:
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)
