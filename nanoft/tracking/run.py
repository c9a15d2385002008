"""What a run leaves behind for people to read: its directory, metrics, log and report.

    runs/tiny/
        config.json      the resolved settings, library versions, hashes of the data and the base model
        metrics.jsonl    one JSON object a line: train, eval, sample, gradients, checkpoint, warning, memory, done
        train.log        what the terminal showed
        plots/           curves.png and curves.svg, if logging.plots asks for them
        checkpoints/     to go on from
        best.json        which checkpoint has the lowest validation loss
        adapter/         the result, in PEFT's format (model/ when every parameter was trained)
        rejected.jsonl   the records that were left out, and why
        preview.txt      a few samples as the model sees them
        report.md, report.json

One process owns the directory at a time; a run that is refused before its first step leaves none behind. What is
written for people must not cost what is computed: when the disk refuses a line, training goes on, metrics.jsonl keeps
whole lines only, and those that are missing are written as soon as they can be.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

import psutil
from tqdm import tqdm

from nanoft import UserError
from nanoft.io.atomic import replace_file
from nanoft.io.untrusted import redact
from nanoft.runtime.distributed import broadcast_from_rank0

LEFTOVER = re.compile(r"\.(tmp-(\w+\.jsonl?|report\.md|adapter|model)|preflight)-\d+")  # of a killed process


@dataclass
class Meter:
    """Sums since the last log line, and over the whole run; saved with the run, so that a resumed one adds up."""

    nats: float = 0.0  # since the last log line
    tokens: int = 0  # without padding
    target_tokens: int = 0
    seconds: float = 0.0
    total_tokens: int = 0  # of the run, all sessions together
    total_seconds: float = 0.0
    total_joules: float = 0.0

    def add(self, nats: float, tokens: int, target_tokens: int, seconds: float, joules: float = 0.0) -> None:
        """Count one optimizer step; a clock that was set back says nothing."""
        seconds = max(seconds, 0.0)
        self.nats += nats
        self.tokens += tokens
        self.target_tokens += target_tokens
        self.seconds += seconds
        self.total_tokens += tokens
        self.total_seconds += seconds
        self.total_joules += joules

    def flush(self) -> dict[str, float]:
        """Means since the last line (loss in nats per target token); starts the next interval."""
        seconds = max(self.seconds, 1e-9)
        values = {
            "loss": self.nats / self.target_tokens,
            "tokens_per_second": self.tokens / seconds,
            "target_tokens_per_second": self.target_tokens / seconds,
        }
        self.nats, self.tokens, self.target_tokens, self.seconds = 0.0, 0, 0, 0.0
        return values

    def tokens_per_second(self) -> float:
        """Over the whole run."""
        return self.total_tokens / max(self.total_seconds, 1e-9)


class AppendOnlyFile:
    """A file that only ever grows by whole lines, whatever the disk does."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._end = os.fstat(self._file).st_size  # of the last whole line
        self._waiting = b""  # what the disk has refused so far

    def append(self, line: str) -> None:
        """Write a line, and before it those that are waiting.

        Raises:
            OSError: the disk refused; nothing of it is in the file, and it waits for the next call.
        """
        self._waiting += to_utf8(line + "\n")
        self._write()

    def sync(self) -> None:
        """Write what is waiting, and fsync.

        Raises:
            OSError: as `append`.
        """
        self._write()
        os.fsync(self._file)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._write()
        os.close(self._file)

    def _write(self) -> None:
        try:
            rest = memoryview(self._waiting)
            while len(rest):
                rest = rest[os.write(self._file, rest) :]  # a write may be short
        except OSError:
            with contextlib.suppress(OSError):  # else `begin` drops the torn line when the run goes on
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(self._waiting)
        self._waiting = b""


