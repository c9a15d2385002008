"""How often a run evaluates, saves and logs; sample answers; warnings of the losses; what is logged of a save."""

from __future__ import annotations

import io
import math
import signal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs

import train
from nanoft.checkpoint import SaveResult
from nanoft.config import Config
from nanoft.objectives import OBJECTIVES
from nanoft.objectives.preference import Preference
from nanoft.objectives.sft import SFT
from nanoft.training import progress
from nanoft.training.progress import (
    is_due,
    log_save,
    progress_bar,
    steps_between,
    warn_of_held_out,
    warn_of_training,
)
from nanoft.training.state import LossTrend, TrainState


def test_the_bar_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    ctx: Any = SimpleNamespace(config=Config(), total_steps=12345)
    with progress_bar(ctx, TrainState(step=12000)) as bar:
        bar.start_t -= 100 * 3600
        bar.set_postfix_str("loss 10.123, lr 1.0e-04, 123,456 tok/s")
    (line,) = {part.rstrip() for part in shown.getvalue().split("\r") if "tok/s" in part}
    assert len(line) <= 80
    assert "12000/12345" in line
    assert line.endswith("loss 10.123, lr 1.0e-04, 123,456 tok/s]")


@pytest.mark.parametrize("failed", [False, True])
def test_a_best_step_that_was_not_saved_is_not_the_best(failed: bool, tmp_path: Path) -> None:
    logged: list[tuple[str, int]] = []
    run = SimpleNamespace(
        directory=tmp_path, log=lambda event, step, **_: logged.append((event, step)), print=lambda _: None
    )
    ctx: Any = SimpleNamespace(run=run, checkpoints=SimpleNamespace(best=lambda: (2, 1.5)))
    state = TrainState(step=5, best_step=4, best_loss=1.0)
    error = OSError(28, "No space left on device") if failed else None
    log_save(ctx, state, SaveResult(4, tmp_path / "checkpoints" / "step-000004", error))
    assert (state.best_step, state.best_loss) == ((2, 1.5) if failed else (4, 1.0))
    assert logged == [("warning", 5) if failed else ("checkpoint", 4)]
    log_save(ctx, state, None)
    assert len(logged) == 1


# --- How often


def due(every: Any, total: int, epoch: int) -> list[int]:
    ctx: Any = SimpleNamespace(total_steps=total, corpus=SimpleNamespace(report={"steps_per_epoch": epoch}))
    return [step for step in range(1, total + 1) if is_due(ctx, TrainState(step=step), every)]


@pytest.mark.parametrize(
    ("every", "total", "epoch", "steps"),
    [
        (4, 10, 5, [4, 8, 10]),
        (0, 10, 5, [10]),
        (99, 10, 5, [10]),
        (0.25, 10, 5, [3, 5, 8, 10]),
        (0.07, 100, 50, [7, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77, 84, 91, 98, 100]),  # 0.07 * 100 > 7 in floats
        (0.001, 3, 5, [1, 2, 3]),  # at least one step
        ("epoch", 12, 5, [5, 10, 12]),
        ("auto", 24, 8, [*range(2, 25, 2)]),
        ("auto", 9, 3, [*range(1, 10)]),
        ("auto", 8, 1000, [2, 4, 6, 8]),  # shorter than an epoch
        ("auto", 300, 1000, [75, 150, 225, 300]),
        ("auto", 2500, 1000, [*range(100, 2501, 100)]),
    ],
)
def test_what_is_due_when(every: Any, total: int, epoch: int, steps: list[int]) -> None:
    assert due(every, total, epoch) == steps


@pytest.mark.parametrize("total", [7, 10, 99, 1000])
@pytest.mark.parametrize("share", [0.5, 0.25, 0.2, 0.1])
def test_a_fraction_is_that_often(share: float, total: int) -> None:
    shares = [n * Fraction(str(share)) for n in range(1, round(1 / share) + 1)]
    expected = [math.ceil(part * total) for part in shares]
    assert due(share, total, 5) == (expected if share * total >= 1 else list(range(1, total + 1)))
    assert steps_between(share, total, 5) >= 1


