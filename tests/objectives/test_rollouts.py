"""Sampled answers: exact, the same in any batch, from the weights that are trained; and tasks that are learned."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import golden_preference as tiny
import numpy as np
import pytest
import torch
from rollouts import prompt_window, sampling, window_of
from runs import no_memory
from tiny_families import make_family

from nanoft.config import Config
from nanoft.generation.sampling import GREEDY
from nanoft.lora import inject_lora
from nanoft.metrics.rewards import Answered
from nanoft.model import Decoder
from nanoft.models.adapter_files import adapter_tensors
from nanoft.models.families import FAMILIES
from nanoft.models.weights import load_model
from nanoft.objectives import rollouts
from nanoft.objectives.grpo import GRPO
from nanoft.objectives.rollouts import Rollout
from nanoft.runtime import distributed
from nanoft.runtime.command import StopRequest
from nanoft.runtime.memory import OutOfMemory

PROMPTS = {"3 4 5": "4", "7": "7", "9 2 9 2 9 2 11": "2"}
SETTINGS = {"rl.group_size": 3, "rl.prompts": 3, "rl.max_new_tokens": 12, "lora.rank": 4, "lora.alpha": 8.0}
CPU = torch.device("cpu")


def worth(answered: Answered) -> float:
    """A reward that is almost never the same for two answers."""
    return float(np.mean([int(word) for word in answered.answer.split() or ["0"]]))


def policy(directory: Path, **rl: Any) -> tuple[Decoder, GRPO]:
    """A tiny random model with an adapter that has an effect, and answers to PROMPTS."""
    if not (directory / "config.json").is_file():
        tiny.make_base(directory)
    config = Config().override({**SETTINGS, **{f"rl.{name}": value for name, value in rl.items()}})
    model = load_model(directory, CPU, torch.float32)
    adapters = inject_lora(model, config.lora, 0)
    move(adapters, "start")
    return model, sampling(config, adapters, PROMPTS, worth)


@torch.no_grad()
def move(adapters: Any, seed: str) -> None:
    for key, tensor in adapter_tensors(adapters).items():
        tensor.copy_(tiny.random_weight(f"{seed} {key}", tensor.shape))


def answers(objective: GRPO, model: Decoder, records: Sequence[int] = (0, 1, 2), at_once: int = 9) -> list[Rollout]:
    objective.prompts.at_once = at_once
    return objective.prompts.sample(model, records, 3, objective.sampling, [0, 5])


def by_number(found: Iterable[Rollout]) -> dict[int, list[list[int]]]:
    """The ids of the answers to each record."""
    ids: dict[int, list[list[int]]] = {}
    for answer in found:
        ids.setdefault(answer.record, []).append(answer.ids)
    return ids


# --- exactness


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_training_and_of_transformers(
    family: str, temperature: float, tmp_path: Path
) -> None:
    reference = make_family(family, tmp_path)
    model = load_model(tmp_path, CPU, torch.float32)
    config = Config().override({**SETTINGS, "rl.temperature": temperature})
    objective = sampling(config, inject_lora(model, config.lora, 0), PROMPTS, worth)
    objective.begin(model)
    found = answers(objective, model)
    for answer in found:
        with torch.no_grad():
            ids = torch.tensor([[*answer.prompt_ids, *answer.ids]])
            logits = reference(ids).logits[0, len(answer.prompt_ids) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logps), expected, rtol=0, atol=1e-4)
    (window,) = objective.windows(model, window_of([0, 1, 2]), 4)
    objective.prepare(model, window)
    for batch in window:
        objective.loss(model, batch)
    assert objective.figures()["sampling_error"] < 1e-4


def test_answers_are_the_same_however_they_are_batched_and_ordered(tmp_path: Path) -> None:
    model, objective = policy(tmp_path)
    whole = answers(objective, model)
    assert [answer.record for answer in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({tuple(answer.ids) for answer in whole}) > 6, "each has random numbers of its own"
    assert len({len(answer.ids) for answer in whole}) > 1
    for at_once in (1, 2, 5):
        again = answers(objective, model, at_once=at_once)
        assert [(a.ids, a.reward, a.stopped) for a in again] == [(a.ids, a.reward, a.stopped) for a in whole]
        np.testing.assert_allclose([p for a in again for p in a.logps], [p for a in whole for p in a.logps], atol=1e-5)
    assert by_number(answers(objective, model, [2, 0, 1])) == by_number(whole)
    assert by_number(answers(objective, model, [1])) == {1: by_number(whole)[1]}
    other = objective.prompts.sample(model, [0, 1, 2], 3, objective.sampling, [0, 6])
    assert by_number(other) != by_number(whole), "another window"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_prompts_and_get_the_same_answers(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, objective = policy(tmp_path)
    whole, parts = answers(objective, model), dict[int, Any]()
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "split_work", lambda work, rank=rank: list(work)[rank::ranks])
        monkeypatch.setattr(distributed, "all_gather_dict", lambda found: parts.update(found) or dict(parts))
        last = answers(objective, model)
    assert [(a.record, a.ids, a.reward) for a in last] == [(a.record, a.ids, a.reward) for a in whole]


def test_answers_come_from_the_weights_of_now(tmp_path: Path) -> None:
    """Not from a copy: they change with the adapter, and come back with it."""
    model, objective = policy(tmp_path)
    adapters, first = objective.reference.adapters, answers(objective, model)
    move(adapters, "later")
    second = answers(objective, model)
    assert by_number(second) != by_number(first)
    (window,) = objective.windows(model, prompt_window(second), 4)
    objective.prepare(model, window)
    for batch in window:
        objective.loss(model, batch)
    assert objective.figures()["sampling_error"] < 1e-5
    move(adapters, "start")
    assert answers(objective, model) == first


def test_greedy_answers_are_of_the_model_and_leave_it_training(tmp_path: Path) -> None:
    model, objective = policy(tmp_path)
    model.train()
    figures = objective.evaluate(model, window_of([0, 1, 2]))
    assert model.training
    greedy = objective.prompts.sample(model, [0, 1, 2], 1, GREEDY, [0, 0])
    assert figures["reward"] == pytest.approx(np.mean([answer.reward for answer in greedy]))
    assert figures["loss"] == -figures["reward"]
    assert figures["completion_tokens"] == np.mean([len(answer.ids) for answer in greedy])
    for answer in greedy:
        ids = list(answer.prompt_ids)
        for token in answer.ids:
            with torch.no_grad():
                assert model.logits(model(torch.tensor([ids])))[0, -1].argmax().item() == token
            ids.append(token)


# --- interruptions


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_halves_what_is_sampled_at_once(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, objective = policy(tmp_path)
    whole, stream, sizes = answers(objective, model), rollouts.stream, list[int]()

    def failing(*args: Any, **options: Any) -> Iterator[Any]:
        sizes.append(options["batch_size"])
        for number, step in enumerate(stream(*args, **options)):
            if number == 3 and len(sizes) <= failures:
                no_memory()
            yield step

    monkeypatch.setattr(rollouts, "stream", failing)
    again = answers(objective, model)
    assert [(a.ids, a.reward) for a in again] == [(a.ids, a.reward) for a in whole]
    assert sizes == [9, 5, 3][: failures + 1]
    assert objective.prompts.at_once == sizes[-1]
    assert model.training


def test_out_of_memory_with_one_answer_is_for_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, objective = policy(tmp_path)
    monkeypatch.setattr(rollouts, "stream", no_memory)
    with pytest.raises(OutOfMemory):
        answers(objective, model)
    assert objective.prompts.at_once == 1


def test_a_signal_leaves_the_window_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, objective = policy(tmp_path)
    model.train()
    stream, steps = rollouts.stream, list[int]()

    def signalling(*args: Any, **options: Any) -> Iterator[Any]:
        for number, step in enumerate(stream(*args, **options)):
            steps.append(number)
            if number == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            yield step

    monkeypatch.setattr(rollouts, "stream", signalling)
    with StopRequest() as stop:
        assert objective.windows(model, window_of([0, 1, 2]), 4, stop) == []
    assert steps == [0, 1, 2], "at once"
    assert model.training


# --- learning


def learn(objective: GRPO, model: Decoder, records: Sequence[int], steps: int, rate: float) -> list[float]:
    """The mean reward of each step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    rewards = []
    for step in range(steps):
        for window in objective.windows(model, window_of(records, step), 64):
            objective.prepare(model, window)
            for batch in window:
                (objective.loss(model, batch) / objective.count(window)).backward()
            optimizer.step()
            optimizer.zero_grad()
        rewards.append(objective.figures()["reward"])
    return rewards


