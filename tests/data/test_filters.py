"""Duplicates, splits and leaks against brute force and closed forms."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoft.data import filters
from nanoft.data.formats import Conversation, Message

WORDS = [f"w{n}" for n in range(2000)]


def talk(*turns: str, **fields: Any) -> Conversation:
    messages: list[Message] = [
        {"role": ("user", "assistant")[n % 2], "content": text, **fields} for n, text in enumerate(turns)
    ]
    return Conversation(messages, None, "f", 1)


def shingles(text: str) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def texts(count: int, length: int = 120, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=length)) for _ in range(count)]


# ---- Exact duplicates


def test_a_fingerprint_tells_everything_that_is_said() -> None:
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    different = [
        talk("a", "b"), talk("ab", ""), talk("a", "b", "c"), talk("b", "a"), talk("a", "B"), talk("a", "b "),
        talk("a\0b"), talk("a", "b", **call), talk("a", "b", weight=0), talk("a", "b", train=False),
        talk("a", "b", reasoning_content="c"), talk("a", "b", reasoning_content="d"), Conversation([], "a", "f", 1),
        Conversation(talk("a", "b").messages, None, "f", 1, tools=[{"name": "t"}]),
        Conversation([{"role": "system", "content": "a"}, *talk("b").messages], None, "f", 1),
    ]  # fmt: skip
    assert len({filters.fingerprint(c) for c in different}) == len(different)
    again = Conversation(talk("a", "b").messages, None, "elsewhere", 99, fields={"user": "x"})
    assert filters.fingerprint(again) == filters.fingerprint(talk("a", "b"))


# ---- Near duplicates


@pytest.mark.parametrize("cut", [0, 3, 10, 20, 40, 80])
def test_signatures_agree_as_often_as_the_texts_overlap(cut: int) -> None:
    """The estimate has the variance of 128 coin flips."""
    errors = []
    for text in texts(60, seed=cut):
        other = " ".join(text.split()[cut:])
        agree = (filters.signature(text) == filters.signature(other)).mean()
        errors.append(agree - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.015
    assert np.std(errors) < 0.055  # sqrt(0.25 / 128) = 0.044 at most


def test_case_and_punctuation_do_not_matter_and_short_texts_have_signatures() -> None:
    assert (filters.signature("A b, c d e f!") == filters.signature("a B c d, e f")).all()
    assert (filters.signature("one two") == filters.signature("one two")).all()
    assert (filters.signature("one two") != filters.signature("one three")).any()
    assert filters.signature("").shape == (filters.SIGNATURE,)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_near_duplicates_against_brute_force(threshold: float) -> None:
    """Of the pairs above the threshold, at least 95 % are found; of those well below, none."""
    originals = texts(150, seed=3)
    chance, copies = random.Random(7), []
    for text in originals:
        words = text.split()
        for _ in range(chance.randrange(0, 25)):  # so many replaced words, each of which breaks five 5-grams
            words[chance.randrange(len(words))] = chance.choice(WORDS)
        copies.append(" ".join(words))
    signatures = np.stack([filters.signature(text) for text in [*originals, *copies]])
    removed = filters.near_duplicates(signatures, threshold, np.ones(300, dtype=np.bool_))
    assert not removed[:150].any()  # the first of two stays
    similarity = np.array([jaccard(a, b) for a, b in zip(originals, copies, strict=True)])
    above, below = similarity > threshold + 0.05, similarity < threshold - 0.12
    assert above.sum() >= 5
    assert below.sum() >= 5
    assert removed[150:][above].mean() >= 0.95
    assert not removed[150:][below].any()


def test_rows_of_a_band_find_95_percent_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.95, 1.0):
        rows = filters.rows_of_a_band(threshold)
        found = [1 - (1 - threshold**r) ** (filters.SIGNATURE // r) for r in (rows, rows + 1)]
        assert found[0] >= 0.95
        assert found[1] < 0.95 or rows == filters.SIGNATURE


def test_a_chain_of_copies_keeps_its_first_and_what_is_not_like_it() -> None:
    same = texts(1)[0]
    signatures = np.stack([filters.signature(text) for text in [*texts(3, seed=9), same, same, same, same]])
    kept = np.ones(7, dtype=np.bool_)
    assert filters.near_duplicates(signatures, 0.8, kept).tolist() == [False] * 4 + [True] * 3
    kept[3] = False  # it was left out before
    assert filters.near_duplicates(signatures, 0.8, kept).tolist() == [False] * 5 + [True] * 2


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_resemblance_between_two_sides_only(at_once: int) -> None:
    same, other = texts(2)
    signatures = np.stack([filters.signature(text) for text in [same, same, other, same, other]])
    training, validation = np.array([1, 1, 1, 0, 0], dtype=np.bool_), np.array([0, 0, 0, 1, 0], dtype=np.bool_)

    def found(others: Any) -> list[bool]:
        read = lambda start, stop: signatures[start:stop]  # noqa: E731
        return filters.resembling(read, 0.8, training, others, at_once).tolist()

    assert found(validation) == [True, True, False, False, False]
    assert found(np.zeros(5, dtype=np.bool_)) == [False] * 5
    assert found(np.array([0, 0, 0, 1, 1], dtype=np.bool_)) == [True, True, True, False, False]


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_leaks_against_brute_force(threshold: float) -> None:
    held = texts(80, seed=11)
    chance, training = random.Random(5), []
    for text in held:
        words = text.split()
        for _ in range(chance.randrange(0, 25)):
            words[chance.randrange(len(words))] = chance.choice(WORDS)
        training.append(" ".join(words))
    signatures = np.stack([filters.signature(text) for text in [*training, *held]])
    kept = np.arange(160) < 80
    found = filters.resembling(lambda a, b: signatures[a:b], threshold, kept, ~kept, 37)
    similarity = np.array([jaccard(a, b) for a, b in zip(training, held, strict=True)])
    above, below = similarity > threshold + 0.05, similarity < threshold - 0.12
    assert above.sum() >= 4
    assert below.sum() >= 4
    assert found[:80][above].mean() >= 0.95
    assert not found[:80][below].any()
    assert not found[80:].any()


# ---- Cut-off replies

ENOUGH = "This answer has a first sentence. And here it goes on with more words than twenty so that"
CUT_OFF = {
    "in mid-sentence": (ENOUGH + " somebody could", True),
    "at a comma": (ENOUGH + " somebody could,", True),
    "full stop": (ENOUGH + " somebody could.", False),
    "quote": (ENOUGH + ' somebody "could."', False),
    "number": (ENOUGH + " it is = 72", False),
    "code": (ENOUGH + " print(x)\n```", False),
    "short": ("Yes. No", False),
    "no sentences": ("apples, pears, " * 12 + "plums", False),
}


@pytest.mark.parametrize(("reply", "expected"), CUT_OFF.values(), ids=list(CUT_OFF))
def test_replies_that_stop_in_mid_sentence(reply: str, expected: bool) -> None:
    assert filters.looks_cut_off(talk("q", reply)) is expected


# ---- Splits


def ranks_of(questions: list[str], seed: int = 0) -> Any:
    return np.array([filters.rank(question, seed) for question in questions], np.uint64)


def held(questions: list[str], size: int, seed: int = 0, strata: list[int] | None = None) -> Any:
    groups = np.array(strata if strata is not None else [0] * len(questions))
    return filters.hold_out(ranks_of(questions, seed), groups, size)


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


def test_the_newest_are_held_out() -> None:
    times = np.array([5.0, 1.0, 9.0, 9.0, 3.0, 7.0])
    ranks = np.arange(6).astype(np.uint64)
    assert np.flatnonzero(filters.hold_out_newest(times, ranks, 3)).tolist() == [2, 3, 5]
    assert np.flatnonzero(filters.hold_out_newest(times, ranks, 1)).tolist() == [2]


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


# ---- Prompts of an evaluation among the training data


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_leaked_prompts_are_counted_word_for_word_and_nearly(at_once: int) -> None:
    asked = texts(40, seed=1)
    exact = [text.upper().replace(" ", "  ") for text in asked[:6]]
    near = [f"{text} and more" for text in asked[4:15]]  # two of these stand there word for word, too
    half = [" ".join(text.split()[:60]) + " " + other for text, other in zip(asked[20:], texts(20, 60, 5), strict=True)]
    trained_on = [*texts(50, seed=2), *near, *exact, *half]
    resembling = {a for a in asked for t in trained_on if jaccard(a, t.lower()) >= 0.8}
    assert resembling == set(asked[:15])
    assert filters.count_leaks(asked, iter(trained_on), 0.8, at_once) == (6, 9)


def test_nothing_leaks_from_nothing() -> None:
    assert filters.count_leaks([], iter(texts(3)), 0.8) == (0, 0)
    assert filters.count_leaks(texts(3), iter([]), 0.8) == (0, 0)