def test_a_run_with_fractions_and_epochs_is_resumed_bit_for_bit(tmp_path: Path, monkeypatch: runs.Patch) -> None:
    """40 records, of which 2 are held out, in windows of 8: five steps an epoch."""
    changes = {"training__eval_steps": "epoch", "training__save_steps": 0.5, "training__log_steps": 0.25}
    changes |= {"training__max_steps": 10, "evaluation__temperature": 0.8, "evaluation__on_start": True}
    assert train.main(runs.quick(tmp_path / "whole", **changes)) == 0
    with monkeypatch.context() as patch:
        runs.stop_after(3, patch, signal.SIGTERM)
        assert train.main(runs.quick(tmp_path / "stopped", **changes)) == train.STOPPED_BY_SIGNAL
    assert train.main(runs.quick(tmp_path / "stopped", **changes)) == 0
    for name in ("whole", "stopped"):
        found = {kind: [e["step"] for e in runs.events(tmp_path / name, kind)] for kind in ("train", "eval", "sample")}
        assert found == {"train": [3, 5, 8, 10], "eval": [0, 5, 10], "sample": [0, 0, 5, 5, 10, 10]}
        text = " ".join((tmp_path / name / "train.log").read_text().split())
        assert " evaluation every 5 steps, checkpoint every 5 steps, log every 2.5 steps " in text
    for kind, keys in {"train": ["loss"], "eval": ["loss"], "sample": ["prompt", "answer", "stopped"]}.items():
        pairs = zip(*(runs.events(tmp_path / name, kind) for name in ("whole", "stopped")), strict=True)
        assert all([one[key] for key in keys] == [other[key] for key in keys] for one, other in pairs)
    assert runs.equal(*(runs.result(tmp_path / name) for name in ("whole", "stopped")))


def test_by_default_small_data_are_evaluated_four_times_an_epoch(tmp_path: Path) -> None:
    rows = {"training__micro_batch_size": 1, "training__eval_steps": "auto", "training__max_steps": 38}
    assert train.main(runs.quick(tmp_path / "run", **rows, evaluation__samples=0)) == 0  # 19 steps an epoch
    assert [step for step, _ in runs.losses(tmp_path / "run", "eval")] == [*range(4, 38, 4), 38]


@pytest.mark.parametrize("every", ["1.5", "-1", "0.0", "often", "nan"])
@pytest.mark.parametrize("name", ["eval_steps", "save_steps", "log_steps"])
def test_what_is_no_cadence_is_refused(name: str, every: str, tmp_path: Path, capsys: runs.Capture) -> None:
    runs.refused(runs.quick(tmp_path / "run", **{f"training__{name}": every}), [f"training.{name}: "], capsys)


def test_what_cannot_be_evaluated_at_the_start_is_refused(tmp_path: Path, capsys: runs.Capture) -> None:
    asked = runs.quick(tmp_path / "run", evaluation__on_start=True, data__validation_split=0)
    runs.refused(asked, ["evaluation.on_start: true: there is no validation data", "data.validation_size"], capsys)


def test_an_order_of_the_files_and_one_by_length_contradict(tmp_path: Path, capsys: runs.Capture) -> None:
    asked = runs.quick(tmp_path / "run", training__shuffle=False, data__group_by_length=True)
    runs.refused(asked, ["training.shuffle: data.group_by_length changes the order"], capsys)


# --- Samples


def test_samples_are_the_same_prompts_and_change_nothing_else(tmp_path: Path) -> None:
    changes = {"lora__dropout": 0.1, "training__eval_steps": 2, "data__validation_size": 4}
    changes |= {"evaluation__on_start": True}
    with_samples = {"evaluation__samples": 2, "evaluation__temperature": 1.0, "evaluation__max_new_tokens": 6}
    assert train.main(runs.quick(tmp_path / "none", **changes, evaluation__samples=0)) == 0
    assert train.main(runs.quick(tmp_path / "some", **changes, **with_samples)) == 0
    assert not runs.events(tmp_path / "none", "sample")
    assert runs.losses(tmp_path / "none") == runs.losses(tmp_path / "some")
    assert runs.losses(tmp_path / "none", "eval") == runs.losses(tmp_path / "some", "eval")
    assert runs.equal(runs.result(tmp_path / "none"), runs.result(tmp_path / "some"))
    samples = runs.events(tmp_path / "some", "sample")
    assert [event["step"] for event in samples] == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    for event, first in zip(samples, samples[:2] * 5, strict=True):
        assert (event["prompt"], event["reference"]) == (first["prompt"], first["reference"])
    assert samples[0]["prompt"] != samples[1]["prompt"]
    text = (tmp_path / "some" / "train.log").read_text()
    assert text.count(f"\n  {samples[0]['prompt']} -> ") == 5


def test_before_training_a_sample_is_the_answer_of_the_base_in_the_report(tmp_path: Path) -> None:
    changes = {"evaluation__on_start": True, "evaluation__samples": 1, "evaluation__max_new_tokens": 8}
    assert train.main(runs.quick(tmp_path / "run", **changes)) == 0
    first, *_, last = runs.events(tmp_path / "run", "sample")
    text = (tmp_path / "run" / "train.log").read_text()
    for name, event in (("base", first), ("tuned", last)):
        assert f" {name}: {' '.join(event['answer'].split())}\n" in text


