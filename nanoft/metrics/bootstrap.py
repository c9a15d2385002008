"""How certain is a figure? The paired bootstrap.

A perplexity on 200 samples is the perplexity of just those samples; others would give a different one. The bootstrap
(Efron 1979, "Bootstrap methods: another look at the jackknife") estimates how different: resample 200 of the 200 with
replacement and compute the figure again, ten thousand times; the middle 95 % of the results is the interval. Two models
are compared on the same resamples, so that the difficulty of a sample cancels out.

Every figure here is a function of sums over the samples: a mean is sum of scores / number, a loss is sum of nats / sum
of tokens, BLEU depends on ten sums. Resampling is then a matrix product of the count of each sample, (resamples, n),
and its contribution to the sums, (n, k). Below about thirty samples, the interval is too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
RESAMPLES = 10_000
AT_ONCE = 1 << 20  # counts in memory
LEVEL = 0.95


def ratio(sums: Array) -> Array:
    """A mean, a loss: the first sum divided by the second, (...,) of (..., 2)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


@dataclass(frozen=True)
class Figure:
    """One number about n samples: `of_sums` of the sums of their contributions, `parts` (n, k)."""

    parts: Array
    of_sums: Callable[[Array], Array] = ratio
    unit: Literal["nats", "share", "number"] = "share"

    @classmethod
    def mean(cls, values: Any) -> Figure:
        """The mean of one value per sample, (n,)."""
        return cls(np.stack([values, np.ones(len(values))], axis=1))

    @property
    def value(self) -> float:
        return float(self.of_sums(self.parts.sum(axis=0)))

    def each(self) -> Array:
        """The figure of each sample alone, (n,)."""
        return self.of_sums(self.parts)


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; NaN with fewer than two samples, or if the figure is not finite."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    base: Interval
    tuned: Interval
    change: Interval  # tuned - base
    p: float  # two-sided p-value of the change


def interval(figure: Figure, seed: int = 0) -> Interval:
    return _interval(figure.value, [figure.of_sums(counts @ figure.parts) for counts in _resamples(seed, figure)])


def compare(base: Figure, tuned: Figure, seed: int = 0) -> Comparison:
    """The paired bootstrap: both figures on the same resamples (Efron & Tibshirani 1993, chapter 13).

    The p-value is twice the share of resamples on which the change is zero or has the opposite sign; one is added to
    the counts, so that it is never 0 (Davison & Hinkley 1997, section 4.2).
    """
    pairs = [[f.of_sums(counts @ f.parts) for f in (base, tuned)] for counts in _resamples(seed, base, tuned)]
    before, after = [old for old, _ in pairs], [new for _, new in pairs]
    changes = [new - old for old, new in pairs]
    change = _interval(tuned.value - base.value, changes)
    p = float("nan")
    if np.isfinite(change.low):
        every = np.concatenate(changes)
        p = min(1.0, 2 * (1 + min((every <= 0).sum(), (every >= 0).sum())) / (1 + RESAMPLES))
    return Comparison(_interval(base.value, before), _interval(tuned.value, after), change, p)


def _interval(value: float, resampled: list[Array]) -> Interval:
    every = np.concatenate(resampled) if resampled else np.empty(0)
    every = every[~np.isnan(every)]  # a resample in which nothing was counted
    if not len(every) or not np.isfinite(every).all():
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(every, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _resamples(seed: int, *figures: Figure) -> Iterator[Array]:
    """Blocks (m, n) of the count of each sample in n draws with replacement; RESAMPLES rows in all.

    None for a single sample, or if the parts are not finite.
    """
    n = len(figures[0].parts)
    if n < 2 or not all(np.isfinite(figure.parts).all() for figure in figures):
        return
    rng, block = np.random.default_rng(seed), max(1, AT_ONCE // n)
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        chosen = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(chosen.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
