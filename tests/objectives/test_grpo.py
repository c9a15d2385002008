"""GRPO against closed forms, against autograd on all logits, and against TRL's trainer (golden_grpo.py wrote that)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_grpo as golden
import golden_preference as tiny
import numpy as np
import pytest
import torch
from rollouts import given, prompt_window, random_rollouts
from safetensors.torch import load_file
from torch import Tensor

from nanoft import UserError, kernels
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.lora import inject_lora
from nanoft.model import Decoder
from nanoft.models.adapter_files import adapter_tensors
from nanoft.models.weights import load_model
from nanoft.objectives.grpo import GRPO, clipped_loss, group_advantages, kl_estimate
from nanoft.objectives.rollouts import Rollout
from nanoft.recompute import keep_by_policy

SETTINGS = {"lora.rank": tiny.RANK, "lora.alpha": tiny.ALPHA, "lora.target_modules": tiny.TARGETS}
SETTINGS |= {"rl.max_new_tokens": golden.LIMIT, "training.objective": "grpo"}
NAN = math.nan


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("base")
    tiny.make_base(directory)
    return directory


def policy_model(
    directory: Path, config: Config, dtype: torch.dtype = torch.float64
) -> tuple[Decoder, dict[str, Adapter]]:
    """With an adapter that has an effect: golden_preference's."""
    model = load_model(directory, torch.device("cpu"), torch.float32).to(dtype)
    adapters = inject_lora(model, config.lora, 0)
    set_adapters(adapters, tiny.random_weight)
    return model, adapters


@torch.no_grad()
def set_adapters(adapters: dict[str, Adapter], weight: Any) -> None:
    for key, tensor in adapter_tensors(adapters).items():
        tensor.copy_(weight(key, tensor.shape))


def settings_of(**rl: Any) -> Config:
    return Config().override({**SETTINGS, **{f"rl.{name}": value for name, value in rl.items()}})


def pass_over(objective: GRPO, model: Decoder, window: Any) -> Tensor:
    """The loss of an update; its gradient is added to that of the parameters."""
    objective.prepare(model, window)
    total = torch.zeros(())
    for batch in window:
        loss = objective.loss(model, batch) / objective.count(window)
        loss.backward()
        total = total + loss.detach()
    return total


def gradient(adapters: dict[str, Adapter]) -> Tensor:
    """(parameters,): of A and B of each adapter by name; and forgotten."""
    factors = [factor for name in sorted(adapters) for factor in (adapters[name].lora_A, adapters[name].lora_B)]
    found = [factor.grad.flatten() for factor in factors]
    for factor in factors:
        factor.grad = None
    return torch.cat(found)


# --- the equations


def test_advantages_are_those_of_the_closed_form() -> None:
    found = group_advantages(np.array([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]]))
    a = 0.8658754298  # 0.5 / (sqrt(1/3) + 1e-4)
    np.testing.assert_allclose(found, [[a, -a, -a, a], [0, 0, 0, 0]], atol=1e-10)
    np.testing.assert_allclose(group_advantages(np.array([[1.0, 0.0, 0.0, 1.0]]), "none"), [[0.5, -0.5, -0.5, 0.5]])


