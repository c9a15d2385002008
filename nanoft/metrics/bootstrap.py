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

import math
from collections.abc import Callable
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
    return _interval(figure.value, _resampled(seed, figure)[0])


def compare(base: Figure, tuned: Figure, seed: int = 0) -> Comparison:
    """The paired bootstrap: both figures on the same resamples (Efron & Tibshirani 1993, chapter 13).

    The p-value is twice the share of resamples on which the change is zero or has the opposite sign; one is added to
    the counts, so that it is never 0 (Davison & Hinkley 1997, section 4.2).
    """
    before, after = _resampled(seed, base, tuned)
    changes, p = after - before, math.nan
    change = _interval(tuned.value - base.value, changes)
    if math.isfinite(change.low):
        p = min(1.0, 2 * (1 + min((changes <= 0).sum(), (changes >= 0).sum())) / (1 + RESAMPLES))
    return Comparison(_interval(base.value, before), _interval(tuned.value, after), change, p)


def _interval(value: float, resampled: Array) -> Interval:
    counted = resampled[~np.isnan(resampled)]  # in some resamples, there may be nothing to count
    if not len(counted) or not np.isfinite(counted).all():
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(counted, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _resampled(seed: int, *figures: Figure) -> list[Array]:
    """Each figure on the same resamples, (RESAMPLES,); NaN for a single sample, or if the parts are not finite."""
    n, rng = len(figures[0].parts), np.random.default_rng(seed)
    block = max(1, AT_ONCE // max(n, 1))
    if n < 2 or not all(np.isfinite(figure.parts).all() for figure in figures):
        return [np.full(RESAMPLES, math.nan) for _ in figures]
    blocks: list[list[Array]] = []
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        chosen = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
        blocks.append([figure.of_sums(counts @ figure.parts) for figure in figures])
    return [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
