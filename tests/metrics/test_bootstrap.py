"""Intervals and p-values against the exhaustive set of resamples, and against the normal distribution."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nanoft.metrics.bootstrap import Comparison, Figure, compare, interval

RNG = np.random.default_rng(7)


def normal_p(z: float) -> float:
    """Of so large a |z|, in either direction."""
    return math.erfc(abs(z) / math.sqrt(2))


def losses(nats: object, tokens: object) -> Figure:
    return Figure(np.stack([np.asarray(nats, float), np.asarray(tokens, float)], axis=1), unit="nats")


def every_change(base: Figure, tuned: Figure) -> np.ndarray:
    """The change of a ratio of sums on each of the n^n resamples."""
    n = len(base.parts)
    changes = []
    for chosen in itertools.product(range(n), repeat=n):
        sums = [figure.parts[list(chosen)].sum(axis=0) for figure in (base, tuned)]
        changes.append(sums[1][0] / sums[1][1] - sums[0][0] / sums[0][1])
    return np.array(changes)


@pytest.mark.parametrize("seed", range(3))
def test_the_paired_interval_is_that_of_all_resamples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 30, 6)
    base = losses(rng.normal(2.0, 0.5, 6) * tokens, tokens)
    tuned = losses(base.parts[:, 0] + rng.normal(-0.15, 0.4, 6) * tokens, tokens)
    changes, found = every_change(base, tuned), compare(base, tuned)
    # 10,000 draws place a quantile within a percentile or so: both ends must lie between neighbors in the exact list.
    for end, share in ((found.change.low, 0.025), (found.change.high, 0.975)):
        assert np.quantile(changes, share - 0.007) <= end <= np.quantile(changes, share + 0.007)
    exact = 2 * min((changes <= 0).mean(), (changes >= 0).mean())
    assert found.p == pytest.approx(min(1, exact), abs=0.02)
    assert found.change.value == pytest.approx(tuned.value - base.value)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = RNG.normal(3.0, 2.0, 500)
    found, error = interval(Figure.mean(values)), values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.06, 0.1])
def test_the_p_value_of_a_mean_is_the_normal_one(shift: float) -> None:
    before = RNG.normal(0.0, 5.0, 600)  # what makes a sample hard for both is much larger than the change
    gains = RNG.normal(shift, 0.6, 600)
    found = compare(Figure.mean(before), Figure.mean(before + gains))
    z = gains.mean() / (gains.std() / math.sqrt(600))
    assert found.p == pytest.approx(normal_p(z), abs=0.02)
    assert (found.change.low > 0 or found.change.high < 0) == (found.p < 0.05)


def test_pairing_sees_what_two_intervals_would_hide() -> None:
    before = RNG.normal(0.0, 10.0, 200)
    found = compare(Figure.mean(before), Figure.mean(before + 0.1))
    assert found.base.low < found.tuned.value < found.base.high
    assert found.change.low == pytest.approx(0.1)
    assert found.p < 0.001


def test_a_model_beside_itself_has_not_changed() -> None:
    figure = losses(RNG.random(40) * 7, RNG.integers(1, 9, 40))
    found = compare(figure, figure)
    assert (found.change.value, found.change.low, found.change.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_same_seed_draws_the_same() -> None:
    base, tuned = (losses(RNG.random(30), np.ones(30)) for _ in range(2))
    assert compare(base, tuned, 3) == compare(base, tuned, 3) != compare(base, tuned, 4)


def test_one_sample_and_infinity_have_no_interval() -> None:
    def unknown(found: Comparison) -> bool:
        return math.isnan(found.change.low) and math.isnan(found.change.high) and math.isnan(found.p)

    assert unknown(compare(losses([2.0], [1]), losses([1.0], [1])))
    assert unknown(compare(losses([2.0, 3.0], [1, 1]), losses([1.0, math.inf], [1, 1])))


def test_samples_without_tokens_take_part_without_a_warning() -> None:
    """A text has no prompt: its share of the prompt's tokens is none, and some draws hold texts only."""
    found = interval(losses([0.0, 0.0, 4.0], [0, 0, 2]))
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
