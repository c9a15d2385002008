"""Whole runs of GRPO: signals while answers are sampled, and running out of memory between updates."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
from preferences import SAMPLING, write_pairs
from runs import Capture, Patch, equal, events, losses, no_memory, quick, refused, result, stop_after

import train
from nanoft.objectives import rollouts
from tiny_models import make_chat_model

TWICE = {"rl__updates": 2, "training__eval_steps": 0, "evaluation__prompts": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("rewards")
    make_chat_model(root / "base", "qwen2")
    write_pairs(root / "pairs.jsonl")
    return root


def on(root: Path, directory: Path, **changes: Any) -> list[str]:
    named = {"model__name": root / "base", "data__train_file": root / "pairs.jsonl", "training__objective": "grpo"}
    return quick(directory, **{**named, **SAMPLING, "training__learning_rate": 0.01, **TWICE, **changes})


def signal_while_sampling(patch: Patch, call: int) -> None:
    """A SIGTERM after a few tokens of the answers of this call; the first one rehearses evaluation."""
    stream, calls = rollouts.stream, [0]

    def signalling(*args: Any, **options: Any) -> Iterator[Any]:
        calls[0] += 1
        for number, step in enumerate(stream(*args, **options)):
            if (calls[0], number) == (call, 3):
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    patch.setattr(rollouts, "stream", signalling)


@pytest.mark.parametrize("when", ["while sampling", "between steps"])
@pytest.mark.parametrize("changes", [{}, {"rl__beta": 0.1, "rl__ratio": "sequence"}], ids=str)
def test_resumed_equals_uninterrupted_bit_for_bit(
    when: str, changes: dict[str, Any], root: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train.main(on(root, whole, **changes)) == 0
    with monkeypatch.context() as patch:
        if when == "while sampling":
            signal_while_sampling(patch, 5)
        else:
            stop_after(4, patch, signal.SIGTERM)
        assert train.main(on(root, halves, **changes)) == train.STOPPED_BY_SIGNAL
    assert losses(halves)[-1][0] == (3 if when == "while sampling" else 4)
    assert train.main(on(root, halves, **changes)) == 0
    assert losses(halves) == losses(whole)
    assert equal(result(halves), result(whole))


def test_the_second_update_has_other_ratios_and_clips(root: Path, tmp_path: Path) -> None:
    assert train.main(on(root, tmp_path / "run", rl__clip_low=0.01, rl__clip_high=0.01)) == 0
    found = events(tmp_path / "run", "train")
    assert [event["step"] for event in found] == list(range(1, 9))
    assert max(event["clip_ratio/low"] + event["clip_ratio/high"] for event in found) > 0


def test_out_of_memory_in_the_second_update_goes_back_to_a_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    assert train.main(on(root, tmp_path / "whole")) == 0
    accumulate, calls = train.accumulate, [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        return no_memory_as_in_a_block(args[0]) if calls[0] == 10 else accumulate(*args)  # the fifth step's second

    monkeypatch.setattr(train, "accumulate", failing)
    capsys.readouterr()
    assert train.main(on(root, tmp_path / "short")) == 0
    out = capsys.readouterr().out
    assert "warning: rolled back from step 4 to the checkpoint of step 3" in out
    found = [dict(losses(tmp_path / name)) for name in ("short", "whole")]
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)


def no_memory_as_in_a_block(ctx: Any) -> None:
    with train.distributed.same_exception(ctx.device):
        no_memory()


def test_answers_that_are_shown_have_the_reward_that_the_metric_gives_them(root: Path, tmp_path: Path) -> None:
    """At each evaluation, and before and after; metrics and the reward are of the same answers."""
    pattern = "a|c|e|g|i"
    more = {"evaluation__prompts": 5, "evaluation__samples": 2, "evaluation__metrics": f"regex:{pattern}"}
    more |= {
        "rl__reward": f"[regex:{pattern}, min_characters:3]",
        "rl__reward_weights": "[1, 0.5]",
        "rl__max_new_tokens": 9,
    }
    assert train.main(on(root, tmp_path / "run", **more, evaluation__max_new_tokens=2)) == 0
    for event in (samples := events(tmp_path / "run", "sample")):
        parts = [float(bool(re.search(pattern, event["answer"]))), float(len(event["answer"]) >= 3)]
        assert [event[f"rewards/{name}"] for name in (f"regex:{pattern}", "min_characters:3")] == parts
        assert event["reward"] == parts[0] + parts[1] / 2
    assert len(samples) == 2
    assert f" (reward {samples[0]['reward']:.3g}, regex:{pattern} " in (tmp_path / "run" / "train.log").read_text()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for name, key in (("tuned", "rewards"), ("base", "base_rewards")):
        each = report["answers"]["each"]
        assert len(each) == 4
        assert report[name]["reward"] == pytest.approx(np.mean([line[key]["reward"] for line in each]))
        found = [line[key][f"rewards/regex:{pattern}"] for line in each]
        assert found == [float(bool(re.search(pattern, line[name]))) for line in each]
        assert report[name][f"regex:{pattern}"] == pytest.approx(np.mean(found))
    assert report["tuned"]["response_tokens"] > 2, "as many as answers in training"


def test_the_speed_of_training_is_apart_from_that_of_sampling(root: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    stream = rollouts.stream

    def slow(*args: Any, **options: Any) -> Iterator[Any]:
        time.sleep(0.5)
        yield from stream(*args, **options)

    monkeypatch.setattr(rollouts, "stream", slow)
    assert train.main(on(root, tmp_path / "run", training__max_steps=2, rl__updates=3)) == 0
    for event in events(tmp_path / "run", "train"):
        assert event["training_tokens_per_second"] > 3 * event["tokens_per_second"]
        assert event["sampling_tokens_per_second"] < 64 / 0.5


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"training__method": "lora", "rl__beta": 0.1}, marks=pytest.mark.slow)], ids=str
)
def test_sharded_it_learns_the_same_from_the_same_answers(changes: dict[str, Any], root: Path, tmp_path: Path) -> None:
    """Full training, and adapters with a reference; the answers are of a model of which each rank holds a half."""
    named = {"model__name": root / "base", "data__train_file": root / "pairs.jsonl", "training__objective": "grpo"}
    more = {**named, **SAMPLING, **TWICE, "training__method": "full", "training__learning_rate": 1e-3, **changes}
    more |= {"training__max_steps": 3, "evaluation__prompts": 4, "evaluation__temperature": 0.0}
    assert train.main(quick(tmp_path / "alone", **{**ranks.EXACT, **more})) == 0
    _, err = ranks.run(2, tmp_path / "two", **more, training__sharding="full")
    assert ranks.codes(tmp_path / "two") == {0: 0, 1: 0}, err
    ours, theirs = (events(tmp_path / name, "train") for name in ("two", "alone"))
    for name in ("loss", "reward", "entropy", "completion_tokens", "grad_norm"):
        assert [e[name] for e in ours] == pytest.approx([e[name] for e in theirs], rel=1e-3, abs=1e-5)
    ranks.close(result(tmp_path / "two"), result(tmp_path / "alone"), 1e-5)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("two", "alone")]
    assert reports[0]["answers"] == reports[1]["answers"]


def test_steps_in_which_every_answer_is_worth_the_same_change_nothing(root: Path, tmp_path: Path) -> None:
    assert train.main(on(root, tmp_path / "run", rl__reward="max_words:99", training__weight_decay=0)) == 0
    found = events(tmp_path / "run", "train")
    assert [(event["loss"], event["grad_norm"], event["groups_without_spread"]) for event in found] == [(0, 0, 1)] * 8
    assert not result(tmp_path / "run")["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].any()


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"rl__reward": ""}, ["rl.reward: "]),
        ({"rl__reward": "exactmatch"}, ["rl.reward: 'exactmatch': no such metric"]),
        ({"rl__reward_weights": "1,2"}, ["rl.reward_weights: 2 weights for 1 rewards"]),
        ({"training__gradient_accumulation_steps": 2}, ["training.gradient_accumulation_steps", "remove it"]),
        ({"training__method": "full", "rl__beta": 0.1}, ["rl.beta", "set rl.beta=0"]),
        ({"rl__max_new_tokens": 512, "model__max_seq_length": 256}, ["rl.max_new_tokens: 512"]),
        ({"preference__beta": 0.3}, ["preference.beta: ", "has no effect", "grpo"]),
        ({"training__objective": "sft", "rl__beta": 0.1}, ["rl.", "has no effect", "sft"]),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line(
    changes: dict[str, Any], fragments: list[str], root: Path, tmp_path: Path, capsys: Capture
) -> None:
    refused(on(root, tmp_path / "run", **changes), fragments, capsys)
    assert not (tmp_path / "run").exists()


def test_an_answer_of_the_data_may_have_any_length_where_the_model_samples_its_own(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    answers = ["1 " * n for n in range(1, 400, 40)]  # up to 400 tokens and more
    records = [json.dumps({"prompt": f"Say {n}.", "answer": text}) for n, text in enumerate(answers)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(records) + "\n")
    few = {"data__train_file": tmp_path / "prompts.jsonl", "model__max_seq_length": 64, "training__max_steps": 2}
    assert train.main(on(root, tmp_path / "run", **few, evaluation__prompts=2)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "left out" not in said
    assert "| records read | 10 " in said
    assert "removed" not in said
    rehearsed = re.search(r"the longest, \(\d+, (\d+)\)", said)
    assert rehearsed
    assert int(rehearsed[1]) < 64


def test_a_prompt_without_room_for_an_answer_is_left_out(root: Path, tmp_path: Path, capsys: Capture) -> None:
    asked = [f"Say {n}." for n in range(12)] + ["Say it again and again. " * 40]
    records = [json.dumps({"prompt": text, "answer": "1"}) for text in asked]
    (tmp_path / "prompts.jsonl").write_text("\n".join(records) + "\n")
    words = on(root, tmp_path / "run", data__train_file=tmp_path / "prompts.jsonl", model__max_seq_length=128)
    assert train.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: 1 prompts of more than 120 tokens leave no room for answers: skipped" in said
    refused([*words, "rl.max_new_tokens=127", f"output.dir={tmp_path / 'none'}"], ["max_seq_length"], capsys)
