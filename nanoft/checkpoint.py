"""Checkpoints that are either complete or absent.

An interrupted save must never cost the previous checkpoint, and a run must never continue from a corrupted one. So a
checkpoint is written under a temporary name and published by one atomic rename, and only files that match their hash
are trusted:

    .tmp-step-000100-<pid>/   each file is streamed, hashed on the way, and fsynced
    manifest.json             size and SHA-256 of every file and of itself, and the run's identity; written last
    verification              every byte is read back; then the directory is fsynced
    rename to step-000100     atomic; then the parent directory is fsynced
    rotation                  only now may an older checkpoint be deleted; never the best, never the newest

Loading verifies every byte and falls back to the newest valid checkpoint. Nothing is ever unpickled. Training does not
wait for the disk: `AsyncCheckpointWriter` copies the tensors, and its thread does the rest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nanoft import UserError
from nanoft.io.atomic import hash_file, replace_file, sync_directory, write_file
from nanoft.io.tensor_files import Tensors, load_tensors, write_tensors
from nanoft.io.untrusted import parse_json, read_bytes, read_json_or_empty
from nanoft.runtime.memory import available_host_bytes

FORMAT = 2
MANIFEST = "manifest.json"
SWITCH_S = 1e-4  # longest time for which a save may hold the interpreter from training; Python's default is 5e-3
RETRY_S = 60.0  # time until a failed save is retried
ANY_RUN: Mapping[str, Any] = {}  # an identity that every checkpoint matches


class CheckpointCorrupted(Exception):
    """A checkpoint that must not be used, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its directory, its state, and its tensors by file (`adapter`, `optimizer`, ...)."""

    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_tensors(self.path / f"{name}.safetensors")


class CheckpointManager:
    """The checkpoints of one run, in one directory."""

    def __init__(
        self,
        directory: Path,  # created if it is missing; incomplete leftovers of killed saves are removed
        keep: int,  # number of newest checkpoints to keep, besides the best
        keep_every: int = 0,  # checkpoints of steps that are multiples of it are never deleted; 0: none
        identity: Mapping[str, Any] = ANY_RUN,  # of their run: hashes, which must be equal to load one; versions
        owner: bool = True,  # whether this process writes there; among several ranks, only rank 0 does
    ):
        self.directory, self.keep, self.keep_every = directory, keep, keep_every
        self.identity, self.owner = dict(identity), owner
        self.best_file = directory.parent / "best.json"
        if owner:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.iterdir():  # of killed saves: the run's lock excludes running ones
                if re.fullmatch(r"\.tmp-step-\d+-\d+", leftover.name):
                    shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, tensors: Tensors, state: dict[str, Any], best: tuple[int, float] | None = None) -> Path:
        """Write checkpoint `step`; when this returns, it is on disk; an OSError leaves earlier ones untouched.

        A valid one of the same step stays: a step after its rename failed, or the run resumes there.

        Args:
            state: JSON values.
            best: step and validation loss of the best checkpoint, which may be this one, for best.json; None: nothing
                was evaluated yet.
        """
        try:
            self.verify(self.path(step))
        except CheckpointCorrupted:  # usually because it does not exist
            self._write(step, tensors, state)
        sync_directory(self.directory)
        if best is None:
            self.best_file.unlink(missing_ok=True)
        else:
            place = f"checkpoints/{self.path(best[0]).name}"
            replace_file(self.best_file, _dump({"step": best[0], "validation_loss": best[1], "checkpoint": place}))
        self._rotate(step)
        return self.path(step)

    def newest(self, before: float = math.inf) -> tuple[Checkpoint | None, list[str]]:
        """The newest valid checkpoint before a step, and the damage of later ones; a UserError if none is valid."""
        damage: list[str] = []
        for step in sorted((step for step in self.steps() if step < before), reverse=True):
            try:
                return self.verify(self.path(step)), damage
            except CheckpointCorrupted as reason:
                damage.append(str(reason))
        if damage:
            raise UserError(f"{damage[0]}; no other checkpoint is valid: start a new run with another output.dir")
        return None, []

    def verify(self, path: Path) -> Checkpoint:
        """Check every file of a checkpoint, and that it is one of this run: see the function."""
        return verify(path, self.identity)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in rising order."""
        names = (re.fullmatch(r"step-(\d{6,})", path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best checkpoint so far; None if it is missing or best.json is unreadable."""
        record = read_json_or_empty(self.best_file)
        step, loss = record.get("step"), record.get("validation_loss")
        if isinstance(step, int) and isinstance(loss, float) and self.path(step).is_dir():
            return step, loss
        return None

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, which the run will repeat, perhaps differently."""
        if self.owner:
            if (best := self.best()) and best[0] > step:
                self.best_file.unlink()
            self._remove(later for later in self.steps() if later > step)

    def _write(self, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
        """Write and verify every file under a temporary name, then rename the directory."""
        staging = self.directory / f".tmp-step-{step:06d}-{os.getpid()}"
        shutil.rmtree(staging, ignore_errors=True)
        os.mkdir(staging)
        try:
            files = {f"{n}.safetensors": write_tensors(staging / f"{n}.safetensors", t) for n, t in tensors.items()}
            files["state.json"] = write_file(staging / "state.json", [_dump(state)])
            body = {"format": FORMAT, "step": step, "belongs_to": self.identity, "files": files}
            write_file(staging / MANIFEST, [_dump({"body": body, "sha256": hashlib.sha256(_dump(body)).hexdigest()})])
            try:
                verify(staging)
            except CheckpointCorrupted as reason:  # the disk returned other data than was written
                raise OSError(errno.EIO, f"{reason} (read back after writing)") from None
            sync_directory(staging)
            if self.path(step).exists():  # corrupted
                self._remove([step])
            os.rename(staging, self.path(step))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def _rotate(self, newest: int) -> None:
        """Delete checkpoints older than the last `keep`, and those after `newest`, which a rollback has undone."""
        own = [step for step in self.steps() if step <= newest]
        spared = {*own[-self.keep :], *(self.best() or ())[:1]}
        spared |= {step for step in own if self.keep_every and step and step % self.keep_every == 0}
        self._remove(step for step in self.steps() if step not in spared)

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            (self.path(step) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.path(step), ignore_errors=True)


@dataclass
class SaveResult:
    step: int
    path: Path = Path()
    error: Exception | None = None
    seconds: float = 0.0  # from its start until it was on disk
    waited_seconds: float = 0.0  # for which training waited


class AsyncCheckpointWriter:
    """Saves from copies in a background thread, one at a time, while training continues.

    As a context manager it waits for the last save, unless the process was interrupted. If the copies need more than
    half of the free memory, training waits for the save. Only the owner of the checkpoints saves.
    """

    def __init__(self, checkpoints: CheckpointManager, free_bytes: Callable[[], float] = available_host_bytes):
        self.checkpoints, self.free_bytes = checkpoints, free_bytes
        self.last_step = -1  # of the last save that worked
        self._failed_at = math.inf
        self._saving: Future[SaveResult] | None = None  # until its outcome is collected

    def start(self, step: int, tensors: Tensors, state: dict[str, Any], best: tuple[int, float] | None) -> None:
        """Start a save (see CheckpointManager.save); the previous one must have been collected."""
        if not self.checkpoints.owner:
            return
        started, outcome, saving = time.perf_counter(), SaveResult(step), Future[SaveResult]()

        def work() -> None:
            usual = sys.getswitchinterval()
            sys.setswitchinterval(SWITCH_S)
            try:
                outcome.path = self.checkpoints.save(step, tensors, state, best)
            except Exception as error:  # any error surfaces in collect()
                outcome.error = error
            finally:
                sys.setswitchinterval(usual)
            outcome.seconds = time.perf_counter() - started
            saving.set_result(outcome)

        in_background = False
        if sum(t.nbytes for named in tensors.values() for t in named.values()) < self.free_bytes() / 2:
            with contextlib.suppress(RuntimeError, MemoryError):  # less memory than reported, or no thread can start
                tensors = {f: {n: t.detach().to("cpu", copy=True) for n, t in ts.items()} for f, ts in tensors.items()}
                threading.Thread(target=work, name=f"save-{step}", daemon=True).start()
                in_background = True
        if not in_background:
            work()
        self._saving = saving
        outcome.waited_seconds = time.perf_counter() - started

    def collect(self, wait: bool = False) -> SaveResult | None:
        """The outcome of the last save, once; None if it was collected before or, without `wait`, is still running."""
        if self._saving is None or not (wait or self._saving.done()):
            return None
        outcome, self._saving = self._saving.result(), None
        if outcome.error is None:
            self.last_step, self._failed_at = outcome.step, math.inf
        else:
            self._failed_at = time.monotonic()
        return outcome

    def overdue(self) -> bool:
        """Whether the last save failed at least RETRY_S ago."""
        return time.monotonic() - self._failed_at > RETRY_S

    def __enter__(self) -> AsyncCheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._saving is not None and (kind is None or issubclass(kind, Exception)):
            self._saving.result()


def verify(path: Path, identity: Mapping[str, Any] = ANY_RUN) -> Checkpoint:
    """Check a checkpoint's files against its manifest, and its identity; CheckpointCorrupted if anything differs."""
    body = _read_manifest(path)
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}  # a Mac's copy adds .DS_Store
    if odd := sorted(names ^ {*body["files"], MANIFEST}):
        raise CheckpointCorrupted(f"{path / odd[0]}: {'unexpected file' if odd[0] in names else 'missing'}")
    for name, expected in body["files"].items():
        if (path / name).is_symlink() or not (path / name).is_file():
            raise CheckpointCorrupted(f"{path / name}: not a plain file")
        try:
            found = hash_file(path / name)
        except OSError as error:  # a bad sector
            raise CheckpointCorrupted(f"{path / name}: cannot be read: {error.strerror}") from None
        if found != expected:
            raise CheckpointCorrupted(f"{path / name}: its content differs from what was saved")
    try:
        state = parse_json(read_bytes(path / "state.json"))
    except (UserError, ValueError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointCorrupted(f"{path / 'state.json'}: missing or not a JSON object")
    for key, value in identity.items():
        if key.endswith("_sha256") and body.get("belongs_to", {}).get(key) != value:
            what = key.removesuffix("_sha256")
            raise CheckpointCorrupted(f"{path}: belongs to another run: its {what} differs")
    return Checkpoint(path, state)


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest's body, if its own hash is correct and its names stay inside the directory."""
    try:
        sealed = parse_json(read_bytes(path / MANIFEST))
        body: dict[str, Any] = sealed["body"]
        good = sealed["sha256"] == hashlib.sha256(_dump(body)).hexdigest()
    except (UserError, ValueError, KeyError, TypeError):
        raise CheckpointCorrupted(f"{path / MANIFEST}: missing or not readable: the save did not finish") from None
    if not good or not isinstance(body, dict):
        raise CheckpointCorrupted(f"{path / MANIFEST}: its content differs from what was saved")
    if body.get("format") != FORMAT:
        raise CheckpointCorrupted(f"{path / MANIFEST}: format {body.get('format')!r}, but this nanoft reads {FORMAT}")
    files, run = body.get("files"), body.get("belongs_to", {})
    if not isinstance(files, dict) or not isinstance(run, dict) or any(Path(name).name != name for name in files):
        raise CheckpointCorrupted(f"{path / MANIFEST}: does not list the files of its directory and their run")
    return body


def _dump(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
