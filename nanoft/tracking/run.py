"""The run directory: everything a run writes for people and for other programs, except the checkpoints.

    runs/tiny/
        config.json      resolved settings, library versions, hashes of the data and the base model
        metrics.jsonl    one JSON object per line: train, eval, sample, gradients, checkpoint, warning, memory, done
        train.log        what the terminal showed
        plots/           curves.png and curves.svg
        checkpoints/     to resume from
        best.json        the checkpoint with the lowest validation loss
        adapter/         the result, in PEFT's format (model/ after full fine-tuning)
        rejected.jsonl   records that were dropped, and why
        preview.txt      a few samples as the model sees them
        report.md, report.html, report.json

Only one process owns the directory at a time. A run that is refused before its first step leaves no directory behind.
Logging never stops training: a line of metrics.jsonl that cannot be written is kept in memory and written later.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import psutil
from tqdm import tqdm

from nanoft import UserError
from nanoft.io.atomic import replace_file, write_all
from nanoft.io.tables import for_terminal
from nanoft.io.untrusted import redact
from nanoft.runtime.distributed import main_process_first, process_rank
from nanoft.tracking import page
from nanoft.tracking.plots import read_events

LEVELS = ("debug", "info", "warning", "error")  # of logging.level


@dataclass
class Meter:
    """Loss and throughput since the last log line and over the whole run; part of the checkpointed state."""

    nats: float = 0.0  # summed loss since the last log line
    units: float = 0.0  # number of units that the loss is a mean over; SFT: target tokens
    tokens: int = 0  # non-padding
    target_tokens: int = 0
    seconds: float = 0.0
    total_tokens: int = 0  # of the run, including sessions before a resume
    total_seconds: float = 0.0
    total_joules: float = 0.0

    def add(self, nats: float, units: float, tokens: int, target_tokens: int, seconds: float, joules: float) -> None:
        seconds = max(seconds, 0.0)  # the clock may have been set back
        self.nats += nats
        self.units += units
        self.tokens += tokens
        self.target_tokens += target_tokens
        self.seconds += seconds
        self.total_tokens += tokens
        self.total_seconds += seconds
        self.total_joules += joules

    def flush(self) -> dict[str, float]:
        """Return the means since the last call (the loss per unit of the objective) and start the next interval."""
        seconds = max(self.seconds, 1e-9)
        speeds = {"tokens_per_second": self.tokens / seconds, "target_tokens_per_second": self.target_tokens / seconds}
        values = {"loss": self.nats / self.units, **speeds}
        self.nats, self.units, self.tokens, self.target_tokens, self.seconds = 0.0, 0.0, 0, 0, 0.0
        return values

    def tokens_per_second(self) -> float:  # over the whole run
        return self.total_tokens / max(self.total_seconds, 1e-9)


class AppendOnlyFile:
    """A file that grows by complete lines only, even if writes fail; pending lines are written with the next one."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._end = os.fstat(self._file).st_size  # of the last complete line
        self._pending = b""  # lines whose write failed

    def append(self, line: str) -> None:
        self._pending += to_utf8(line + "\n")
        self._write()

    def sync(self) -> None:
        self._write()
        os.fsync(self._file)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._write()
        os.close(self._file)

    def _write(self) -> None:
        try:
            write_all(self._file, self._pending)
        except OSError:
            with contextlib.suppress(OSError):  # if this fails too, `open_metrics` drops the torn line on resume
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(self._pending)
        self._pending = b""