@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_reward_that_failed_is_not_in_the_mean(scale: str) -> None:
    rewards = np.array([[1.0, NAN, 4.0, -2.0], [NAN, NAN, NAN, 7.0], [NAN] * 4])
    found = group_advantages(rewards, scale)
    np.testing.assert_allclose(found[0, [0, 2, 3]], group_advantages(np.array([[1.0, 4.0, -2.0]]), scale)[0])
    assert found[0, 1] == 0
    assert not found[1:].any()  # one alone has nothing to be compared with


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.56, 0.0),  # clipped at 1.28: enough
        (1.5, -2.0, 3.0, 2.0),  # a bad answer became more likely: not clipped
        (0.5, 2.0, -1.0, -2.0),
        (0.5, -2.0, 1.8, 0.0),  # clipped at 0.9
    ],
)
def test_the_loss_is_clipped_where_the_policy_has_moved_enough(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    found = clipped_loss(r, torch.tensor([advantage]), 0.1, 0.28)
    found.sum().backward()
    assert found.item() == pytest.approx(loss)
    assert r.grad is not None
    assert r.grad.item() == pytest.approx(slope)


def test_the_estimate_of_the_divergence_is_unbiased_and_never_negative() -> None:
    p, q = (torch.randn(9, generator=torch.Generator().manual_seed(s)).double().softmax(0) for s in (0, 1))
    estimate = kl_estimate(p.log(), q.log())
    assert estimate.min() >= 0
    assert (p * estimate).sum().item() == pytest.approx((p * (p / q).log()).sum().item())
    assert kl_estimate(p.log(), p.log()).abs().max() == 0


# --- TRL


def golden_rollouts() -> list[Rollout]:
    rewards = np.ravel(golden.REWARDS).tolist()
    found = zip(golden.answers(), rewards, strict=True)
    return [
        Rollout(at // golden.GROUP, prompt, ids, [0.0] * len(ids), [reward], reward, stopped)
        for at, ((prompt, ids, stopped), reward) in enumerate(found)
    ]


@pytest.mark.parametrize("case", golden.CASES)
def test_losses_and_gradients_are_those_of_trl(case: str, directory: Path) -> None:
    """With the adapter that has sampled, and with a later one."""
    expected, found = load_file(golden.FILE), golden_rollouts()
    config = settings_of(**golden.CASES[case][0], updates=2)
    model, adapters = policy_model(directory, config)
    logps = expected[f"{case}.logps"].split([len(answer.ids) for answer in found])
    found = [replace(answer, logps=of_one.tolist()) for answer, of_one in zip(found, logps, strict=True)]
    objective = given(config, adapters, found)
    first, later = objective.windows(model, prompt_window(found), 5)
    for when, window in (("first", first), ("later", later)):
        if when == "later":
            assert objective.figures()["sampling_error"] < 2e-6  # log-probabilities are TRL's, too
            objective.sums = {}
            set_adapters(adapters, golden.later_weight)
        loss = pass_over(objective, model, window)
        torch.testing.assert_close(loss.float(), expected[f"{case}.{when}.loss"], rtol=2e-5, atol=2e-7)
        theirs = expected[f"{case}.{when}.gradient"]
        assert ((gradient(adapters) - theirs).norm() / theirs.norm()).item() < 2e-5
    figures = objective.figures()
    everyone = sum(len(answer.ids) for answer in found)
    trained = sum(batch.target_tokens for batch in later)
    if "masked" not in case and config.rl.ratio == "token":  # TRL counts the answers without an advantage, too
        for name in ("clip_ratio/low", "clip_ratio/high"):
            clipped = expected[f"{case}.{name}"][1].item()
            assert figures[name] * trained == pytest.approx(clipped * everyone)
            assert clipped > 0
    if config.rl.beta and config.rl.ratio == "token":
        assert trained == everyone


# --- the gradient


def by_hand(model: Decoder, found: Sequence[Rollout], config: Config, old: Sequence[Tensor]) -> Tensor:
    """The loss of a step from all logits, answer by answer; differentiable."""
    rl, loss = config.rl, torch.zeros((), dtype=torch.float64)
    rewards = torch.tensor([answer.reward for answer in found], dtype=torch.float64).reshape(-1, rl.group_size)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    for answer, advantage, before in zip(found, advantages.flatten(), old, strict=True):
        ratio = (logps_of(model, answer, rl.temperature) - before).exp()
        clipped = torch.clamp(ratio, 1 - rl.clip_low, 1 + rl.clip_high)
        tokens = torch.minimum(ratio * advantage, clipped * advantage)
        weight = {"dapo": 1.0, "grpo": 1 / len(tokens), "dr_grpo": 1.0}[rl.loss_normalization]
        loss = loss - weight * tokens.sum()
    count = {
        "dapo": sum(len(answer.ids) for answer in found),
        "grpo": len(found),
        "dr_grpo": len(found) * rl.max_new_tokens,
    }
    return loss / count[rl.loss_normalization]


def logps_of(model: Decoder, answer: Rollout, temperature: float = 1.0) -> Tensor:
    """log p of each token of an answer, from all logits, (tokens,)."""
    ids = torch.tensor([[*answer.prompt_ids, *answer.ids]])
    logits = model.logits(model(ids))[0, len(answer.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]


@pytest.mark.parametrize("normalization", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_has_the_gradient_of_all_logits_however_it_is_split(
    normalization: str, packed: bool, directory: Path
) -> None:
    """The second update's too, whose ratios are not 1, and some of them clipped."""
    changes = {"data.packing": packed, "model.max_seq_length": 24}
    config = settings_of(loss_normalization=normalization, updates=2, temperature=0.7, clip_low=0.1).override(changes)
    found = random_rollouts()
    config = config.override({"rl.group_size": 4})
    model, adapters = policy_model(directory, config)
    with torch.no_grad():
        old = [logps_of(model, answer, 0.7) for answer in found]
    expected = []
    for weight in (tiny.random_weight, golden.later_weight):
        set_adapters(adapters, weight)
        loss = by_hand(model, found, config, old)
        loss.backward()
        expected.append((loss.detach(), gradient(adapters)))
    for rows in (1, 2, 4, 8):
        objective = given(config, adapters, found)
        windows = objective.windows(model, prompt_window(found), rows)
        assert len(windows) == 2
        for window, weight, (loss, grad) in zip(
            windows, (tiny.random_weight, golden.later_weight), expected, strict=True
        ):
            set_adapters(adapters, weight)
            torch.testing.assert_close(pass_over(objective, model, window).double(), loss, rtol=1e-6, atol=1e-7)
            assert ((gradient(adapters) - grad).norm() / grad.norm()).item() < 1e-6  # advantages are float32
        assert objective.figures()["clip_ratio/low"] + objective.figures()["clip_ratio/high"] > 0


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_kernels_and_recomputation_change_nothing(beta: float, directory: Path) -> None:
    found, config, gradients = random_rollouts(), settings_of(beta=beta, updates=2), {}
    for way in ("plain", "kernels", "recomputed"):
        model, adapters = policy_model(directory, config, torch.float32)
        if way == "kernels":
            kernels.apply(model, config.lora)
        model.train().activation_policy = keep_by_policy("full" if way == "recomputed" else "none", 1, 2)
        objective = given(config, adapters, found)
        parts = []
        for window in objective.windows(model, prompt_window(found), 3):
            pass_over(objective, model, window)
            parts.append(gradient(adapters))
            set_adapters(adapters, golden.later_weight)
        gradients[way] = torch.cat(parts)
    assert torch.equal(gradients["recomputed"], gradients["plain"])
    torch.testing.assert_close(gradients["kernels"], gradients["plain"], rtol=1e-4, atol=1e-5)


# --- what counts


def test_answers_without_spread_are_left_out_but_counted(directory: Path) -> None:
    found, config = random_rollouts(), settings_of()
    model, adapters = policy_model(directory, config)
    objective = given(config, adapters, found)
    (window,) = objective.windows(model, prompt_window(found), 4)
    assert set(window.samples.records.tolist()) == {0, 2}
    assert objective.count(window) == sum(len(answer.ids) for answer in found)
    assert objective.figures()["groups_without_spread"] == pytest.approx(1 / 3)
    with_kl = given(config.override({"rl.beta": 0.1}), adapters, found)
    (window,) = with_kl.windows(model, prompt_window(found), 4)
    assert set(window.samples.records.tolist()) == {0, 1, 2}, "they have a divergence"


@pytest.mark.parametrize("normalization", ["dapo", "grpo", "dr_grpo"])
def test_an_answer_whose_reward_failed_counts_nowhere(normalization: str, directory: Path) -> None:
    """Its group is as if it had never been sampled."""
    whole = random_rollouts(prompts=1)
    config = settings_of(loss_normalization=normalization)
    failed = replace(whole[1], rewards=[NAN], reward=NAN)
    results = []
    for found in ([whole[0], failed, *whole[2:]], [whole[0], *whole[2:]]):
        model, adapters = policy_model(directory, config)
        objective = given(config, adapters, found)
        (window,) = objective.windows(model, prompt_window(found), 4)
        results.append((pass_over(objective, model, window), gradient(adapters)))
        assert np.isfinite([*objective.figures().values()]).all()
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_step_without_any_difference_has_no_gradient(beta: float, directory: Path) -> None:
    found = [replace(answer, reward=1.0) for answer in random_rollouts()]
    config = settings_of(updates=2, beta=beta)
    model, adapters = policy_model(directory, config)
    objective = given(config, adapters, found)
    for window in objective.windows(model, prompt_window(found), 4):
        loss = pass_over(objective, model, window)
        grad = gradient(adapters)
        assert loss.isfinite()
        assert not grad.any() or beta


def test_a_step_in_which_every_reward_failed_ends_the_run(directory: Path) -> None:
    found = [replace(answer, reward=NAN) for answer in random_rollouts()]
    model, adapters = policy_model(directory, config := settings_of())
    objective = given(config, adapters, found)
    with pytest.raises(UserError, match=r"^rl\.reward: exact_match: failed for every answer of a step"):
        objective.windows(model, prompt_window(found), 4)
    last = [*found[:-1], replace(found[-1], reward=1.0)]  # one is enough
    assert given(config, adapters, last).windows(model, prompt_window(last), 4)


def test_the_held_out_reward_is_the_mean_of_those_that_did_not_fail(directory: Path) -> None:
    found = [
        replace(answer, reward=value) for answer, value in zip(random_rollouts(), [1.0, NAN, 0.5] * 4, strict=True)
    ]
    model, adapters = policy_model(directory, config := settings_of())
    objective = given(config, adapters, found)
    assert objective.evaluate(model, [])["reward"] == 0.75
    assert objective.evaluate(model, [])["reward_failures"] == pytest.approx(1 / 3)


def test_every_answer_may_be_masked(directory: Path) -> None:
    found = [replace(answer, stopped=False) for answer in random_rollouts()]
    model, adapters = policy_model(directory, config := settings_of(mask_truncated=True))
    objective = given(config, adapters, found)
    (window,) = objective.windows(model, prompt_window(found), 4)
    assert pass_over(objective, model, window) == 0
    assert not gradient(adapters).any()


@pytest.mark.parametrize("start_from", ["", "an adapter"])
def test_the_divergence_from_the_policy_at_step_0_is_0_there(start_from: str, directory: Path) -> None:
    """And that of all logits' log-probabilities afterwards."""
    found, config = random_rollouts(), settings_of(beta=0.1).override({"lora.start_from": start_from})
    model, adapters = policy_model(directory, config)
    if not start_from:
        set_adapters(adapters, lambda key, shape: tiny.random_weight(key, shape) * ("lora_A" in key))
    objective = given(config, adapters, found)
    with torch.no_grad():
        start = torch.cat([logps_of(model, answer) for answer in found])
    (window,) = objective.windows(model, prompt_window(found), 4)
    pass_over(objective, model, window)
    assert objective.figures()["kl"] == pytest.approx(0, abs=1e-12)
    set_adapters(adapters, golden.later_weight)
    (window,) = objective.windows(model, prompt_window(found), 4)
    pass_over(objective, model, window)
    with torch.no_grad():
        now = torch.cat([logps_of(model, answer) for answer in found])
    expected = ((start - now).exp() - (start - now) - 1).mean().item()
    assert expected > 0.001
    assert objective.figures()["kl"] == pytest.approx(expected, rel=1e-5)
