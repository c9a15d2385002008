"""What a run leaves behind for people to read: its directory, metrics, log and report.

    runs/tiny/
        config.json      the resolved settings, library versions, hashes of the data and the base model
        metrics.jsonl    one JSON object a line: train, eval, sample, checkpoint, warning, memory, done
        train.log        what the terminal showed
        checkpoints/     to go on from
        best.json        which checkpoint has the lowest validation loss
        adapter/         the result, in PEFT's format (model/ when every parameter was trained)
        rejected.jsonl   the records that were left out, and why
        preview.txt      a few samples as the model sees them
        report.md, report.json

One process owns the directory at a time; a run that is refused before its first step leaves none behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tqdm import tqdm

from nanoft import UserError
from nanoft.untrusted import redact


@dataclass
class Meter:
    """Sums since the last log line, and over the whole run; saved with the run, so that a resumed one adds up."""

    nats: float = 0.0  # since the last log line
    tokens: int = 0  # without padding
    target_tokens: int = 0
    seconds: float = 0.0
    total_tokens: int = 0  # of the run, all sessions together
    total_seconds: float = 0.0

    def add(self, nats: float, tokens: int, target_tokens: int, seconds: float) -> None:
        """Count one optimizer step."""
        self.nats += nats
        self.tokens += tokens
        self.target_tokens += target_tokens
        self.seconds += seconds
        self.total_tokens += tokens
        self.total_seconds += seconds

    def line(self) -> dict[str, float]:
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


class Run:
    """An open run directory: the lock on it, and the places to write to."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.checkpoints = directory / "checkpoints"
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = open(directory / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held while the run lasts)
        except OSError as error:
            raise UserError(f"output.dir: {directory}: cannot be written: {error.strerror}") from None
        self._take_lock()
        self._metrics: IO[str] | None = None

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        """Take a run directory for this process.

        Raises:
            UserError: another process has it, it cannot be written, or it is something else's directory.
        """
        path = Path(directory)
        if path.exists() and not path.is_dir():
            raise UserError(f"output.dir: {path}: is a file: choose another output.dir")
        if path.is_dir() and any(path.iterdir()) and not (path / ".lock").exists():
            raise UserError(f"output.dir: {path}: is not empty and not a run of nanoft: choose another output.dir")
        return cls(path)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._metrics is not None:
            self._metrics.close()
        started = (self.directory / "metrics.jsonl").exists()
        if kind is not None and issubclass(kind, UserError) and self._made and not started:
            shutil.rmtree(self.directory, ignore_errors=True)  # it was refused before it began
            with contextlib.suppress(OSError):
                for parent in self._made[1:]:
                    parent.rmdir()  # only if it is empty
        self._lock.close()

    def recorded_config(self) -> dict[str, Any] | None:
        """The config.json of the run that lives here, if one does; one that took no step can still be changed."""
        path = self.directory / "config.json"
        if not path.is_file() or not (self.directory / "metrics.jsonl").is_file():
            return None
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            return tree if isinstance(tree, dict) else None
        except ValueError:
            raise UserError(f"{path}: damaged: remove the directory or choose another output.dir") from None

    def is_complete(self, step: int) -> bool:
        """Whether the run ended with this step and has its report."""
        path = self.directory / "report.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))["training"]["steps"] == step
        except (OSError, ValueError, KeyError, TypeError):
            return False  # not there, or cut off while it was written

    def skipped_before(self, step: int) -> int:
        """How many windows were left out before that optimizer step, because their loss was not finite."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        return sum('"step skipped"' in line and _step_of(line) < step for line in lines)

    def begin(self, last_step: int) -> None:
        """Open the metrics; lines beyond `last_step` belong to steps that will be done again, and go."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= last_step]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(aside, path)
        self._metrics = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed in __exit__)

    def log(self, event: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        assert self._metrics is not None, "begin() comes first"
        line = {"event": event, "step": step, **values, "time": round(time.time(), 3)}
        self._metrics.write(redact(as_json(line)) + "\n")

    def say(self, text: str = "") -> None:
        """Print to the terminal, above the progress bar if there is one, and to train.log."""
        text = redact(text)
        with contextlib.suppress(BrokenPipeError, UnicodeEncodeError):  # the reader has gone; train.log still has it
            tqdm.write(text, file=sys.stdout)
        with open(self.directory / "train.log", "a", encoding="utf-8") as log:
            log.write(text + "\n")

    def write_report(self, report: dict[str, Any], markdown: str) -> None:
        """report.json for programs and report.md for people."""
        (self.directory / "report.json").write_text(redact(as_json(report, indent=2)) + "\n", encoding="utf-8")
        (self.directory / "report.md").write_text(redact(markdown), encoding="utf-8")

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise UserError(
                f"output.dir: {self.directory}: in use by process {owner}: wait for it or choose another output.dir"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self._lock.flush()


def _step_of(line: str) -> float:
    """The step of a metrics line; infinite for a line that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: it has no word for NaN and infinity, so they become null."""

    def strict(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: strict(item) for key, item in part.items()}
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(strict(value), indent=indent, ensure_ascii=False, allow_nan=False)


def clock(seconds: float) -> str:
    """A duration for people: 9 s, 2 min 5 s, 3 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; reads well in a terminal, too."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
