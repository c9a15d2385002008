"""The optimizer against AdamW spelled out, the schedule against transformers', and a saved state against none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from nanoft import UserError
from nanoft.optim import (
    build_optimizer,
    learning_rate_at,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    warmup_length,
)

Named = list[tuple[str, nn.Parameter]]

# --- schedule

THEIRS = {
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: get_constant_schedule_with_warmup(optimizer, warmup),
}


def their_rates(schedule: Any, warmup: int, total: int, **extra: float) -> list[float]:
    """transformers' rates for steps 0, 1, ..., total - 1 around a peak of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, warmup, total, **extra)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("shape", THEIRS)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 10), (5, 40), (10, 10)])
def test_schedule_equals_transformers_without_its_idle_first_step(shape: str, warmup: int, total: int) -> None:
    # transformers warms up from a rate of 0, a step that changes nothing; ours leaves that step out
    theirs = their_rates(THEIRS[shape], warmup + 1, total + 1)
    assert theirs[0] == 0.0
    ours = [learning_rate_at(step, total, 3e-4, warmup, shape, 0.0) for step in range(total)]
    assert ours == pytest.approx([3e-4 * rate for rate in theirs[1:]], rel=1e-12)


def test_min_ratio_equals_transformers() -> None:
    theirs = their_rates(get_cosine_with_min_lr_schedule_with_warmup, 5, 30, min_lr_rate=0.1)
    ours = [learning_rate_at(step, 29, 1.0, 4, "cosine", 0.1) for step in range(29)]
    assert ours == pytest.approx(theirs[1:], rel=1e-12)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_ends(shape: str) -> None:
    def rate(step: int) -> float:
        return learning_rate_at(step, 100, 2.0, 10, shape, 0.25)

    assert rate(0) == 2.0 / 11
    assert rate(10) == 2.0  # the first step after the warm-up
    assert rate(55) == pytest.approx(2.0 * (0.25 + 0.75 / 2))  # half-way
    assert rate(100) == pytest.approx(0.5)
    assert max(rate(step) for step in range(100)) == 2.0
    rates = [rate(step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_constant_stays_at_the_peak_whatever_the_end() -> None:
    assert {learning_rate_at(step, 9, 0.5, 2, "constant", 0.1) for step in range(2, 9)} == {0.5}


def test_a_warmup_as_long_as_the_run_never_divides_by_zero() -> None:
    assert learning_rate_at(5, 5, 1.0, 5, "cosine", 0.0) == 1.0
    assert learning_rate_at(0, 1, 1.0, 0, "cosine", 0.0) == 1.0


def test_warmup_is_steps_or_a_share_of_them() -> None:
    assert warmup_length(None, 0.03, 1000) == 30
    assert warmup_length(7, 0.03, 1000) == 7
    assert warmup_length(0, 0.5, 1000) == 0


# --- AdamW


def toy() -> Named:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 4), "vector": (5,), "other": (2, 2)}
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + len(name))
    return torch.randn(shape, generator=generator) * 10 ** (step % 3 - 1)


def take_steps(named: Named, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for name, parameter in named:
            parameter.grad = gradient(name, parameter.shape, step)
        set_learning_rate(optimizer, 0.01 * (step + 1))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_adamw_equals_its_paper_number_by_number() -> None:
    beta1, beta2, epsilon, decay, steps = 0.9, 0.98, 1e-6, 0.1, 6
    named = toy()
    start = [(name, p.detach().double().flatten().tolist(), p.shape) for name, p in named]
    take_steps(named, build_optimizer(named, 9.9, (beta1, beta2), epsilon, decay), range(steps))
    for (name, values, shape), (_, parameter) in zip(start, named, strict=True):
        gradients = [gradient(name, shape, step).double().flatten().tolist() for step in range(steps)]
        for i, w in enumerate(values):
            m = v = 0.0
            for t in range(1, steps + 1):  # Loshchilov & Hutter 2019, algorithm 2
                g, rate = gradients[t - 1][i], 0.01 * t
                m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
                w -= rate * decay * w if len(shape) > 1 else 0.0  # no decay on vectors
                w -= rate * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + epsilon)
            assert parameter.flatten()[i].item() == pytest.approx(w, abs=1e-6)


