"""Trackers: events read back from the files of TensorBoard, W&B and the plotting process."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import train
from nanoft import UserError
from nanoft.config import Config, LoggingConfig
from nanoft.tracking import trackers
from nanoft.tracking.run import Run
from nanoft.tracking.trackers import (
    Plots,
    TensorBoard,
    Trackio,
    WandB,
    build_trackers,
    require_tracker_packages,
    scalars,
)

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "x" * 34


def logged(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")


class Listening:
    """Records events, and fails at a given step."""

    name = "listening"

    def __init__(self, fails_at: int = -1):
        self.told: list[dict[str, Any]] = []
        self.fails_at, self.is_closed = fails_at, False

    def log(self, event: dict[str, Any]) -> None:
        if event["step"] == self.fails_at:
            raise OSError("gone")
        self.told.append(event)

    def close(self) -> None:
        self.is_closed = True
        if self.fails_at == 0:
            raise OSError("gone")


def test_a_listener_is_told_what_the_file_says_and_one_that_fails_is_an_event(tmp_path: Path) -> None:
    whole, broken, last = Listening(), Listening(2), Listening(0)
    with Run.open(tmp_path / "run") as run:
        run.open_metrics(0, [0, 0], [])
        run.trackers = [broken, whole, last]
        for step in (1, 2, 3):
            run.log("train", step, loss=float("nan"), text=TOKEN)
    assert whole.told == logged(run)
    assert TOKEN not in str(whole.told)
    assert whole.is_closed
    assert [event["step"] for event in broken.told] == [1]
    warned = [(e["step"], e["what"], e["error"]) for e in logged(run) if e["event"] == "warning"]
    assert warned == [(2, "listening failed", "OSError: gone"), (3, "listening failed", "OSError: gone")]


def test_the_numbers_of_an_event() -> None:
    event = {
        "event": "train",
        "step": 3,
        "time": 1.5,
        "loss": None,
        "a": 2,
        "is": True,
        "text": "x",
        "m": {"q": {"n": 1.0}},
    }
    assert dict(scalars(event, "train")) == {"train/a": 2.0, "train/m/q/n": 1.0}


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == name else object())
    require_tracker_packages(LoggingConfig())
    message = rf"logging\.report_to: {name} is not installed: pip install -e '\.\[{name}\]', or set none"
    with pytest.raises(UserError, match=message):
        require_tracker_packages(LoggingConfig(report_to=name))


ALL = {"wandb", "tensorboard", "trackio", "matplotlib"}


@pytest.mark.parametrize(
    ("report_to", "installed", "expected"),
    [
        ("none", ALL, [Plots]),
        ("none", ALL - {"matplotlib"}, []),  # a chart in the terminal instead
        ("wandb", ALL, [Plots, WandB]),
        ("auto", ALL, [Plots, TensorBoard]),
        ("auto", {"wandb"}, []),  # only if it is named
        ("auto", {"tensorboard", "trackio"}, [TensorBoard]),
        ("auto", {"trackio"}, [Trackio]),
        ("auto", set(), []),
        ("all", {"wandb", "trackio"}, [Trackio, WandB]),
        ("wandb,trackio", ALL, [Plots, Trackio, WandB]),
        ("[wandb, tensorboard]", {"wandb", "tensorboard"}, [TensorBoard, WandB]),
        (["tensorboard", "trackio"], ALL, [Plots, TensorBoard, Trackio]),
    ],
)
def test_which_trackers_there_are(
    report_to: Any, installed: set[str], expected: list[type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    config = Config().override({"logging.report_to": report_to})
    require_tracker_packages(config.logging)
    assert [type(tracker) for tracker in build_trackers(config, tmp_path, 0)] == expected
    assert Config.from_dict(config.to_dict()) == config


def test_an_unknown_tracker_is_one_line() -> None:
    with pytest.raises(UserError, match=r"logging\.report_to: 'wandbb' is not a tracker: did you mean wandb\?"):
        require_tracker_packages(LoggingConfig(report_to="tensorboard,wandbb"))


# ---- Plots


def test_plots_are_drawn_while_the_run_goes_on_one_at_a_time_and_at_its_end(tmp_path: Path) -> None:
    needs("matplotlib")
    plots, picture = Plots(tmp_path / "run", "step"), tmp_path / "run" / "plots" / "curves.svg"
    with Run.open(tmp_path / "run") as run:
        run.open_metrics(0, [0, 0], [])
        run.trackers = [plots]
        run.log("memory", 0, total_steps=3)
        nothing = plots._drawing
        run.log("train", 1, loss=3.0)
        first = plots._drawing
        assert first is not nothing
        run.log("train", 2, loss=2.0)
        assert plots._drawing is first  # it goes on, and the next waits
        first.result(60)
        early = picture.read_bytes()
        run.log("train", 3, loss=1.0)
        assert plots._drawing is first  # that one is done, and the next may not begin yet
    assert picture.read_bytes() != early
    assert not [event for event in logged(run) if event["event"] == "warning"]


@pytest.mark.parametrize(("when", "epochs"), [("end", []), ("epoch", [3, 5]), ("step", [1, 2, 3, 4, 5])])
def test_plots_are_due_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, epochs: list[int]
) -> None:
    plots, drawn = Plots(tmp_path, when), []
    for step, epoch in enumerate([0, 0, 1, 1, 2], start=1):
        monkeypatch.setattr(plots, "_draw", lambda step=step: drawn.append(step) or 0.0)
        plots.log({"event": "train", "step": step, "epoch": epoch, "time": 0.0})
        plots._drawing.result()
    assert drawn == epochs


def test_the_process_that_draws_finds_nanoft_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    done = subprocess.CompletedProcess("", 0)
    monkeypatch.setattr(trackers.subprocess, "run", lambda *_, **options: started.append(options) or done)
    Plots(tmp_path, "end").close()
    first = started[0]["cwd"]  # where `python -m` looks first
    assert (Path(first) / "nanoft" / "__init__.py").is_file()


def test_plots_that_cannot_be_drawn_are_an_event(tmp_path: Path) -> None:
    needs("matplotlib")
    with Run.open(tmp_path / "run") as run:
        (run.directory / "plots").write_text("in the way")
        run.open_metrics(0, [0, 0], [])
        run.trackers = [Plots(run.directory, "end")]
        run.log("train", 1, loss=3.0)
    (warning,) = [event for event in logged(run) if event["event"] == "warning"]
    assert warning["what"] == "drawing plots failed"
    assert "File exists" in warning["error"]


def test_a_drawing_that_is_stuck_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "sleeper"))
    (tmp_path / "sleeper").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "sleeper").chmod(0o755)
    started = time.monotonic()
    with Run.open(tmp_path / "run") as run:
        run.open_metrics(0, [0, 0], [])
        run.trackers = [Plots(run.directory, "end")]
        run.log("train", 1, loss=3.0)
    assert time.monotonic() - started < 30
    assert "timed out" in logged(run)[-1]["error"]


# ---- TensorBoard and W&B


def test_tensorboard_reads_back_what_was_logged_and_a_resumed_run_replaces_what_it_does_again(tmp_path: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, loss in ((0, 5.0), (2, 7.0)):  # interrupted after step 4, its checkpoint was of step 2
        with Run.open(tmp_path / "run") as run:
            run.open_metrics(first, [0, first], [])
            run.trackers = [TensorBoard(run.directory, Config(), first)]
            for step in (first + 1, first + 2, *([4] if first == 0 else [])):
                run.log("train", step, loss=loss / step, note="text", missing=float("nan"))
            run.log("eval", first + 2, loss=loss)
        time.sleep(1.1)  # the names of event files have seconds
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["eval/loss", "train/loss"]
    told = [(scalar.step, round(scalar.value, 5)) for scalar in read.Scalars("train/loss")]
    assert told == [(1, 5.0), (2, 2.5), (3, round(7 / 3, 5)), (4, 1.75)]
    times = {e["step"]: e["time"] for e in logged(run) if e["event"] == "train"}
    assert {scalar.step: round(scalar.wall_time, 3) for scalar in read.Scalars("train/loss")} == times


def records(file: Path) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; crc, length, type) after seven bytes."""
    content, found, at, part = file.read_bytes(), [], 7, b""
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(part)
            part = b""
    return found


