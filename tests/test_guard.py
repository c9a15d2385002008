"""What a bad step leads to: a skipped window, a rollback, or the end of the run; and the reported origin of a NaN."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanoft import kernels
from nanoft.batches import Window
from nanoft.config import GuardConfig, LoRAConfig
from nanoft.guard import (
    MIN_HISTORY,
    GradientOverflow,
    History,
    RollBack,
    SkipStep,
    after_rollback,
    check,
    check_overflow,
    diagnose,
    robust_score,
)
from nanoft.lora import inject_lora
from nanoft.model import Decoder
from nanoft.models.families import decoder_config

NAN, INFINITE = math.nan, math.inf


def actions(config: GuardConfig, history: History, losses: list[float]) -> list[str]:
    """What is done with steps of these losses, each in a window of its own."""
    return [act(config, history, loss, 1.0, [0, at])[0] for at, loss in enumerate(losses)]


def act(config: GuardConfig, history: History, loss: float, norm: float, position: list[int]) -> tuple[str, str]:
    """(take | skip | roll back, the reason or the warning)."""
    try:
        return "take", check(config, history, loss, norm, Window([], position, []))
    except SkipStep as bad:
        return "roll back" if isinstance(bad, RollBack) else "skip", bad.reason


@pytest.mark.parametrize("bad", [(NAN, 1.0), (1.0, NAN), (INFINITE, 1.0), (1.0, INFINITE), (-INFINITE, 1.0)])
def test_a_loss_or_gradient_that_is_not_finite_is_left_out(bad: tuple[float, float]) -> None:
    history = History()
    action, reason = act(GuardConfig(), history, *bad, [2, 7])
    assert action == "skip"
    assert reason
    assert (history.skips, history.suspects, history.losses) == (1, [[2, 7]], [])


@pytest.mark.parametrize("norm", [NAN, INFINITE])
def test_an_overflow_is_a_gradient_that_a_smaller_loss_scale_could_help(norm: float) -> None:
    window = Window([], [2, 7], [2, 8])
    with pytest.raises(GradientOverflow, match="overflows float16 at loss scale 1024, now 512") as found:
        check_overflow(1024.0, 3.0, norm, window)
    assert found.value.window is window
    check_overflow(1.0, 3.0, norm, window)  # no loss scaling, or nothing left of it
    check_overflow(1024.0, NAN, 1.0, window)  # forward: no scale prevents it
    check_overflow(1024.0, INFINITE, norm, window)
    check_overflow(1024.0, 3.0, 1e30, window)


def test_any_finite_step_is_taken_while_there_is_nothing_to_compare_it_with() -> None:
    history = History()
    steps = [(0.0, 0.0), (1e30, 1e30), (-1.0, 5.0)]
    assert [act(GuardConfig(), history, *step, [0, 0])[0] for step in steps] == ["take"] * 3


def test_only_bad_steps_in_a_row_lead_back() -> None:
    config, history = GuardConfig(max_skips=3), History()
    losses = [NAN, NAN, 1.0, NAN, NAN, NAN]
    assert actions(config, history, losses) == ["skip", "skip", "take", "skip", "skip", "roll back"]
    back = after_rollback(config, history)
    assert (back.rollbacks, back.lr_scale, back.skips) == (1, 0.5, 0)
    assert back.skipped_windows == [[0, 3], [0, 4], [0, 5]]


def test_rollbacks_add_up() -> None:
    config, history = GuardConfig(max_skips=1, max_rollbacks=2, rollback_rate=0.1), History()
    for window in range(2):
        assert act(config, history, NAN, 1.0, [1, window])[0] == "roll back"
        history = after_rollback(config, history)
    assert history.rollbacks == 2
    assert history.lr_scale == pytest.approx(0.01)
    assert history.skipped_windows == [[1, 0], [1, 1]]


def test_the_score_is_that_of_normal_numbers() -> None:
    """The median absolute deviation of normal numbers is 0.6745 of their standard deviation."""
    chance = random.Random(0)
    before = [math.exp(chance.gauss(3.0, 0.2)) for _ in range(100_000)]
    assert robust_score(math.exp(4.0), before) == pytest.approx(5.0, rel=0.02)


def test_the_score_against_a_count_by_hand() -> None:
    # of logarithms to the base 2: median 3, distances 2 1 0 1 2, their median 1: (10 - 3) / 1.4826
    assert robust_score(2.0**10, [2.0, 4.0, 8.0, 16.0, 32.0]) == pytest.approx(7 / 1.4826)
    assert robust_score(3.0 * math.exp(0.3), [3.0] * 9) == pytest.approx(0.3 / 0.05), "no deviation counts as 5 %"
    assert math.isfinite(robust_score(0.1, [0.0] * 9))


def test_a_tenth_of_outliers_does_not_hide_a_spike() -> None:
    before = [1.0 + 0.01 * (at % 7) for at in range(90)] + [50.0] * 10
    assert robust_score(5.0, before) > 20
    assert (5.0 - statistics.mean(before)) / statistics.stdev(before) < 1, "mean and deviation would have hidden it"


def test_what_has_converged_may_vary_by_factors() -> None:
    """As at the end of the demo: most gradients are next to nothing, and some are not."""
    chance = random.Random(0)
    config, history = GuardConfig(), History()
    for at in range(300):
        norm = math.exp(chance.gauss(-2.8, 1.2))
        assert act(config, history, norm / 20, norm, [0, at]) == ("take", "")


STEADY = [2.0 + 0.1 * math.sin(at) for at in range(2 * MIN_HISTORY)]


def settled(config: GuardConfig) -> History:
    history = History()
    assert set(actions(config, history, STEADY)) == {"take"}
    return history


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("warn", ["take"] * 6),
        ("skip", ["take", "skip", "skip", "take", "take", "take"]),
        ("rollback", ["take", "skip", "skip", "roll back"]),
    ],
)
def test_a_spike_is_warned_of_then_left_out_then_led_back_from(policy: Any, expected: list[str]) -> None:
    config = GuardConfig(on_spike=policy, max_skips=3)
    history = settled(config)
    verdicts = [act(config, history, 40.0, 1.0, [0, at]) for at in range(len(expected))]
    assert [action for action, _ in verdicts] == expected
    assert "loss 40 is" in verdicts[0][1]
    assert "above the median 2" in verdicts[0][1]
    if policy == "rollback":
        assert after_rollback(config, history).skipped_windows == [[0, 0], [0, 1], [0, 2], [0, 3]], "the first one, too"
    if policy == "skip":
        assert "accepted as the new level" in verdicts[3][1]
        assert verdicts[4][1] == ""


def test_an_exploding_gradient_is_a_spike_too() -> None:
    config = GuardConfig()
    history = settled(config)
    assert "gradient norm 1e+05 is" in act(config, history, 2.0, 1e5, [0, 0])[1]


def test_losses_that_fall_or_wander_are_no_spikes() -> None:
    config, history = GuardConfig(on_spike="rollback"), History()
    chance = random.Random(1)
    falling = [8.0 * math.exp(-at / 40) + chance.gauss(0.1, 0.1) ** 2 for at in range(400)]
    for at, loss in enumerate(falling):
        assert act(config, history, loss, math.exp(chance.gauss(0, 0.3)), [0, at]) == ("take", "")


def test_what_was_seen_goes_through_json_and_judges_alike() -> None:
    config = GuardConfig(on_spike="rollback", max_skips=2)
    whole, part = settled(config), settled(config)
    act(config, whole, 40.0, 1.0, [0, 1])
    act(config, part, 40.0, 1.0, [0, 1])
    part = History(**json.loads(json.dumps(asdict(part))))
    rest = [40.0, 2.0, NAN, 40.0, 40.0]
    assert actions(config, part, rest) == actions(config, whole, rest)
    assert part == whole


# --- where a NaN comes from


class Thirds(nn.Module):
    """x + 1, then x / x.sum(), then a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.ratio, self.last = nn.Identity(), Ratio(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.ratio(self.first(x)))


class Ratio(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.sum()


def test_the_first_bad_output_is_named() -> None:
    model = Thirds()
    assert "that of ratio" in diagnose(model, torch.zeros(3))
    assert "backward" in diagnose(model, torch.ones(3))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("fast", [False, True])
def test_the_first_bad_output_is_named_inside_a_block(fast: bool) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    model = Decoder(decoder_config({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2} | sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    inject_lora(model, LoRAConfig(rank=2, alpha=4.0), seed=0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B.fill_(3e38)  # finite, unlike its products
    if fast:
        assert kernels.apply(model) == ""
    assert "that of model.layers.1.mlp.down_proj" in diagnose(model, torch.arange(6)[None])


def test_a_bad_weight_is_named() -> None:
    model = Thirds()
    with torch.no_grad():
        model.last.weight[1, 2] = INFINITE
    assert "weight last.weight" in diagnose(model, torch.ones(3))