def test_decay_without_a_gradient_shrinks_matrices_only() -> None:
    named = toy()
    before = {name: p.detach().clone() for name, p in named}
    optimizer = build_optimizer(named, 0.5, (0.9, 0.999), 1e-8, 0.1)
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in named:
        factor = 1.0 if name == "vector" else 1 - 0.5 * 0.1
        assert torch.allclose(parameter, before[name] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kept", [["matrix"], ["vector"]])
def test_one_kind_of_parameter_is_enough(kept: list[str]) -> None:
    named = [(name, p) for name, p in toy() if name in kept]
    optimizer = build_optimizer(named, 0.1, (0.9, 0.999), 1e-8, 0.1)
    assert [p for group in optimizer.param_groups for p in group["params"]] == [p for _, p in named]


# --- state


def fresh(named: Named) -> torch.optim.Optimizer:
    return build_optimizer(named, 0.01, (0.9, 0.98), 1e-8, 0.1)


def test_three_steps_and_three_more_are_six_bit_for_bit() -> None:
    whole = toy()
    take_steps(whole, fresh(whole), range(6))

    first = toy()
    optimizer = fresh(first)
    take_steps(first, optimizer, range(3))
    saved = save(optimizer_tensors(optimizer, first))
    second = [(name, nn.Parameter(p.detach().clone())) for name, p in reversed(first)]  # names count, not places
    optimizer = fresh(second)
    load_optimizer_tensors(optimizer, second, load(saved))
    take_steps(second, optimizer, range(3, 6))

    for (name, a), (other, b) in zip(whole, reversed(second), strict=True):
        assert name == other
        assert torch.equal(a, b)
    without = [(name, nn.Parameter(p.detach().clone())) for name, p in first]
    take_steps(without, fresh(without), range(3, 6))
    assert not torch.equal(without[0][1], whole[0][1])  # the state matters


def trained() -> tuple[Named, torch.optim.Optimizer, dict[str, Tensor]]:
    named = toy()
    optimizer = fresh(named)
    take_steps(named, optimizer, range(2))
    return named, optimizer, optimizer_tensors(optimizer, named)


def test_state_is_named_by_parameter() -> None:
    _, _, tensors = trained()
    kinds = ("exp_avg", "exp_avg_sq", "step")
    assert set(tensors) == {f"{name}.{kind}" for name in ("matrix", "vector", "other") for kind in kinds}
    assert tensors["vector.exp_avg"].shape == (5,)
    assert tensors["vector.step"].item() == 2
    assert optimizer_tensors(fresh(toy()), toy()) == {}  # before the first step there is none


def test_loaded_state_is_a_copy() -> None:
    named, optimizer, tensors = trained()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    load_optimizer_tensors(optimizer, named, tensors)
    before = tensors["matrix.exp_avg"].clone()
    take_steps(named, optimizer, range(2, 3))
    assert torch.equal(tensors["matrix.exp_avg"], before)
    assert not torch.equal(optimizer_tensors(optimizer, named)["matrix.exp_avg"], before)


@pytest.mark.parametrize("name", ["matrix.exp_avg", "vector.exp_avg_sq", "other.step"])
def test_state_that_does_not_fit_is_refused_by_name(name: str) -> None:
    named, optimizer, tensors = trained()
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    for bad in (missing, {**tensors, name: torch.zeros(7)}):
        with pytest.raises(UserError, match=f"optimizer.safetensors: {name} is missing or does not fit"):
            load_optimizer_tensors(optimizer, named, bad)
    with pytest.raises(UserError, match=r"stranger\.step belongs to no trained parameter"):
        load_optimizer_tensors(optimizer, named, {**tensors, "stranger.step": tensors["matrix.step"]})
