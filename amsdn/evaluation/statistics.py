"""Counts with honest error bars: binomial intervals, and what two models on the same samples say about their difference.

Every accuracy in a report is a count of successes in n independent samples, so every interval here is a
binomial one. The computations are SciPy's; this file fixes the conventions and the text form.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import fsum, sqrt
from typing import Any

from scipy.special import betaincinv, ndtri
from scipy.stats import binomtest  # type: ignore[attr-defined]

CONFIDENCE = 0.95


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval (Wilson 1927): near-nominal coverage on average, also at 0 and n. (0, 1) for n = 0."""
    return _interval(successes, n, confidence, "wilson")


def clopper_pearson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact two-sided interval (Clopper and Pearson 1934): never below nominal coverage. (0, 1) for n = 0."""
    return _interval(successes, n, confidence, "exact")


def clopper_pearson_lower(successes: int, n: int, alpha: float) -> float:
    """The exact one-sided lower bound: at most with probability ``alpha`` does it exceed the true probability."""
    _check_counts(successes, n)
    assert 0 < alpha < 1, alpha
    return 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, alpha))


@dataclass(frozen=True)
class Proportion:
    """A share of n samples with its interval; ``low`` and ``high`` are None where n is 0."""

    successes: int
    n: int
    low: float | None
    high: float | None

    @property
    def value(self) -> float | None:
        """The point estimate in [0,1], None where there are no samples."""
        return self.successes / self.n if self.n else None

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return "no samples"
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def as_dict(self) -> dict[str, Any]:
        """The form that report.json holds."""
        return {"successes": self.successes, "n": self.n, "value": self.value, "low": self.low, "high": self.high, "text": str(self)}


def proportion(successes: int, n: int, confidence: float = CONFIDENCE) -> Proportion:
    """A share with its Wilson interval."""
    low, high = wilson(successes, n, confidence) if n else (None, None)
    return Proportion(successes, n, low, high)


def share(hits: Sequence[bool], confidence: float = CONFIDENCE) -> Proportion:
    """The share of True among ``hits`` with its Wilson interval."""
    return proportion(sum(hits), len(hits), confidence)


@dataclass(frozen=True)
class Mean:
    """A mean of n values with its interval."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """The form that report.json holds."""
        return asdict(self)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Mean:
    """The mean of at least one value in [0,1], with Wilson's interval of a proportion of that size.

    It is conservative: no variable in [0,1] varies more than one that is only ever 0 or 1 and has the same mean. Where all values are, it is ``wilson``.
    """
    assert values, "no values"
    n, value, z = len(values), fsum(values) / len(values), float(ndtri((1 + confidence) / 2))
    centre, half = value + z**2 / (2 * n), z * sqrt(value * (1 - value) / n + z**2 / (4 * n**2))
    low, high = ((centre + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return Mean(value, min(max(low, 0.0), value), max(min(high, 1.0), value), n)


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same samples: how many only one of them got right, and how surprising the split is."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """McNemar's exact two-sided test of equal accuracy; entry i of both is whether sample i was answered correctly.

    Samples on which both agree say nothing about the difference; the others are fair coin flips if the models
    are equally good. The p-value is 1 where they never disagree.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    p_value = float(binomtest(only_first, only_first + only_second, 0.5).pvalue) if only_first + only_second else 1.0
    return PairedTest(only_first, only_second, p_value)


def newcombe_paired(both: int, only_first: int, only_second: int, neither: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """An interval for the difference of two accuracies (first minus second) on the same samples, within [-1,1]; (-1, 1) without samples.

    The arguments count the samples that both, only one, or neither model got right. Newcombe 1998 ("Improved confidence intervals for the
    difference between binomial proportions based on paired data", Statistics in Medicine 17), method 10: the Wilson intervals of the two
    accuracies, squared and added as if they were standard errors of variables correlated by phi, a correlation corrected for continuity.
    """
    counts = (both, only_first, only_second, neither)
    assert min(counts) >= 0, counts
    n = sum(counts)
    if n == 0:
        return -1.0, 1.0
    first, second = (both + only_first) / n, (both + only_second) / n
    (low_1, high_1), (low_2, high_2) = (wilson(both + only, n, confidence) for only in (only_first, only_second))
    phi = _corrected_phi(both, only_first, only_second, neither)
    difference = (only_first - only_second) / n
    return difference - _added(first - low_1, high_2 - second, phi), difference + _added(high_1 - first, second - low_2, phi)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number, in their order: rejecting those of at most alpha errs anywhere with at most that probability.

    Holm 1979 ("A simple sequentially rejective multiple test procedure"); the tests may depend on one another in any way.
    """
    assert all(0 <= p <= 1 for p in p_values), list(p_values)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _corrected_phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Newcombe's correlation of two paired outcomes: pulled towards 0 where positive, and 0 where an outcome never varies."""
    n = both + only_first + only_second + neither
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    product = both * neither - only_first * only_second
    corrected = max(product - n / 2, 0.0) if product > 0 else float(product)
    return corrected / math.sqrt(margins) if margins else 0.0


def _added(a: float, b: float, phi: float) -> float:
    """The spread of the difference of two errors of spreads a and b that are correlated by phi."""
    return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))


def _interval(successes: int, n: int, confidence: float, method: str) -> tuple[float, float]:
    _check_counts(successes, n)
    assert 0 < confidence < 1, confidence
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence_level=confidence, method=method)
    return float(interval.low), float(interval.high)


def _check_counts(successes: int, n: int) -> None:
    assert 0 <= successes <= n, f"{successes} successes in {n} samples"
