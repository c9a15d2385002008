"""Writing files so that a crash or a power loss leaves the old content or the new one, never a mixture.

A new file is fsynced before anything refers to it, a small file is replaced by renaming a complete one over it, and a
directory is fsynced after its entries change, because a file's fsync does not cover its name. Output directories are
filled under a temporary name. A file is hashed again only after it has changed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.io.untrusted import read_json_or_empty

SETTLED = 2_000_000_000  # nanoseconds; a file modified more recently may change again without a new timestamp
PROGRESS = ".finished.json"  # next to finished shards: size and SHA-256 of each


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
            with suppress(OSError):  # not supported by every volume
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


# ---- Directories that appear complete under their final name, or not at all


@contextmanager
def new_directory(out: Path, key: str = "", replace: bool = False) -> Iterator[Path]:
    """Yield a staging directory that becomes `out` at the end, or is removed if anything fails.

    After an interruption (Ctrl-C, a signal, power), the shards that `PROGRESS` names stay; the next call with the same
    key continues from them, a call with another key removes them. `replace`: `out` may exist, and is removed once the
    content of its successor is on disk.
    """
    if not replace:
        require_new(out)
    staging = out.with_name(f".tmp-{out.name}-{key or 'new'}")
    keep = False
    try:
        for other in out.parent.glob(".tmp-*"):
            if other.name.rpartition("-")[0] == f".tmp-{out.name}" and other != staging:
                with _locked(other, out):
                    shutil.rmtree(other, ignore_errors=True)
        staging.mkdir(parents=True, exist_ok=True)
        with _locked(staging, out):
            try:
                finished = read_json_or_empty(staging / PROGRESS)
                for path in staging.iterdir():  # leftovers of an interrupted call, except its finished shards
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path.name not in finished and path.name != PROGRESS:
                        path.unlink()
                yield staging
                (staging / PROGRESS).unlink(missing_ok=True)
                sync_directory(staging)
                if replace:
                    shutil.rmtree(out, ignore_errors=True)
                os.rename(staging, out)
                sync_directory(out.parent)
            except KeyboardInterrupt:
                keep = (staging / PROGRESS).exists()
                raise
            finally:
                if not keep:
                    shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or f"{error}: is the disk full?"  # NumPy reports how much it wrote, not the cause
        raise UserError(f"{'' if replace else '--out: '}{out}: cannot be written: {reason}") from None


def require_new(out: str | Path) -> None:
    if os.path.lexists(out):
        raise UserError(f"--out: {out}: already exists: choose another name or remove it")


@contextmanager
def _locked(directory: Path, out: Path) -> Iterator[None]:
    """Hold a lock on a staging directory; the kernel releases it when the process ends, however it ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out: {out}: another process is writing it: wait, or choose another name") from None
        yield
    finally:
        os.close(descriptor)


# ---- Hashes of files


def cache_home() -> Path:
    """nanoft's directory in the user's cache; without a home directory, a path where nothing can be written."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoft"
    except RuntimeError:  # not a fixed name in the shared temporary directory: others could put data there
        return Path(os.devnull) / "nanoft"


def hash_files(files: Iterable[Path]) -> str:
    """One SHA-256 over the contents of files; a file that has not changed since an earlier call is not read again.

    As in git, a file is unchanged if size, inode, mtime and ctime (nanoseconds) are equal, and it was at rest when it
    was hashed. The hashes of earlier calls are in the user's cache.
    """
    memory, digest = cache_home() / "hashes.json", hashlib.sha256()
    known = read_json_or_empty(memory)
    before = len(known)
    for file in files:
        try:
            stat = os.stat(file)
            times = stat.st_mtime_ns, stat.st_ctime_ns
            state = json.dumps([os.path.abspath(file), stat.st_size, stat.st_ino, *times])
            found = str(known.get(state) or hash_file(file)["sha256"])
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        if time.time_ns() - max(times) > SETTLED:
            known[state] = found
        digest.update(found.encode())
    if len(known) > before:
        with suppress(OSError):  # without it, the files are hashed again
            memory.parent.mkdir(parents=True, exist_ok=True)
            replace_file(memory, json.dumps(dict(list(known.items())[-1000:])).encode())
    return digest.hexdigest()