class Tracker(Protocol):
    """Who is told every event of a run besides metrics.jsonl (nanoft/sinks.py); what it raises ends it, not the run."""

    name: str

    def log(self, event: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Run:
    """An open run directory: the lock on it, and the places to write to."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.checkpoints = directory / "checkpoints"
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]
        self.trackers: list[Tracker] = []
        self._step = 0  # of the newest event
        self._metrics: AppendOnlyFile | None = None
        self._refused: set[str] = set()  # files that the disk refused to write; each is warned of once
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # held while the run lasts
        except OSError as error:
            raise UserError(f"output.dir: {directory}: cannot be written: {error.strerror}") from None
        self._take_lock()
        for leftover in [path for path in directory.iterdir() if LEFTOVER.fullmatch(path.name)]:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        """Take a run directory: rank 0 opens it, the other ranks get a NullRun.

        Raises:
            UserError: another process has it, it cannot be written, or it is something else's directory.
        """
        opened: list[Run] = []
        broadcast_from_rank0(lambda: opened.append(cls._open(Path(directory))))
        return opened[0] if opened else NullRun(Path(directory))

    @classmethod
    def _open(cls, path: Path) -> Run:
        if path.exists() and not path.is_dir():
            raise UserError(f"output.dir: {path}: is a file: choose another output.dir")
        known = (".lock", "metrics.jsonl")  # a lock may have been removed, as a message of `_take_lock` says
        if path.is_dir() and any(path.iterdir()) and not any((path / name).exists() for name in known):
            raise UserError(f"output.dir: {path}: is not empty and not a run of nanoft: choose another output.dir")
        return cls(path)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        while self.trackers:
            listener = self.trackers.pop()
            if (failure := _failure(listener.close)) is not None:
                self._drop(listener, failure)
        if self._metrics is not None:
            self._metrics.close()
        started = self.has_metrics or (self.directory / "metrics.jsonl").exists()
        if kind is not None and issubclass(kind, UserError) and self._made and not started:
            shutil.rmtree(self.directory, ignore_errors=True)  # it was refused before it began
            with contextlib.suppress(OSError):
                for parent in self._made[1:]:
                    parent.rmdir()  # only if it is empty
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock, 0)  # nobody's
        os.close(self._lock)

    def recorded_config(self) -> dict[str, Any] | None:
        """The config.json of the run that lives here, if one does; one that took no step can still be changed."""
        path = self.directory / "config.json"
        if not path.is_file() or not (self.directory / "metrics.jsonl").is_file():
            return None
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(tree["provenance"], dict):
                datetime.fromisoformat(tree["provenance"]["date"])
                return dict(tree)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise UserError(f"{path}: damaged: remove the directory or choose another output.dir")

    def finished_step(self) -> int | None:
        """The step with which the run ended, if it has its report."""
        path = self.directory / "report.json"
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["training"]["steps"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or cut off while it was written

    def skipped_windows(self) -> set[tuple[int, int]]:
        """The windows, (epoch, index), that no step was made of: skipped, or passed over after going back."""
        path, found = self.directory / "metrics.jsonl", set()
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        for values in map(parse_event, lines):
            if values.get("what") == "step skipped":
                found.add(tuple(values["window"]))
            elif values.get("what") == "rolled back":
                found |= set(map(tuple, values["left_out"]))
        return found

    def open_metrics(
        self, step: int, position: list[int], left_out: list[list[int]], rolled_back: bool = False
    ) -> None:
        """Open the metrics after `step`; what will be done again, and so logged again, goes.

        Args:
            position: (epoch, window) that comes next.
            left_out: windows that will be passed over: what was said of them is not said again.
            rolled_back: in the same process: warnings of anything but windows stay.
        """
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        (self.directory / "report.json").unlink(missing_ok=True)  # it would say that the run is done
        path = self.directory / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        kept = []
        for line in lines:
            values = parse_event(line)
            if "window" in values:
                stays = values["window"] < position or values["window"] in left_out
            else:
                stays = values["step"] <= step or (rolled_back and values["event"] == "warning")
                stays &= values["event"] != "done"  # it is not
            if stays:
                kept.append(f"{line}\n")
        replace_file(path, "".join(kept).encode())
        self._metrics = AppendOnlyFile(path)

    @property
    def has_metrics(self) -> bool:
        return self._metrics is not None

    def log(self, event: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl; a disk that refuses it is warned of once, and asked again next time."""
        assert self._metrics is not None, "open_metrics() comes first"
        self._step = step
        line = redact(to_json({"event": event, "step": step, **values, "time": round(time.time(), 3)}))
        try:
            self._metrics.append(line)
        except OSError as error:
            self._warn_once("metrics.jsonl", error)
        told = [(listener, _failure(listener.log, json.loads(line))) for listener in self.trackers]
        for listener, failure in told:
            if failure is not None:
                self._drop(listener, failure)

    def print(self, text: str = "") -> None:
        """Print to the terminal, above the progress bar if there is one, and to train.log."""
        text = redact(text)
        with contextlib.suppress(OSError, ValueError):  # the reader has gone; train.log still has it
            tqdm.write(text, file=sys.stdout)
        try:
            with open(self.directory / "train.log", "ab") as log:
                log.write(to_utf8(text + "\n"))
        except OSError as error:
            self._warn_once("train.log", error)

    def write_report(self, report: dict[str, Any], markdown: str) -> None:
        """report.md for people and, last, report.json for programs, which says that the run is done."""
        replace_file(self.directory / "report.md", to_utf8(redact(markdown)))
        replace_file(self.directory / "report.json", to_utf8(redact(to_json(report, indent=2)) + "\n"))

    def sync(self) -> None:
        """Before a checkpoint: make what was logged survive a power loss.

        Raises:
            UserError: the directory was removed or renamed, or another process has made one in its place.
        """
        assert self._metrics is not None, "open_metrics() comes first"
        try:
            there = os.path.samestat(os.stat(self.directory / ".lock"), os.fstat(self._lock))
        except FileNotFoundError:
            there = False
        if not there:
            raise UserError(f"output.dir: {self.directory}: was removed or replaced while the run went on: start anew")
        try:
            self._metrics.sync()
        except OSError as error:
            self._warn_once("metrics.jsonl", error)

    def _drop(self, listener: Tracker, error: Exception) -> None:
        """A listener that failed is told nothing more; the others are told that."""
        self.trackers = [other for other in self.trackers if other is not listener]
        self.log("warning", self._step, what=f"{listener.name} failed", error=f"{type(error).__name__}: {error}")
        self.print(f"warning: {listener.name} failed: {type(error).__name__}: {error}: training goes on without")

    def _warn_once(self, name: str, error: OSError) -> None:
        if name not in self._refused:
            self._refused.add(name)
            self.print(
                f"warning: {self.directory / name}: {error.strerror}: training goes on, lines wait or are missing"
            )

    def _take_lock(self) -> None:
        """Own the directory, or say who does.

        The kernel lets go of the lock of a process that died. Where the file system has no locks (some network mounts
        refuse `flock`), the note in the file decides: a process of this computer that no longer runs owns nothing, and
        one of another computer cannot be asked. Two that start in the same instant are not told apart there.
        """
        note = os.pread(self._lock, 1000, 0).decode(errors="replace").strip()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(note, "wait for it")
        except OSError:
            if may_be_running(note):
                self._refuse(note, f"wait for it or, if it has ended, remove {self.directory / '.lock'}")
        owner = f"{os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode()
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.pwrite(self._lock, owner, 0)
            os.ftruncate(self._lock, len(owner))

    def _refuse(self, note: str, what_to_do: str) -> NoReturn:
        os.close(self._lock)
        owner = note or "unknown"
        raise UserError(
            f"output.dir: {self.directory}: in use by process {owner}: {what_to_do} or choose another output.dir"
        ) from None


def _failure(action: Callable[..., None], *arguments: Any) -> Exception | None:
    """What went wrong, if anything did: a run is worth more than a look at it."""
    try:
        action(*arguments)
    except Exception as error:
        return error
    return None


def may_be_running(note: str) -> bool:
    """Whether the process of a lock's note may still be there; one with its number that began later is another."""
    words = note.split(maxsplit=4)  # 1234 on host since 2025-01-31 12:00:00
    if len(words) < 5 or words[2] != socket.gethostname():
        return bool(note)
    try:
        since = time.mktime(time.strptime(words[4], "%Y-%m-%d %H:%M:%S"))
        return psutil.Process(int(words[0])).create_time() <= since + 60  # clocks are set now and then
    except (ValueError, psutil.NoSuchProcess):
        return False


def parse_event(line: str) -> dict[str, Any]:
    """A line of metrics.jsonl; one that was cut off is of a step that never was."""
    try:
        values = json.loads(line)
        return {**values, "step": float(values["step"]), "event": str(values["event"])}
    except (ValueError, KeyError, TypeError):
        return {"step": math.inf, "event": ""}


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: it has no word for NaN and infinity, so they become null."""

    def strict(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: strict(item) for key, item in part.items()}
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(strict(value), indent=indent, ensure_ascii=False, allow_nan=False)


def to_utf8(text: str) -> bytes:
    """UTF-8; half a character, as in the name of a file that is not UTF-8, becomes \\udcNN, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


class NullRun(Run):
    """The run directory as ranks other than 0 have it: they say and write nothing."""

    def __init__(self, directory: Path):
        self.directory, self.checkpoints = directory, directory / "checkpoints"
        self._metrics = None

    def __exit__(self, *_: object) -> None:
        pass

    def open_metrics(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, *_: Any, **__: Any) -> None:
        pass

    def print(self, text: str = "") -> None:
        pass

    def sync(self) -> None:
        pass