def test_wandb_stays_offline_and_its_file_has_what_was_logged_and_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("wandb")
    from wandb.proto import wandb_internal_pb2

    def kind(content: bytes) -> str | None:
        return wandb_internal_pb2.Record.FromString(content).WhichOneof("record_type")

    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    with Run.open(tmp_path / "run") as run:
        run.open_metrics(0, [0, 0], [])
        run.trackers = [WandB(run.directory, Config(), 0)]
        for step in (1, 2):
            run.log("train", step, loss=3.0 / step, text=TOKEN)
        run.log("warning", 2, what="nothing to count")
    assert not [event for event in logged(run) if "failed" in event.get("what", "")]
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    history: list[tuple[int, float]] = []
    deadline = time.monotonic() + 30
    while "exit" not in map(kind, records(file)) and time.monotonic() < deadline:
        time.sleep(0.1)  # another process writes the file, and is not always done when it says so
    for content in records(file):
        record = wandb_internal_pb2.Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            history.append((json.loads(items["step"]), json.loads(items["train/loss"])))
    assert history == [(1, 3.0), (2, 1.5)]
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert os.environ["WANDB_API_KEY"].encode() not in written
    assert TOKEN.encode() not in written


def test_trackio_reads_back_what_was_logged_without_a_network(tmp_path: Path) -> None:
    """In a process of its own, because trackio reads TRACKIO_DIR when it is imported."""
    needs("trackio")
    code = """
import json, socket, sys, pathlib
from nanoft.config import Config
from nanoft.tracking.run import Run
from nanoft.tracking.trackers import Trackio

def refuse(*_):
    raise AssertionError("a connection")

socket.socket.connect = socket.create_connection = refuse
with Run.open(sys.argv[1]) as run:
    run.open_metrics(0, [0, 0], [])
    run.trackers = [Trackio(run.directory, Config(), 0)]
    for step in (1, 2):
        run.log("train", step, loss=3.0 / step, text="x", missing=float("nan"))
    run.log("warning", 2, what="nothing to count")
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([[line["step"], line["train/loss"]] for line in SQLiteStorage.get_logs("nanoft", "run")]))
"""
    run = tmp_path / "run"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRACKIO")}
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[1, 3.0], [2, 1.5]]  # and nothing else was printed
    assert list((run / "trackio").iterdir())
    assert "failed" not in (run / "metrics.jsonl").read_text()


