"""Faults in runs of train.py: a server that has imported everything forks a process for each run and injects the fault.

A fresh interpreter spends seconds on importing torch; a fork of one that has done so starts in milliseconds, so that a
fault at every single operation of a save is a test of seconds. The server computes nothing itself. It reads a request a
line from stdin and answers on stdout:

    {"argv": [...], "out": PATH, "err": PATH, "fault": {...}}   ->  {"pid": 123}
    {"wait": 123, "timeout_s": 60}                              ->  {"code": 0}      negative: killed by that signal

A fault strikes operations that change the disk (open, write, fsync, rename, ...) of paths that match an expression,
counted from 0; or a moment of the training; or the surroundings. Everything that it needs runs in the forked process.
"""

from __future__ import annotations

import builtins
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanoft.objectives import sft
from nanoft.tracking import run
from nanoft.training import progress

ROOT = Path(__file__).parent.parent.parent
OPERATIONS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate")
SAVES = r"/checkpoints(/|$)|best\.json"  # the paths of a save


@dataclass(frozen=True)
class Fault:
    """A fault in a run, and when it occurs."""

    what: str = ""  # kill | torn (half a write, then kill) | an error's number | slow: of an operation
    at: int = 0  # at this operation of those that match
    where: str = SAVES  # regular expression that the path must match
    times: int = 1  # so many operations are struck, one after another
    log: str = ""  # a file that gets a line for each operation that matches
    signals: dict[str, int] = field(default_factory=dict)  # "micro-batch 3" -> SIGTERM; also eval, save, step
    nan: tuple[int, ...] = ()  # the losses of these micro-batches, counted from 1 in this process
    clock: bool = False  # time goes backwards by an hour after every few readings
    full: tuple[str, ...] = ()  # files with these names are on a disk without room
    unprivileged: bool = False  # not as root, who may write everywhere
    environment: dict[str, str | None] = field(default_factory=dict)  # None: not there


@dataclass
class Outcome:
    code: int  # negative: the signal that killed it
    out: str
    err: str


class Running:
    """A run that has been started."""

    def __init__(self, server: Server, pid: int, out: Path, err: Path):
        self.server, self.pid, self.out, self.err = server, pid, out, err

    def wait(self, timeout_s: float = 120) -> Outcome:
        """Until it ends; one that hangs is killed and fails the test."""
        code = self.server.ask(wait=self.pid, timeout_s=timeout_s)["code"]
        assert code is not None, f"still running after {timeout_s} s"
        said = (path.read_text("utf-8", "replace") if path.exists() else "" for path in (self.out, self.err))
        return Outcome(code, *said)  # one that is killed at once has not opened them

    def kill(self) -> Outcome:
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()


class Server:
    """The process that forks, seen from the tests."""

    def __init__(self, scratch: Path, prefix: tuple[str, ...] = ()):
        """
        Args:
            scratch: where the runs' outputs go.
            prefix: words before the command, such as `unshare -Urm`.
        """
        command = [*prefix, sys.executable, __file__]
        self.scratch, self.started = scratch, 0
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv: list[str], fault: Fault | None = None) -> Running:
        self.started += 1
        out, err = (self.scratch / f"{self.started}.{name}" for name in ("out", "err"))
        reply = self.ask(argv=argv, out=str(out), err=str(err), fault=asdict(fault or Fault()))
        return Running(self, reply["pid"], out, err)

    def run(self, argv: list[str], fault: Fault | None = None) -> Outcome:
        return self.start(argv, fault).wait()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


# --- In the server and in the processes that it forks


def serve() -> None:
    """Answer requests until stdin ends."""
    import train  # noqa: F401 (so that the forks need not)

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply: dict[str, Any] = {"code": reap(request["wait"], request["timeout_s"])}
        else:
            child = os.fork()
            if child == 0:
                perform(request)
            reply = {"pid": child}
        print(json.dumps(reply), flush=True)


