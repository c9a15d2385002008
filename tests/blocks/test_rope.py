"""Angles of rotary positions against closed forms; tests/models compares whole configs with transformers."""

from __future__ import annotations

import math

import pytest
import torch

from nanoft.blocks.rope import Rope


def test_angles_are_powers_of_theta_and_a_share_of_the_head_is_rotated() -> None:
    found, factor = Rope(theta=100.0).angles(8)
    assert found.tolist() == pytest.approx([1, 100**-0.25, 100**-0.5, 100**-0.75])
    assert factor == 1.0
    assert torch.equal(Rope(theta=100.0, share=0.5).angles(16)[0], found)
    assert Rope(theta=100.0, kind="linear", parameters={"factor": 4.0}).angles(8)[0].tolist() == pytest.approx(
        (found / 4).tolist()
    )


def test_dynamic_stretches_theta_beyond_the_context_so_that_the_slowest_pair_turns_as_far() -> None:
    """At `factor` s and s * length / context - (s - 1) = 4, the last of d / 2 frequencies is 1/4 of what it was."""
    rope = Rope(theta=100.0, kind="dynamic", parameters={"factor": 2.0}, context=10)
    plain = Rope(theta=100.0).angles(8)[0]
    assert torch.equal(rope.angles(8, 10)[0], plain)
    stretched = rope.angles(8, 25)[0]
    assert stretched[0] == 1
    assert stretched[-1].item() == pytest.approx(plain[-1].item() / 4)


def test_longrope_divides_by_the_long_factors_beyond_the_context_only() -> None:
    parameters = {"short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0], "attention_factor": 1.5}
    rope, plain = Rope(theta=100.0, kind="longrope", parameters=parameters, context=10), Rope(theta=100.0).angles(4)[0]
    for length, divisors in ((10, [1.0, 2.0]), (11, [4.0, 8.0])):
        found, factor = rope.angles(4, length)
        assert torch.allclose(found, plain / torch.tensor(divisors))
        assert factor == 1.5


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_tempers_attention() -> None:
    parameters = {"factor": 8.0, "original_max_position_embeddings": 64}
    found, factor = Rope(kind="yarn", parameters=parameters).angles(64)
    plain = Rope().angles(64)[0]
    turns = 64 * plain / (2 * math.pi)  # over the original context
    assert torch.equal(found[turns > 32], plain[turns > 32])
    assert torch.allclose(found[turns < 0.5], plain[turns < 0.5] / 8)
    assert factor == pytest.approx(0.1 * math.log(8) + 1)
