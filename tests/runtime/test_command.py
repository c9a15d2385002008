"""Arguments and mistakes in them, checks, exit codes, and the signals that stop a command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanoft import TrainingFailed, UserError, __version__
from nanoft.runtime.command import STOP_SIGNALS, Arguments, Check, StopRequest, command, require_passed

ROOT = Path(__file__).parents[2]


# --- arguments


@pytest.fixture
def parser() -> Arguments:
    parser = Arguments(prog="x.py")
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--resume")
    return parser


def test_options_may_stand_anywhere(parser: Arguments) -> None:
    for line in ("c.py a=1 b=2 --resume no", "--resume no c.py a=1 b=2", "c.py a=1 --resume no b=2"):
        args = parser.parse(line.split())
        assert (args.config, args.overrides, args.resume) == ("c.py", ["a=1", "b=2"], "no")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("c.py --lr 1e-4", "--lr: settings are written section.field=value: training.learning_rate=VALUE"),
        ("--lr=1e-4", "--lr: settings are written section.field=value: training.learning_rate=1e-4"),
        ("--training.learning_rate=1e-4", "section.field=value: training.learning_rate=1e-4"),
        ("--max-steps 5 a=1", "--max-steps: settings are written section.field=value: training.max_steps=VALUE"),
        ("--max_steps=-1", "section.field=value: training.max_steps=-1"),
        ("--lora_r --resume no", "section.field=value: lora.rank=VALUE"),
        ("--per_device_train_batch_size=2", "section.field=value: training.micro_batch_size=2"),
        ("--zzzz 3", "unrecognized arguments: --zzzz (see --help)"),
        ("--resume", "argument --resume: expected one argument (see --help)"),
    ],
)
def test_a_setting_spelled_as_an_option_is_explained(line: str, expected: str, parser: Arguments) -> None:
    with pytest.raises(UserError) as refused:
        parser.parse(line.split())
    assert str(refused.value).endswith(expected)


def test_a_parser_without_settings_explains_none() -> None:
    parser = Arguments(prog="x.py")
    parser.add_argument("run")
    with pytest.raises(UserError, match="unrecognized arguments: --lr"):
        parser.parse(["a", "--lr", "3"])


def test_check_ends_the_process_only_for_an_answer(
    parser: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser.check(["c.py"])
    assert capsys.readouterr() == ("", "")
    for line, code, out, err in (("--version", 0, f"nanoft {__version__}\n", ""), ("--resume", 2, "", "error: ")):
        with pytest.raises(SystemExit) as left:
            parser.check([line])
        assert left.value.code == code
        said = capsys.readouterr()
        assert said.out == out
        assert said.err.startswith(err)
    monkeypatch.setenv("RANK", "1")  # torchrun's other processes leave the answer to the first
    with pytest.raises(SystemExit) as left:
        parser.check(["--resume"])
    assert left.value.code == 2
    assert capsys.readouterr() == ("", "")


# --- checks


def test_what_fails_stops_unless_it_is_forced() -> None:
    checks = [
        Check.of("one", True, "fine"),
        Check.of("two", False, "wrong", "mend it"),
        Check.of("three", False, "bad", "or not"),
    ]
    with pytest.raises(UserError, match=r"^preflight: two: wrong: mend it \(or --force two\)$"):
        require_passed(checks, [])
    with pytest.raises(UserError, match=r"^preflight: three: bad"):
        require_passed(checks, ["two"])
    require_passed(checks, ["two", "three"])
    assert checks[0].preflight_line() == "preflight one       ok    fine"
    assert checks[1].preflight_line() == "preflight two       FAIL  wrong: mend it (or --force two)"


# --- exit codes and signals


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("lora.rank: 0:\n  out of range"), 2, "error: lora.rank: 0: out of range"),
        (TrainingFailed("diverged"), 3, "failed: diverged"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(28, "No space left on device", "/disk/x"),
            2,
            "error: /disk/x: No space left on device: fix that",
        ),
    ],
)
def test_what_ends_a_command_is_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def main(argv: list[str]) -> int:
        raise error

    assert main([]) == code
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_a_bug_is_not_hidden() -> None:
    @command
    def main(argv: list[str]) -> int:
        return 1 // len(argv)

    with pytest.raises(ZeroDivisionError):
        main([])
    assert main(["x"]) == 1


@pytest.mark.parametrize("script", ["train.py", "eval.py", "merge.py", "-m nanoft chat"])
def test_a_mistake_in_the_arguments_is_one_line(script: str) -> None:
    done = subprocess.run(
        [sys.executable, *script.split(), "a", "--nonsense"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_becomes_a_wish_to_stop_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        for again in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # the checkpoint is still written
            os.kill(os.getpid(), again)
        assert stop.signal_name == number.name
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_an_interrupt_after_another_signal_stops_at_once(first: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest():  # noqa: PT012 (both signals are the point)
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_stays_ignored(ignored: signal.Signals) -> None:
    """`nohup` ignores SIGHUP, and a shell's script SIGINT for what it starts in the background."""
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), ignored)
            assert not stop
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop
        assert signal.getsignal(ignored) == signal.SIG_IGN
    finally:
        signal.signal(ignored, before)


def test_no_signal_is_lost_between_steps() -> None:
    """Sent from another process at any instant, while the loop asks and asks."""
    for _ in range(50):
        with StopRequest() as stop:
            child = os.fork()
            if child == 0:
                os.kill(os.getppid(), signal.SIGTERM)
                os._exit(0)
            deadline = time.monotonic() + 10
            while not stop:
                assert time.monotonic() < deadline
            os.waitpid(child, 0)


def test_in_another_thread_signals_are_left_alone() -> None:
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    seen: list[object] = []

    def use() -> None:
        with StopRequest() as stop:
            seen.extend([bool(stop), *(signal.getsignal(n) for n in STOP_SIGNALS)])

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [False, *before]


# --- standard streams


def test_a_command_whose_reader_has_gone_ends_quietly() -> None:
    code = "import sys; from nanoft.runtime.command import command; command(lambda _: print('x'))([])"
    command = f"{sys.executable} -c {code!r} | true; exit ${{PIPESTATUS[0]}}"
    command = command.replace("print(", "__import__('time').sleep(0.3) or print(")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
