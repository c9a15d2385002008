"""Stop signals at any time: the run saves a checkpoint after the step, and resumes to the same result."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from harness import Fault
from scene import STEPS, Scene, one_line

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
MICRO_BATCHES = 2 * STEPS - 1  # an epoch of 18 samples ends with a smaller window
MOMENTS = ["micro-batch 2", "micro-batch 9", "eval 1", "save 2"]  # inside a window, the last of an epoch, ...
EVERY_MOMENT = [f"micro-batch {n}" for n in range(1, MICRO_BATCHES)] + [f"step {n}" for n in range(1, STEPS)]
EVERY_MOMENT += ["eval 1", *(f"save {n}" for n in range(1, 5))]


def stop_and_go_on(scene: Scene, directory: Path, moment: str, number: signal.Signals) -> None:
    done = scene.run(directory, fault=Fault(signals={moment: number}))
    assert (done.code, done.err) == (75, ""), moment
    step = max(int(path.name.removeprefix("step-")) for path in (directory / "checkpoints").iterdir())
    where = f"after step {step}" if step < STEPS else "before the report"
    assert f"stopped   by {number.name} {where}" in done.out
    assert not (directory / "report.json").exists()
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == list(range(1, step + 1))
    done = scene.run(directory)
    assert (done.code, done.err) == (0, "")
    scene.check_result(directory)


@pytest.mark.parametrize(("moment", "number"), list(zip(MOMENTS, SIGNALS, strict=True)))
def test_a_signal_stops_at_the_next_step(scene: Scene, moment: str, number: signal.Signals, tmp_path: Path) -> None:
    stop_and_go_on(scene, tmp_path / "run", moment, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_any_signal_at_any_moment(scene: Scene, number: signal.Signals, tmp_path: Path) -> None:
    for moment in EVERY_MOMENT:
        stop_and_go_on(scene, tmp_path / moment, moment, number)


def test_stopped_after_each_step_in_turn(scene: Scene, tmp_path: Path) -> None:
    """Every step in a process of its own."""
    for step in range(1, STEPS):
        done = scene.run(tmp_path / "run", fault=Fault(signals={"step 1": signal.SIGTERM}))
        assert done.code == 75
        assert f"after step {step}:" in done.out
    assert scene.run(tmp_path / "run").code == 0
    scene.check_result(tmp_path / "run")


def test_a_second_interrupt_ends_at_once_and_tears_nothing(scene: Scene, tmp_path: Path) -> None:
    for moments in (("micro-batch 5", "micro-batch 6"), ("micro-batch 8", "save 4")):
        directory = tmp_path / moments[1]
        done = scene.run(directory, fault=Fault(signals=dict.fromkeys(moments, signal.SIGINT)))
        assert done.code == 130
        assert one_line(done.err) == "interrupted\n"
        scene.goes_on(directory)