@pytest.mark.parametrize("rl", [{}, {"updates": 2}, {"loss_normalization": "dr_grpo", "advantage_scale": "none"}])
def test_a_bandit_is_learned(rl: dict[str, Any], tmp_path: Path) -> None:
    """One prompt, answers of one token; the arm is whether its number is odd."""
    model, objective = policy(tmp_path, max_new_tokens=1, group_size=32, **rl)
    objective.prompts.rewards.functions = [lambda a: float(a.answer != "" and int(a.answer) % 2 == 1)]
    model.lm_head.weight.data.mul_(4)  # the last norm bounds the logits: of the base's head, p to 0.9
    rewards = learn(objective, model, [0], 60, 0.003)
    assert rewards[0] < 0.5
    assert np.mean(rewards[-5:]) > 0.97
    with torch.no_grad():
        p = model.logits(model(torch.tensor([[3, 4, 5]])))[0, -1].softmax(-1)
    assert p[3::2].sum() > 0.95


def test_copying_is_learned(tmp_path: Path) -> None:
    """The answer to a number is this number: at first one answer in 32 is right."""
    tiny.make_base(tmp_path)
    config = Config().override({**SETTINGS, "lora.rank": 8, "rl.max_new_tokens": 1, "rl.group_size": 64})
    model = load_model(tmp_path, CPU, torch.float32)
    numbers = {str(n): str(n) for n in range(2, 6)}
    objective = sampling(config, inject_lora(model, config.lora, 0), numbers)
    rewards = learn(objective, model, range(4), 100, 0.003)
    assert np.mean(rewards[:3]) < 0.3
    assert objective.evaluate(model, window_of(range(4)))["reward"] == 1.0
    assert np.mean(rewards[-5:]) > 0.5
