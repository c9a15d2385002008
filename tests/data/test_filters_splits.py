"""Held-out records: the same ones for the same seed, groups on one side, strata in proportion."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoft.data import filters


def keys_of(questions: list[str], seed: int = 0) -> Any:
    return np.array([filters.split_key(question, seed) for question in questions], np.uint64)


def held(questions: list[str], size: int, seed: int = 0, strata: list[int] | None = None) -> Any:
    groups = np.array(strata if strata is not None else [0] * len(questions))
    return filters.hold_out(keys_of(questions, seed), groups, size)


QUESTIONS = [f"question {n % 400}" for n in range(1000)]  # each of 400 two or three times


def chosen(mask: Any, questions: list[str]) -> set[str]:
    return {question for question, out in zip(questions, mask, strict=True) if out}


def test_a_split_leaks_nothing_and_has_its_size() -> None:
    for size in (1, 2, 7, 100, 900):
        mask = held(QUESTIONS, size)
        assert chosen(mask, QUESTIONS).isdisjoint(chosen(~mask, QUESTIONS))
        assert size - 1 <= mask.sum() <= size or size == 1  # questions come two or three at a time
        assert held([f"q{n}" for n in range(1000)], size).sum() == size


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    first = chosen(held(QUESTIONS, 100), QUESTIONS)
    shuffled = random.Random(1).sample(QUESTIONS, len(QUESTIONS))
    assert chosen(held(shuffled, 100), shuffled) == first
    assert len(chosen(held(QUESTIONS, 100, seed=1), QUESTIONS) & first) < 20  # 4 by chance
    assert len(first - chosen(held(QUESTIONS, 200), QUESTIONS)) <= 1  # a larger part holds out more, not others


def test_a_group_that_is_larger_than_what_is_wanted_stays_in_training() -> None:
    questions = ["Hello"] * 900 + [f"q{n}" for n in range(100)]
    for seed in range(20):
        mask = held(questions, 50, seed)
        assert mask.sum() == 50
        assert not mask[:900].any()
    assert not held(["same"] * 5, 2).any()


def test_each_stratum_gives_its_share() -> None:
    questions = [f"q{n}" for n in range(2000)]
    strata = [0] * 1400 + [1] * 500 + [2] * 100
    mask = held(questions, 100, strata=strata)
    assert Counter(np.array(strata)[mask].tolist()) == {0: 70, 1: 25, 2: 5}
    order = random.Random(0).sample(range(2000), 2000)
    again = held([questions[i] for i in order], 100, strata=[strata[i] for i in order])
    assert {order[i] for i in np.flatnonzero(again)} == set(np.flatnonzero(mask).tolist())


@pytest.mark.parametrize("size", [1, 90, 333])
def test_many_small_strata_give_as_much_together(size: int) -> None:
    questions = [f"q{n}" for n in range(1800)]
    counts = Counter((np.flatnonzero(held(questions, size, strata=[n // 9 for n in range(1800)])) // 9).tolist())
    assert sum(counts.values()) == size
    assert max(counts.values()) - min(counts.get(n, 0) for n in range(200)) <= 1


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=120),
    size=st.integers(0, 50),
    seed=st.integers(0, 5),
)
def test_groups_never_stand_on_both_sides(rows: list[Any], size: int, seed: int) -> None:
    questions = [str(question) for question, _ in rows]
    mask = held(questions, size, seed, [stratum for _, stratum in rows])
    assert chosen(mask, questions).isdisjoint(chosen(~mask, questions))
    assert mask.sum() <= size