def test_a_run_of_train_py_tells_them(tmp_path: Path) -> None:
    """Also on a console that is no terminal and has no file behind it, like a notebook's."""
    needs("matplotlib")
    needs("tensorboard")
    from runs import quick

    class Notebook:
        """ipykernel's replacement of stdout: text only, no file, no terminal."""

        encoding, errors = "UTF-8", "strict"

        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> int:
            if not isinstance(text, str):
                raise TypeError(f"write() argument must be str, not {type(text)}")
            self.text += text
            return len(text)

        def flush(self) -> None:
            pass

        def isatty(self) -> bool:
            return False

        def fileno(self) -> int:
            raise OSError("there is no file")

    out, err = Notebook(), Notebook()
    changes = {"training__max_steps": 4, "logging__progress_bar": True, "logging__gradient_steps": 2}
    changes |= {"logging__plots": "end", "logging__report_to": "[tensorboard]", "evaluation__prompts": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert train.main(quick(tmp_path / "run", **changes)) == 0
    assert "4/4" in err.text or "0/4" in err.text  # the bar
    assert "| records read " in out.text
    assert out.text == (tmp_path / "run" / "train.log").read_text()  # lines whole, in order, none torn by the bar
    report = (tmp_path / "run" / "report.md").read_text()
    assert "![curves](plots/curves.png)" in report
    assert (tmp_path / "run" / "plots" / "curves.png").is_file()
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = {line["step"]: line["grad_norm"] for line in lines if line["event"] == "train"}
    looked = [line for line in lines if line["event"] == "gradients"]
    assert [line["step"] for line in looked] == [2, 4]
    for line in looked:  # squares of the parts' norms add up to that of the whole, before clipping
        whole = sum(part["norm"] ** 2 for part in line["modules"].values()) ** 0.5
        assert whole == pytest.approx(norms[line["step"]], rel=1e-4)
