"""How sure is a figure? Draw the samples again, and look how far it moves.

A perplexity on 200 samples is a perplexity of those 200 samples; others would have given another. The bootstrap (Efron
1979, "Bootstrap methods: another look at the jackknife") asks how different: draw 200 of the 200 with replacement,
compute the figure again, ten thousand times; the middle 95 % of what comes out is the interval. Two models are compared
on the same draws, sample by sample, so that what makes a sample hard for both cancels out.

Every figure here is a function of sums over the samples: a mean is sum of scores / number, a loss is sum of nats / sum
of tokens, BLEU is made of ten sums. A draw is then nothing but a matrix product of how often each sample came up,
(draws, n), with what each sample adds to the sums, (n, k).

The interval covers a little less than it says where there are fewer than some thirty samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
DRAWS = 10_000
AT_ONCE = 1 << 20  # counts in memory
LEVEL = 0.95


def ratio(sums: Array) -> Array:
    """A mean, a loss: the first sum divided by the second, (...,) of (..., 2)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


@dataclass(frozen=True)
class Figure:
    """One number about n samples: `of_sums` of the sums over what each of them adds, `parts` (n, k)."""

    parts: Array
    of_sums: Callable[[Array], Array] = ratio
    unit: Literal["nats", "share", "number"] = "share"

    @classmethod
    def mean(cls, values: Any, unit: Literal["nats", "share", "number"] = "share") -> Figure:
        """The mean of one value a sample."""
        column = np.asarray(values, dtype=np.float64)
        return cls(np.stack([column, np.ones_like(column)], axis=1), unit=unit)

    @property
    def value(self) -> float:
        return float(self.of_sums(self.parts.sum(axis=0)))

    def each(self) -> Array:
        """(n,) the figure of each sample alone."""
        return self.of_sums(self.parts)


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; NaN where there are fewer than two samples or the figure is not finite."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two models on the same samples."""

    base: Interval
    tuned: Interval
    change: Interval  # tuned - base
    p: float  # of so large a change, in either direction, if there were none


def interval(figure: Figure, seed: int = 0) -> Interval:
    """The percentile interval of one figure."""
    drawn = [figure.of_sums(counts @ figure.parts) for counts in _draws(seed, figure)]
    return _interval(figure.value, drawn)


def compare(base: Figure, tuned: Figure, seed: int = 0) -> Comparison:
    """The paired bootstrap: both figures on the same draws (Efron & Tibshirani 1993, chapter 13).

    The p-value is twice the share of draws on which the change has the other sign or is none, one draw added so that
    it is never 0 (Davison & Hinkley 1997, section 4.2).
    """
    drawn: tuple[list[Array], list[Array]] = [], []
    for counts in _draws(seed, base, tuned):
        drawn[0].append(base.of_sums(counts @ base.parts))
        drawn[1].append(tuned.of_sums(counts @ tuned.parts))
    changes = [after - before for before, after in zip(*drawn, strict=True)]
    change = _interval(tuned.value - base.value, changes)
    p = float("nan")
    if np.isfinite(change.low):
        every = np.concatenate(changes)
        p = min(1.0, 2 * (1 + min((every <= 0).sum(), (every >= 0).sum())) / (1 + DRAWS))
    return Comparison(_interval(base.value, drawn[0]), _interval(tuned.value, drawn[1]), change, p)


def _interval(value: float, drawn: list[Array]) -> Interval:
    every = np.concatenate(drawn) if drawn else np.empty(0)
    every = every[~np.isnan(every)]  # a draw in which nothing was counted
    if not len(every) or not np.isfinite(every).all():
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(every, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _draws(seed: int, *figures: Figure) -> Iterator[Array]:
    """(rows, n) blocks of how often each sample comes up in a draw of n; DRAWS rows in all.

    None where they would say nothing: of one sample, or of parts that are not finite.
    """
    n = len(figures[0].parts)
    if n < 2 or not all(np.isfinite(figure.parts).all() for figure in figures):
        return
    rng, rows = np.random.default_rng(seed), max(1, AT_ONCE // n)
    for start in range(0, DRAWS, rows):
        size = min(rows, DRAWS - start)
        chosen = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(chosen.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
