"""What every command shares: arguments, exit codes, standard streams, checks, and stopping on a signal.

`--help` and a mistyped option should not wait for torch, whose import takes seconds. A script therefore builds its
parser and calls `check` first, and imports what needs torch after that.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NoReturn

from nanoft import TrainingFailed, UserError, __version__
from nanoft.config.aliases import suggest_override
from nanoft.io.tables import wrap
from nanoft.io.untrusted import one_line
from nanoft.runtime import cores

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
Outcome = Literal["ok", "warn", "FAIL"]
COLORS = {"ok": "32", "warn": "33", "FAIL": "31"}  # ANSI: green, yellow, red
FORCEABLE = ("room", "stop", "bos", "targets", "head", "disk")  # checks that --force may override


class Arguments(argparse.ArgumentParser):
    """A parser with `--version`; a mistake in the arguments is a UserError, one line like every other."""

    def __init__(self, **settings: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})
        self.add_argument("--version", action="version", version=f"nanoft {__version__}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Options and positional arguments in any order; a setting written as an option gets a hint."""
        argv = [re.sub(r"(?<==)~(?=/)", os.path.expanduser("~"), word) for word in argv]  # unexpanded: --out=~/x
        parse = self.parse_known_args if self._subparsers else self.parse_known_intermixed_args
        args, unknown = parse(argv)
        if unknown and unknown[0].startswith("-") and hasattr(args, "overrides"):
            name, _, value = unknown[0].partition("=")
            if field := suggest_override(name.lstrip("-")):
                raise UserError(f"{name}: settings are written section.field=value: {field}={value or 'VALUE'}")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return args

    def check(self, argv: list[str]) -> None:
        """End the process if the arguments are --help, --version or a mistake; otherwise prepare for torch."""

        def main(argv: list[str]) -> int:
            self.parse(argv)
            return 0

        with contextlib.ExitStack() as silence:
            if os.environ.get("RANK", "0") != "0":  # under torchrun, one process prints
                silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
                silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
            if code := command(main)(argv):
                sys.exit(code)
        cores.prepare()


def renamed(old: str, new: str) -> NoReturn:
    print(f"error: python -m {old} was renamed: use python -m nanoft {new}", file=sys.stderr)
    sys.exit(2)


def command(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Give a command's `main` its exit codes: 2 and 3 with one line on stderr, 130 for Ctrl-C, never a traceback."""

    @functools.wraps(main)
    def with_exit_code(argv: list[str]) -> int:
        open_standard_streams()
        try:
            code = main(argv)
            sys.stdout.flush()  # notices a closed pipe here rather than at interpreter exit
            return code
        except UserError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 2
        except TrainingFailed as error:
            print(f"failed: {one_line(error)}", file=sys.stderr)
            return 3
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130  # as shells report Ctrl-C
        except BrokenPipeError:  # `... | head` has read enough, which is not an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:  # a full disk, a directory that is not writable
            what = f"{error.filename}: " * bool(error.filename) + str(error.strerror or error)
            print(f"error: {one_line(what)}: fix that and run the same command again", file=sys.stderr)
            return 2

    return with_exit_code


@dataclass(frozen=True)
class Check:
    """One line of a report; `fix` says what to do unless the outcome is ok."""

    name: str
    outcome: Outcome
    found: str
    fix: str = ""

    @classmethod
    def of(cls, name: str, passed: bool, found: str, fix: str = "") -> Check:
        return cls(name, "ok" if passed else "FAIL", found, fix)

    @property
    def passed(self) -> bool:
        return self.outcome != "FAIL"

    def __str__(self) -> str:
        color = sys.stdout.isatty()
        outcome = f"\033[{COLORS[self.outcome]}m{self.outcome:4}\033[0m" if color else f"{self.outcome:4}"
        return wrap(f"{outcome} {self.name:13} {self.found}" + (f": {self.fix}" if self.fix else ""), 19)

    def preflight_line(self) -> str:
        """The line of `train.py`, which can continue anyway."""
        fix = "" if self.passed else f": {self.fix} (or --force {self.name})"
        return wrap(f"preflight {self.name:9} {self.outcome:4}  {self.found}{fix}", 26)


def require_passed(checks: Sequence[Check], forced: Sequence[str]) -> None:
    """Raise a UserError for the first failed check that is not forced by name."""
    for check in checks:
        if not check.passed and check.name not in forced:
            raise UserError(f"preflight: {check.name}: {check.found}: {check.fix} (or --force {check.name})")


def open_standard_streams() -> None:
    """Make stdin, stdout and stderr usable, and escape characters that the terminal cannot encode."""
    # The descriptor of a closed stream (`>&-`) would be reused by the next file that is opened, such as a checkpoint.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 (as long as the process)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class _Lenient(io.FileIO):
    """A file whose failed writes are dropped."""

    def write(self, data: Any) -> int:
        written = None  # None also from a non-blocking descriptor
        with contextlib.suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written


def ignore_broken_output() -> None:
    """From now on, ignore failed writes to stdout and stderr: training survives its terminal; train.log is complete."""
    for name, original in (("stdout", sys.__stdout__), ("stderr", sys.__stderr__)):
        stream = getattr(sys, name)
        if stream is not original or not isinstance(stream, io.TextIOWrapper):
            continue  # replaced by a notebook or a test
        with contextlib.suppress(OSError):
            stream.flush()
        buffer = io.BufferedWriter(_Lenient(stream.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True))


class StopRequest:
    """Turn a signal into a flag that the loop reads between two steps; a second SIGINT stops immediately.

    SIGHUP: the terminal was closed. SIGUSR1: sent by SLURM before the time limit (`--signal=USR1@120`). Signals that
    are ignored, as under `nohup`, stay ignored. Outside the main thread, or if not enabled, this does nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled, self.signal_name = enabled, ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if self.enabled and threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name