class Tracker(Protocol):
    """Receives every event (see trackers.py); if it raises, it is removed from the run."""

    name: str

    def log(self, event: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def is_shown(text: str, level: str) -> bool:
    """Whether the terminal shows a line at a logging.level."""
    return LEVELS.index(level) <= LEVELS.index("warning" if text.startswith("warning: ") else "info")


class Run:
    """An open run directory, locked by this process."""

    level = "info"  # of the terminal

    def __init__(self, directory: Path):
        if directory.exists() and not directory.is_dir():
            raise UserError(f"output.dir: {directory} is a file: choose another output.dir")
        known = any((directory / name).exists() for name in (".lock", "metrics.jsonl"))  # the user may remove .lock
        if directory.is_dir() and any(directory.iterdir()) and not known:
            raise UserError(f"output.dir: {directory} is not empty and not a nanoft run: choose another output.dir")
        self.directory, self.checkpoints = directory, directory / "checkpoints"
        self._is_new = not directory.exists()
        self.trackers: list[Tracker] = []
        self._step = 0  # of the newest event
        self._metrics: AppendOnlyFile | None = None
        self._failed: set[str] = set()  # files with a failed write; each gets one warning
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"output.dir: cannot write to {directory}: {error.strerror}") from None
        self._take_lock()
        for leftover in directory.glob(".tmp-*"):  # of a killed process
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        """Open a run directory on rank 0; the other ranks get a NullRun."""
        return main_process_first(lambda: (NullRun if process_rank() else cls)(Path(directory)))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        while self.trackers:
            tracker = self.trackers.pop()
            try:
                tracker.close()
            except Exception as failure:
                self._remove(tracker, failure)
        if self._metrics is not None:
            self._metrics.close()
        started = self.has_metrics or (self.directory / "metrics.jsonl").exists()
        if kind is not None and issubclass(kind, UserError) and self._is_new and not started:
            shutil.rmtree(self.directory, ignore_errors=True)  # refused before the first step
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock, 0)  # no owner
        os.close(self._lock)

    def recorded_config(self) -> dict[str, Any] | None:
        """The config.json of the run to resume, or None if no run has started here."""
        path = self.directory / "config.json"
        if not path.is_file() or not (self.directory / "metrics.jsonl").is_file():
            return None
        try:
            tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            datetime.fromisoformat(tree["provenance"]["date"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}: corrupted: remove the directory or choose another output.dir") from None
        return tree

    def finished_step(self) -> int | None:
        """The last step of a finished run, which has a report.json; otherwise None."""
        try:
            return int(json.loads((self.directory / "report.json").read_text("utf-8"))["training"]["steps"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def skipped_windows(self) -> set[tuple[int, int]]:
        """The windows, (epoch, index), that were not trained on: skipped at once, or after a rollback."""
        found = set()
        for values in read_events(self.directory).lines:
            if values.get("what") in ("step skipped", "overflow"):
                found.add(tuple(values["window"]))
            elif values.get("what") == "rolled back":
                found |= set(map(tuple, values["left_out"]))
        return found

    def open_metrics(self, step: int, position: list[int], skipped: list[list[int]], rolled_back: bool = False) -> None:
        """Open metrics.jsonl for appending, without the events after `step`, which will be logged again.

        The window at `position`, (epoch, window), comes next; those that were `skipped` will not be retried, so their
        events are kept. After a rollback to `step`, all warnings that are not about windows are kept too.
        """
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        (self.directory / "report.json").unlink(missing_ok=True)  # marks a finished run
        path, kept = self.directory / "metrics.jsonl", list[str]()
        known = step if step or rolled_back else -1  # events before the first step will be logged again
        for values in read_events(self.directory).lines:
            if "window" in values:
                keep = values["window"] < position or values["window"] in skipped
            else:
                keep = values["step"] <= known or (rolled_back and values["event"] == "warning")
                keep &= values["event"] != "done"
            if keep:
                kept.append(to_json(values) + "\n")
        replace_file(path, to_utf8("".join(kept)))
        self._metrics = AppendOnlyFile(path)

    @property
    def has_metrics(self) -> bool:
        return self._metrics is not None

    def log(self, event: str, step: int, **values: Any) -> None:
        """Append an event to metrics.jsonl and pass it to the trackers; a failed write is retried with the next one."""
        assert self._metrics is not None, "open_metrics() comes first"
        self._step = step
        line = redact(to_json({"event": event, "step": step, **values, "time": round(time.time(), 3)}))
        try:
            self._metrics.append(line)
        except OSError as error:
            self._warn_once("metrics.jsonl", error)
        if self.level == "debug":
            self.print(f"event     {line}")
        failed = []
        for tracker in self.trackers:
            try:
                tracker.log(json.loads(line))
            except Exception as error:
                failed.append((tracker, error))
        for tracker, failure in failed:  # each logs a warning, which the others receive after this event
            self._remove(tracker, failure)

    def print(self, text: str = "") -> None:
        """Print to train.log and, if logging.level allows it, to the terminal, above the progress bar."""
        text = redact(text)
        with contextlib.suppress(OSError, ValueError):  # stdout is closed; train.log still gets the line
            if is_shown(text, self.level):
                tqdm.write(for_terminal(text), file=sys.stdout)
        try:
            with open(self.directory / "train.log", "ab") as log:
                log.write(to_utf8(text + "\n"))
        except OSError as error:
            self._warn_once("train.log", error)

    def write_report(self, report: dict[str, Any], markdown: str) -> None:
        """Write report.md and report.html, and then report.json, which marks the run as finished."""
        replace_file(self.directory / "report.md", to_utf8(redact(markdown)))
        page.write(self.directory)
        replace_file(self.directory / "report.json", to_utf8(redact(to_json(report, indent=2)) + "\n"))

    def sync(self) -> None:
        """Flush the metrics to disk before each checkpoint; a UserError if the directory was removed or replaced."""
        assert self._metrics is not None, "open_metrics() comes first"
        try:
            is_ours = os.path.samestat(os.stat(self.directory / ".lock"), os.fstat(self._lock))
        except FileNotFoundError:
            is_ours = False
        if not is_ours:
            raise UserError(f"output.dir: {self.directory} was removed or replaced: put it back, or start a new run")
        try:
            self._metrics.sync()
        except OSError as error:
            self._warn_once("metrics.jsonl", error)

    def _remove(self, tracker: Tracker, error: Exception) -> None:
        self.trackers = [other for other in self.trackers if other is not tracker]
        what, reason = f"{tracker.name} failed", f"{type(error).__name__}: {error}"
        self.log("warning", self._step, what=what, error=reason)
        self.print(f"warning: {what}: {reason}: training continues without it")

    def _warn_once(self, name: str, error: OSError) -> None:
        if name not in self._failed:
            self._failed.add(name)
            self.print(f"warning: cannot write {self.directory / name}: {error.strerror}: training continues")

    def _take_lock(self) -> None:
        """Lock the directory, whose lock names its owner; the kernel releases the lock of a dead process."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 1000, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            text = f"{self.directory} is in use by process {owner}: wait for it or choose another output.dir"
            raise UserError(f"output.dir: {text}") from None
        except OSError as error:  # some network file systems
            self.print(f"warning: {self.directory} cannot be locked ({error.strerror}): start only one process in it")
        owner = f"{os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with contextlib.suppress(OSError):  # disk full; the lock holds anyway
            os.pwrite(self._lock, owner.encode(), 0)
            os.ftruncate(self._lock, len(owner.encode()))


def may_be_running(note: str) -> bool:
    """Whether the process that a lock names may still be running; one on another host is assumed to be."""
    words = note.split()  # 1234 on host since 2025-01-31 12:00:00
    if len(words) < 3 or words[2] != socket.gethostname():
        return bool(note)
    return words[0].isdigit() and psutil.pid_exists(int(words[0]))


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinity, which JSON does not have, become null."""

    def strict(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: strict(item) for key, item in part.items()}
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(strict(value), indent=indent, ensure_ascii=False, allow_nan=False)


def to_utf8(text: str) -> bytes:
    """UTF-8; a lone surrogate (from a file name that is not UTF-8) becomes \\udcNN, which JSON can read back."""
    return text.encode("utf-8", "backslashreplace")


class NullRun(Run):
    """The run on ranks other than 0, which print and write nothing."""

    def __init__(self, directory: Path):
        self.directory, self.checkpoints = directory, directory / "checkpoints"
        self._metrics = None

    def _ignore(self, *_: Any, **__: Any) -> None:
        pass

    __exit__ = open_metrics = log = print = sync = _ignore
