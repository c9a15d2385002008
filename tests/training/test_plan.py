"""--plan: the tokens of the real windows, and a time that a real step takes, without a weight of the base."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import TINY, quick

import train
from nanoft.batches import Batches
from nanoft.config import Config
from nanoft.config.loading import load_config
from nanoft.models.model_files import ModelFiles
from nanoft.runtime.device import Machine
from nanoft.training import plan
from nanoft.training.memory_plan import Planner
from nanoft.training.plan import full_batch, measure_speed, planned_batches
from tiny_models import make_chat_model, write_records

Capture = pytest.CaptureFixture[str]


def test_plan_prints_parts_peak_tokens_and_speed_without_weights(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_chat_model(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    records = write_records(tmp_path / "data.jsonl")
    arguments = [str(TINY), f"model.name={tmp_path / 'base'}", f"data.train_file={records}", "model.max_seq_length=256"]
    assert train.main([*arguments, f"output.dir={tmp_path / 'run'}", "system.device=cpu", "--plan"]) == 0
    said = capsys.readouterr().out
    names = "process linears adapters gradients optimizer activations backward".split()  # noqa: SIM905
    names += ["loss", "peak", "tokens", "work", "speed"]
    assert [name for name in names if f"\n{name} " not in f"\n{said}"] == []
    assert "all activations kept" in said
    assert "measured on a few random blocks" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80
    assert "warning" not in said
    assert not (tmp_path / "run").exists()


def planner_of(config: Config) -> tuple[Planner, ModelFiles]:
    files = ModelFiles.find(config.model.reference)
    return Planner.of(config, Machine.detect(config), files.decoder), files


@pytest.mark.parametrize("packing", ["false", "true"])
def test_the_tokens_of_a_step_are_those_of_the_demos_windows(
    packing: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"data.packing={packing}", "system.device=cpu", f"output.dir={tmp_path / 'run'}", "training.max_steps=1"]
    words += ["model.max_seq_length=256", "training.micro_batch_size=4"]
    used: list[Batches] = []
    monkeypatch.setattr(train, "build", lambda planner, run, p, f, tokenizer, corpus, batches, s: used.append(batches))
    with pytest.raises(AttributeError):  # nothing was built
        train.main([str(TINY), *words])
    windows = [used[0].next_window(0, n) for n in range(used[0].windows_in_epoch())]
    capsys.readouterr()
    assert train.main([str(TINY), *words, "--plan"]) == 0
    found = next(line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("tokens"))
    assert int(found.replace(",", "")) == round(statistics.mean(window.tokens for window in windows))


def test_large_files_are_sampled_and_files_that_are_not_here_assumed_full(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(TINY, ["data.validation_size=200"])
    _, files = planner_of(config)
    whole = planned_batches(config, files)
    monkeypatch.setattr(plan, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(plan, "FIRST", 100)  # fewer than are held out
    sampled = planned_batches(config, files)
    assert len(sampled.samples) == 100
    assert sampled.samples.lengths.mean() == pytest.approx(whole.samples.lengths.mean(), rel=0.05)
    assert train.main([str(TINY), "data.train_file=hf://datasets/owner/name", "model.max_seq_length=64", "--plan"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tokens 2,048 per step: 32 sequences of model.max_seq_length=64 tokens (the data is not down" in said


def test_a_step_is_measured_on_the_micro_batch_and_extrapolated_from_few_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where time is made to be that of tokens x blocks: 1 s, and 3 s that do not depend on the blocks."""
    planner, files = planner_of(load_config(TINY, ["model.max_seq_length=32", "training.micro_batch_size=2"]))
    clock, batch, blocks = 0.0, full_batch(planner), []
    assert tuple(batch.ids.shape) == (1, 32)
    assert batch.target_tokens == 16

    def loss(self: object, model: torch.nn.Module, batch: object) -> torch.Tensor:
        nonlocal clock
        blocks.append(len(model.model.layers))
        clock += 3 + blocks[-1]
        return sum(p.sum() for p in model.parameters() if p.requires_grad)

    monkeypatch.setattr(plan.OBJECTIVES["sft"], "loss", loss)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: clock)
    for few in (2, 4):  # of the demo's four
        monkeypatch.setattr(plan, "FEW", few)
        kept = planner.choose_activations(2, 32)
        assert measure_speed(planner, files, kept, batch) == (pytest.approx(7 / 32), 0.0)
    assert set(blocks) == {1, 2, 4}


def test_the_planned_time_is_near_that_of_the_steps(tmp_path: Path, capsys: Capture) -> None:
    """Within a factor of 2, since other processes may disturb either of them."""
    arguments = quick(tmp_path / "run", training__max_steps=8, training__log_steps=1)
    assert train.main([*arguments, "--plan"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("speed"))
    planned = float(line.split()[1].replace(",", ""))
    assert train.main(arguments) == 0
    events = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    measured = np.median([event["tokens_per_second"] for event in events if event["event"] == "train"])
    assert 0.5 < planned / measured < 2