def test_a_sample_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: runs.Patch) -> None:
    real = progress.measure

    def failing(ctx: Any, model: Any, samples: Any, *more: Any) -> Any:
        if not len(samples):  # answers only, unlike at the end
            raise RuntimeError("no answer")
        return real(ctx, model, samples, *more)

    monkeypatch.setattr(progress, "measure", failing)
    assert train.main(runs.quick(tmp_path / "run")) == 0
    assert [event["what"] for event in runs.events(tmp_path / "run")] == ["sampling answers failed"] * 2
    assert [step for step, _ in runs.losses(tmp_path / "run", "eval")] == [4, 8]


# --- Losses that part


def first_warning(losses: list[tuple[float, float]]) -> int:
    """The first evaluation, from 1, that warns, for pairs of training and validation loss; 0: none."""
    trend = LossTrend()
    for number, (training, validation) in enumerate(losses, 1):
        trend.nats, trend.units = 3 * training, 3.0
        if trend.update(validation):
            return number
    return 0


NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([(3, 3), (2, 2), (1, 1)], 0),
        ([(3, 3), (2, 4), (1, 3.5), (0.5, 3.7)], 0),  # once is noise
        ([(3, 3), (2, 4), (1, 5)], 3),
        ([(5, 3), (4, 4), (4, 4.5), (3, 5)], 4),  # training loss stands still in between
        ([(1, 3), (2, 4), (3, 5)], 0),  # training loss rises, too
        ([(3, NAN), (2, NAN)], 1),
        ([(3, 3), (2, math.inf)], 2),
        ([(-1, -3), (-2, -2), (-3, -1)], 3),  # a loss may be negative
    ],
)
def test_a_warning_comes_when_the_losses_part(losses: list[tuple[float, float]], expected: int) -> None:
    assert first_warning(losses) == expected


def test_a_run_that_overfits_says_so_once(tmp_path: Path, capsys: runs.Capture) -> None:
    changes = {"data__validation_file": runs.sentences(tmp_path), "training__eval_steps": 1, "training__log_steps": 1}
    changes |= {"training__learning_rate": 1e-3, "training__max_steps": 20}
    assert train.main(runs.quick(tmp_path / "run", **changes)) == 0
    (event,) = [event for event in runs.events(tmp_path / "run") if event["what"] == "validation loss"]
    held_out, training = (dict(runs.losses(tmp_path / "run", kind)) for kind in ("eval", "train"))
    step = event["step"]
    assert held_out[step - 2] < held_out[step - 1] < held_out[step]
    assert training[step] < training[step - 1] < training[step - 2]
    said = f"validation loss rises ({held_out[step - 1]:.4f} -> {held_out[step]:.4f}) while training loss falls ("
    assert event["text"].startswith(said)
    assert f"warning: step {step}: {said}" in capsys.readouterr().out


def test_a_validation_loss_that_is_nan_is_said_after_a_rise_was(tmp_path: Path, monkeypatch: runs.Patch) -> None:
    found = iter([*map(float, range(19)), NAN, NAN])
    monkeypatch.setattr(SFT, "evaluate", lambda *_: {"loss": next(found, NAN), "perplexity": 1.0, "target_tokens": 1})
    changes = {"training__eval_steps": 1, "training__learning_rate": 1e-3, "training__max_steps": 20}
    assert train.main(runs.quick(tmp_path / "run", **changes)) == 0
    said = [e["text"].split(" (")[0] for e in runs.events(tmp_path / "run") if e["event"] == "warning"]
    assert said == ["validation loss rises", "validation loss is nan"]


def test_a_validation_loss_that_is_nan_is_said_once(tmp_path: Path, monkeypatch: runs.Patch) -> None:
    monkeypatch.setattr(SFT, "evaluate", lambda *_: {"loss": NAN, "perplexity": NAN, "target_tokens": 1})
    assert train.main(runs.quick(tmp_path / "run", training__eval_steps=2)) == 0
    assert [(e["step"], e["text"]) for e in runs.events(tmp_path / "run")] == [(2, "validation loss is nan")]


