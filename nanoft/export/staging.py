"""Output directories that appear complete under their name, or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.io.atomic import sync_directory

PROGRESS = ".finished.json"  # beside finished shards: size and SHA-256 of each


@contextmanager
def new_directory(out: Path, key: str = "", place: Callable[[Path, Path], None] = os.rename) -> Iterator[Path]:
    """Yield a staging directory that becomes `out` at the end, or is removed if anything fails.

    After an interruption (Ctrl-C, a signal, power), the shards that `PROGRESS` names stay; the next call with this key
    continues from them, one with another key removes them. `place` moves the content of the directory to `out`.
    """
    require_new(out)
    created = [parent for parent in out.parents if not parent.exists()]
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
                finished = read_progress(staging)
                for path in staging.iterdir():  # what an interrupted call left, except its finished shards
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path.name not in finished and path.name != PROGRESS:
                        path.unlink()
                yield staging
                (staging / PROGRESS).unlink(missing_ok=True)
                sync_directory(staging)
                place(staging, out)
                sync_directory(out.parent)
            except KeyboardInterrupt:
                keep = (staging / PROGRESS).exists()
                raise
            finally:
                if not keep:
                    shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or f"{error}: is the disk full?"  # NumPy reports how much it wrote, not why
        raise UserError(f"--out: {out}: cannot be written: {reason}") from None
    finally:
        if not out.exists():
            with suppress(OSError):
                for parent in created:
                    parent.rmdir()  # only if it is empty


def require_new(out: str | Path) -> None:
    if os.path.lexists(out):
        raise UserError(f"--out: {out}: already exists: choose another name or remove it")


@contextmanager
def _locked(directory: Path, out: Path) -> Iterator[None]:
    """Hold a lock on a staging directory; the kernel releases it when the process ends, however it ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"--out: {out}: another process is writing it: wait for it, or choose another") from None
    finally:
        os.close(descriptor)


def read_progress(staging: Path) -> dict[str, Any]:
    """Size and SHA-256 of each finished shard; none if the file is missing or damaged."""
    with suppress(OSError, ValueError):
        found = json.loads((staging / PROGRESS).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


@contextmanager
def replaced_directory(out: Path) -> Iterator[Path]:
    """Yield a staging directory that replaces `out` when its content is on the disk."""
    for leftover in out.parent.glob(f".tmp-{out.name}-*"):  # of a process that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    staging = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        sync_directory(staging)
        if out.is_dir():
            shutil.rmtree(out)
        os.rename(staging, out)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
