"""The run directory: locking, contents, figures and tables."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanoft import UserError
from nanoft.tracking.run import AppendOnlyFile, Meter, Run, may_be_running

HOST = socket.gethostname()
HOLD = """
import sys
from nanoft.tracking.run import Run
with Run.open(sys.argv[1]):
    print("mine", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def other_owner(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run directory until the block ends."""
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        yield process


def lines(run: Run) -> list[dict[str, Any]]:
    text = (run.directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n") if line]


# --- the directory


def test_one_process_owns_the_directory_at_a_time(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with other_owner(directory) as process:
        owner = rf"output\.dir: .*run is in use by process {process.pid} on {HOST} since 20"
        with pytest.raises(UserError, match=owner):
            Run.open(directory)
        assert directory.is_dir()  # whoever comes second takes nothing away
    with Run.open(directory):
        owner = (directory / ".lock").read_text()
        assert owner.startswith(f"{os.getpid()} on {HOST} since 20")
        assert len(owner.splitlines()) == 1
    assert (directory / ".lock").read_text() == ""


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with other_owner(tmp_path / "run") as process:
        process.kill()
    with Run.open(tmp_path / "run") as run:
        run.print("taken over")


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_warning_asks_for_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.open(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"{os.getpid()} on {HOST} since 20")
    assert "run cannot be locked (No locks available): start only one process in it" in capsys.readouterr().out


def test_the_process_that_a_lock_names() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass  # ended and reaped: its number is free
    since = "since 2025-01-31 12:00:00"
    assert may_be_running(f"{os.getpid()} on {HOST} {since}")
    assert may_be_running(f"1 on another-computer {since}")
    assert not may_be_running(f"{process.pid} on {HOST} {since}")
    assert not may_be_running("")


def test_a_lock_that_was_removed_as_the_message_says_is_made_anew(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        run.open_metrics(0, [0, 0], [])
    (tmp_path / "run" / ".lock").unlink()
    Run.open(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").exists()


def test_a_directory_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty and not a nanoft run"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        Run.open(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="cannot write to"):
        Run.open(tmp_path / "thesis.tex" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def refuse(directory: Path, error: Exception, begin: bool = False) -> None:
    with pytest.raises(type(error)), Run.open(directory) as run:  # noqa: PT012 (a run that begins, then fails)
        run.print("hello")
        if begin:
            run.open_metrics(0, [0, 0], [])
        raise error


def test_a_run_refused_before_it_began_leaves_nothing(tmp_path: Path) -> None:
    refuse(tmp_path / "run", UserError("no"))
    assert not (tmp_path / "run").exists()


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        run.open_metrics(0, [0, 0], [])
        run.log("eval", 1, loss=float("nan"), perplexity=float("inf"), tokens=2)
        run.write_report({"tuned": {"perplexity": float("-inf"), "loss": 1.5}}, "")
        assert [lines(run)[0][key] for key in ("loss", "perplexity", "tokens")] == [None, None, 2]
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == {"tuned": {"perplexity": None, "loss": 1.5}}


def test_anything_else_that_ends_a_run_leaves_its_directory(tmp_path: Path) -> None:
    refuse(tmp_path / "began", UserError("no"), begin=True)
    refuse(tmp_path / "crashed", RuntimeError("a bug"))
    with Run.open(tmp_path / "old") as run:
        run.print("first")
    refuse(tmp_path / "old", UserError("no"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["began", "crashed", "old"]
    assert (tmp_path / "old" / "train.log").read_text() == "first\nhello\n"


def test_an_empty_directory_may_be_used(tmp_path: Path) -> None:
    with Run.open(tmp_path) as run:
        assert run.recorded_config() is None
        assert run.finished_step() is None


def test_windows_that_were_left_out_are_known(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        assert run.skipped_windows() == set()
        run.open_metrics(0, [0, 0], [])
        for what, window in (("step skipped", [0, 1]), ("spike", [0, 2]), ("step skipped", [1, 0])):
            run.log("warning", 1, what=what, window=window)
        assert run.skipped_windows() == {(0, 1), (1, 0)}
        run.log("warning", 1, what="rolled back", left_out=[[0, 2], [1, 0]])  # the spike was taken before
        assert run.skipped_windows() == {(0, 1), (0, 2), (1, 0)}


def test_the_recorded_config_is_read_or_said_to_be_damaged(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        recorded = {"lora": {"rank": 4}, "provenance": {"date": "2025-01-31"}}
        (run.directory / "config.json").write_text(json.dumps(recorded))
        assert run.recorded_config() is None  # a run that took no step can still be changed
        (run.directory / "metrics.jsonl").write_text("")
        assert run.recorded_config() == recorded
        (run.directory / "config.json").write_text('{"lora": ')
        with pytest.raises(UserError, match=r"config\.json: corrupted"):
            run.recorded_config()


def test_a_run_has_ended_when_its_report_says_so(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        run.write_report({"training": {"steps": 7}}, "# Report\n")
        assert run.finished_step() == 7
        assert (run.directory / "report.md").read_text() == "# Report\n"
        whole = (run.directory / "report.json").read_text()
        (run.directory / "report.json").write_text(whole[:12])  # the power went while it was written
        assert run.finished_step() is None


# --- metrics.jsonl and train.log


def test_a_resumed_run_drops_what_will_be_done_again_and_torn_lines(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        run.open_metrics(0, [0, 0], [])
        for step in (1, 2, 3):
            run.log("train", step, loss=1 / step, text="a\u2028b\né")  # a line separator that JSON does not escape
        run.log("eval", 2, loss=0.5)
    with open(run.directory / "metrics.jsonl", "ab") as file:
        file.write(b'[2]\n\n{"event": "train", "step": 1, "text": "\xc3')  # cut inside a letter
    with Run.open(tmp_path / "run") as run:
        run.open_metrics(2, [0, 0], [])
        run.log("train", 3, loss=9.0)
        assert [(line["event"], line["step"]) for line in lines(run)] == [
            ("train", 1), ("train", 2), ("eval", 2), ("train", 3),
        ]  # fmt: skip
        assert lines(run)[1]["loss"] == 0.5
        assert lines(run)[1]["text"] == "a\u2028b\né"
        assert lines(run)[3]["loss"] == 9.0


def test_a_line_is_on_the_disk_when_it_is_logged(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run") as run:
        run.open_metrics(0, [0, 0], [])
        run.log("train", 1, loss=2.0)
        (line,) = lines(run)
    assert list(line) == ["event", "step", "loss", "time"]


def test_what_is_said_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.open(tmp_path / "run") as run:
        run.print("Grüße")
        run.print()
    assert (run.directory / "train.log").read_text(encoding="utf-8") == "Grüße\n\n"
    assert capsys.readouterr().out == "Grüße\n\n"


def test_a_reader_that_has_gone_does_not_stop_the_run(tmp_path: Path) -> None:
    code = (
        "from nanoft.tracking.run import Run\nwith Run.open({!r}) as run:\n    for _ in range(3): run.print('x' * 9999)"
    )
    command = [sys.executable, "-u", "-c", code.format(str(tmp_path / "run"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors
    assert len((tmp_path / "run" / "train.log").read_text().splitlines()) == 3


@contextlib.contextmanager
def no_file_longer_than(size_bytes: int) -> Iterator[None]:
    """The kernel writes up to there and then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_of_lines_holds_whole_lines_only_and_in_the_end_all(tmp_path: Path) -> None:
    path, refused = tmp_path / "lines", 0
    written = [f"{number} {'x' * (7 * number % 50)}é\n" for number in range(40)]
    file = AppendOnlyFile(path)
    for number, line in enumerate(written):
        with no_file_longer_than(300 if number < 20 else 700):
            try:
                file.append(line.removesuffix("\n"))
            except OSError as error:
                assert error.errno == errno.EFBIG  # noqa: PT017 (most lines are not refused)
                refused += 1
            text = path.read_text(encoding="utf-8")
            assert "".join(written[: number + 1]).startswith(text)
            assert text.endswith("\n")
    assert 10 < refused < 40
    file.sync()
    assert path.read_text(encoding="utf-8") == "".join(written)
    with no_file_longer_than(1), contextlib.suppress(OSError):
        file.append("last")
    file.close()
    assert path.read_text(encoding="utf-8") == "".join(written) + "last\n"


def test_a_disk_that_refuses_a_line_is_told_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Run.open(tmp_path / "run") as run:
        run.open_metrics(0, [0, 0], [])
        run.log("train", 1, loss=2.0)
        with no_file_longer_than(0):
            for step in (2, 3):
                run.log("train", step, loss=2.0)
                run.print(f"step {step}")
                run.sync()
        run.log("train", 4, loss=2.0)
        run.print("step 4")
        assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]
    said = capsys.readouterr().out
    assert [said.count(f"{name}: File too large") for name in ("metrics.jsonl", "train.log")] == [1, 1]
    assert [f"step {step}\n" in said for step in (2, 3, 4)] == [True] * 3
    assert (run.directory / "train.log").read_text() == "step 4\n"


def test_a_directory_that_is_no_longer_ours_is_noticed_before_a_save(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with Run.open(directory) as run:
        run.open_metrics(0, [0, 0], [])
        run.sync()
        directory.rename(tmp_path / "elsewhere")
        run.print("still here")
        with pytest.raises(UserError, match=r"output\.dir: .*run was removed or replaced"):
            run.sync()
        with Run.open(directory), pytest.raises(UserError, match="was removed or replaced"):
            run.sync()
        shutil.rmtree(directory)


def test_what_took_the_place_of_a_run_that_had_begun_is_kept(tmp_path: Path) -> None:
    directory = tmp_path / "run"

    def replaced_meanwhile() -> None:
        with Run.open(directory) as run:
            run.open_metrics(0, [0, 0], [])
            directory.rename(tmp_path / "moved")
            directory.mkdir()
            (directory / "precious.txt").write_text("of somebody else")
            run.sync()

    with pytest.raises(UserError, match="removed or replaced"):
        replaced_meanwhile()
    assert (directory / "precious.txt").exists()


def test_what_a_killed_process_was_writing_is_swept(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run"):
        pass
    for name in (".tmp-best.json-1", ".tmp-config.json-99", ".tmp-preflight-1", ".mine"):
        (tmp_path / "run" / name).write_text("x")
    (tmp_path / "run" / ".tmp-adapter-1").mkdir()
    (tmp_path / "run" / ".tmp-adapter-1" / "half").write_text("x")
    with Run.open(tmp_path / "run"):
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", ".mine"}


def test_a_run_that_begins_again_has_not_ended(tmp_path: Path) -> None:
    """Killed after its last line, before its report: the last line is written again, once."""
    for _ in range(2):
        with Run.open(tmp_path / "run") as run:
            run.open_metrics(1, [0, 0], [])
            run.log("done", 1, steps=1)
            assert [line["event"] for line in lines(run)] == ["done"]


def test_half_a_letter_in_a_name_stops_no_line(tmp_path: Path) -> None:
    name = os.fsdecode(b"l\xe4ufe")  # Latin-1, as old archives have it
    with Run.open(tmp_path / name) as run:
        run.open_metrics(0, [0, 0], [])
        run.log("train", 1, path=name)
        run.print(name)
        run.write_report({"name": name}, name)
        assert lines(run)[0]["path"] == name
        assert json.loads((run.directory / "report.json").read_text())["name"] == name
    assert (run.directory / "train.log").read_text() == "l\\udce4ufe\n"


# --- figures


def test_a_meter_gives_means_over_units_and_starts_again() -> None:
    meter = Meter()
    meter.add(nats=6.0, units=2, tokens=100, target_tokens=2, seconds=1.0, joules=0.0)
    meter.add(nats=2.0, units=6, tokens=60, target_tokens=6, seconds=3.0, joules=0.0)
    assert meter.flush() == {"loss": 1.0, "tokens_per_second": 40.0, "target_tokens_per_second": 2.0}
    meter.add(nats=3.0, units=1, tokens=40, target_tokens=1, seconds=4.0, joules=0.0)
    assert meter.flush() == {"loss": 3.0, "tokens_per_second": 10.0, "target_tokens_per_second": 0.25}
    assert meter.tokens_per_second() == 25.0  # 200 tokens in 8 s


def test_a_meter_goes_on_after_a_restart() -> None:
    whole, first = Meter(), Meter()
    for meter in (whole, first):
        meter.add(6.0, 2, 100, 2, 1.0, 5.0)
    second = Meter(**json.loads(json.dumps(vars(first))))
    for meter in (whole, second):
        meter.add(2.0, 6, 60, 6, 3.0, 5.0)
    assert second == whole
    assert Meter().tokens_per_second() == 0.0