# --- The terminal


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_level_of_the_terminal(level: str, tmp_path: Path, capsys: runs.Capture, monkeypatch: runs.Patch) -> None:
    monkeypatch.setattr(SFT, "evaluate", lambda *_: {"loss": NAN, "perplexity": NAN, "target_tokens": 1})
    assert train.main(runs.quick(tmp_path / "run", logging__level=level)) == 0
    shown = capsys.readouterr().out
    assert ("warning: step 4: validation loss is nan" in shown) == (level != "error")
    assert ("step 4: validation loss nan" in shown) == ("result  " in shown) == (level in ("debug", "info"))
    assert ('event     {"event": "train", "step": 1, ' in shown) == (level == "debug")
    if level in ("warning", "error"):
        assert all(line.startswith("warning: ") for line in shown.splitlines())
    log = (tmp_path / "run" / "train.log").read_text()
    assert "warning: step 4: validation loss is nan" in log
    assert "step 4: validation loss nan" in log


@pytest.mark.parametrize("option", ["--show-batch", "--preflight", "--plan"])
def test_what_was_asked_for_is_shown_at_every_level(option: str, tmp_path: Path, capsys: runs.Capture) -> None:
    shown = []
    for level in ("info", "error"):
        assert train.main([*runs.quick(tmp_path / level, logging__level=level), option]) == 0
        shown.append(len(capsys.readouterr().out.splitlines()))
    assert shown[0] == shown[1] > 3


# --- signs that preferences are learned badly


def watched(objective: Any = None, steps: int = 100) -> tuple[Any, list[str]]:
    """A context, and the texts of the warnings that are logged and printed in it."""
    logged: list[str] = []
    printed: list[str] = []
    run = SimpleNamespace(log=lambda event, step, what, text: logged.append(text), print=printed.append)
    return SimpleNamespace(run=run, total_steps=steps, objective=objective), printed


def rewards(chosen: float, rejected: float, accuracy: float = 1.0) -> dict[str, float]:
    return {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracies": accuracy}


@pytest.mark.parametrize(
    ("step", "figures", "warns"),
    [
        (10, rewards(1.0, -0.5), True),
        (11, rewards(1.0, -0.5), False),  # no longer one of the first steps
        (10, rewards(0.1, -0.1), False),  # the sign of a difference that means nothing yet
        (10, rewards(1.0, -0.5, 0.95), False),
        (10, {}, False),
    ],
)
def test_answers_that_are_ranked_right_at_once_are_warned_of(step: int, figures: Any, warns: bool) -> None:
    ctx, printed = watched()
    state = TrainState(step=step)
    for _ in range(2):  # and once only
        warn_of_training(ctx, state, figures)
    assert len(printed) == warns
    assert all("every answer is already ranked correctly" in line for line in printed)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chosen_answers_that_fall_with_the_rejected_are_warned_of_where_there_is_a_reference(name: str) -> None:
    objective: Any = object.__new__(OBJECTIVES[name])
    ctx, printed = watched(objective)
    state = TrainState(step=50, held_out=rewards(-1.5, -2.0))
    for chosen, rejected in ((-0.9, -9.0), (-1.4, -9.0), (-1.6, -1.9)):  # not far; not any more; rejected rise
        warn_of_held_out(ctx, state, rewards(chosen, rejected))
    assert printed == []
    for _ in range(2):
        warn_of_held_out(ctx, state, rewards(-1.6, -2.5))
    assert len(printed) == (isinstance(objective, Preference) and objective.uses_reference)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, ""),
        ({"entropy": 0.19}, "answers lose their variety (1.000 -> 0.190 nats per token)"),
        ({"completion_tokens": 41.0, "stop_rate": 0.8}, "answers grow (20 -> 41 tokens) and stop less often"),
        ({"completion_tokens": 41.0}, ""),  # longer, and they still end
        ({"sampling_error": 0.06}, "sampling and training differ by 0.060 nats per token"),
    ],
)
def test_sampled_answers_that_go_wrong_are_warned_of_once(changes: dict[str, float], text: str) -> None:
    ctx, printed = watched()
    state, first = TrainState(step=5), {"reward": 0.5, "entropy": 1.0, "completion_tokens": 20.0, "stop_rate": 0.9}
    for figures in (first, {**first, **changes}, {**first, **changes}):
        warn_of_training(ctx, state, figures)
    assert len(printed) == bool(text)
    assert all(text in line for line in printed)


@pytest.mark.parametrize(("training", "held_out", "warns"), [(0.7, 0.4, True), (0.7, 0.5, False), (0.55, 0.4, False)])
def test_reward_that_rises_in_training_alone_is_warned_of(training: float, held_out: float, warns: bool) -> None:
    ctx, printed = watched(SimpleNamespace(figures=lambda: {"reward": training}))
    state = TrainState(step=5, held_out={"reward": 0.5, "training_reward": 0.5})
    warn_of_held_out(ctx, state, {"reward": held_out})
    assert len(printed) == warns