def reap(pid: int, timeout_s: float) -> int | None:
    """The exit code of a child; None for one that had to be killed because it did not end."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def perform(request: dict[str, Any]) -> None:
    """One run, in a process of its own; ends as the interpreter ends `python train.py`."""
    code = 1
    try:
        for number, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(path, flags, 0o666), number)
        import train

        inject(Fault(**request["fault"]))
        code = train.main(request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def inject(fault: Fault) -> None:
    """Make the fault happen in this process."""
    for name, value in fault.environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if fault.what or fault.log:
        Strike(fault).install()
    if fault.signals or fault.nan:
        Moments(fault).install()
    if fault.clock:
        turn_back_the_clock()
    if fault.full:
        fill_the_disk(fault.full)
    if fault.unprivileged and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


class Strike:
    """Every operation that changes the disk passes through here."""

    def __init__(self, fault: Fault):
        self.fault, self.count = fault, 0
        self.paths: dict[int, str] = {}  # of the files that are open
        self.real = {name: getattr(os, name) for name in OPERATIONS}
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.log = os.open(fault.log, flags) if fault.log else None

    def install(self) -> None:
        for name in OPERATIONS:
            setattr(os, name, functools.partial(self.around, name))

    def around(self, name: str, *args: Any, **options: Any) -> Any:
        path, real = self.path(args, options), self.real[name]
        if re.search(self.fault.where, path):
            number, self.count = self.count, self.count + 1
            if self.log is not None:
                self.real["write"](self.log, f"{name} {path}\n".encode())
            if self.fault.what and self.fault.at <= number < self.fault.at + self.fault.times:
                self.happen(name, args)
        result = real(*args, **options)
        if name == "open":
            self.paths[result] = path
        return result

    def path(self, args: tuple[Any, ...], options: dict[str, Any]) -> str:
        """Of the file that is changed: named, open, or in an open directory."""
        if isinstance(args[0], int):
            return self.paths.get(args[0], "")
        folder = self.paths.get(options.get("dir_fd") or -1, "")
        return os.path.join(folder, os.fspath(args[0]))

    def happen(self, name: str, args: tuple[Any, ...]) -> None:
        what = self.fault.what
        if what == "slow":
            time.sleep(0.02)
        elif what in ("kill", "torn"):
            if what == "torn" and name == "write":
                self.real["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise OSError(int(what), os.strerror(int(what)), args[0] if isinstance(args[0], str) else None)


class Moments:
    """Counts micro-batches, steps, evaluations and saves of this process, and does what is due."""

    def __init__(self, fault: Fault):
        self.fault, self.counts = fault, dict.fromkeys(("micro-batch", "step", "eval", "save"), 0)

    def install(self) -> None:
        import train

        def nll(real: Callable[..., Any], *args: Any) -> Any:
            self.passed("micro-batch")
            return real(*args) * (float("nan") if self.counts["micro-batch"] in self.fault.nan else 1.0)

        def before(moment: str, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
            self.passed(moment)
            return real(*args, **options)

        log = run.Run.log

        def logged(run: Any, event: str, step: int, **values: Any) -> None:
            log(run, event, step, **values)
            if event == "train":
                self.passed("step")

        real, loop = sft.token_nll, train.train

        def looping(*args: Any) -> Any:
            sft.token_nll = functools.partial(nll, real)  # type: ignore[assignment]
            try:
                return loop(*args)
            finally:
                sft.token_nll = real

        train.train = looping
        progress.validate = functools.partial(before, "eval", progress.validate)  # type: ignore[assignment]
        progress.save = functools.partial(before, "save", progress.save)  # type: ignore[assignment]
        run.Run.log = logged  # type: ignore[method-assign]

    def passed(self, moment: str) -> None:
        self.counts[moment] += 1
        number = self.fault.signals.get(f"{moment} {self.counts[moment]}")
        if number is not None:
            os.kill(os.getpid(), number)


def turn_back_the_clock() -> None:
    """Each of Python's clocks goes back by an hour at every seventh reading."""
    readings = 0

    def earlier(real: Callable[[], float]) -> float:
        nonlocal readings
        readings += 1
        return real() - 3600.0 * (readings // 7)

    for name in ("time", "perf_counter", "monotonic"):
        setattr(time, name, functools.partial(earlier, getattr(time, name)))


def fill_the_disk(names: tuple[str, ...]) -> None:
    """Writing to files of these names fails as on a full disk: they are /dev/full, where the kernel says so."""
    opener, low = builtins.open, os.open

    def instead(real: Callable[..., Any], path: Any, *args: Any, **options: Any) -> Any:
        is_full = not isinstance(path, int) and os.path.basename(os.fspath(path)) in names
        return real("/dev/full" if is_full else path, *args, **options)

    builtins.open = functools.partial(instead, opener)
    os.open = functools.partial(instead, low)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve()
