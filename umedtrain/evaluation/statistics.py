"""How sure a figure is: intervals, paired tests on the same items, baselines, and spread over seeds."""

import math
import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A figure with an interval, from n items."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Second score minus first on the same n items, with an interval and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """A figure over several seeds. `sd` is the sample's standard deviation, None for a single seed."""

    mean: float
    low: float
    high: float
    sd: float | None
    n: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def wilson_interval(right: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """A share of n items and its Wilson score interval."""
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"a share needs n >= 1 and 0 <= right <= n, not right = {right}, n = {n}")
    _check_confidence(confidence)
    interval = _scipy_stats().binomtest(right, n).proportion_ci(confidence, method="wilson")
    return Estimate(right / n, float(interval.low), float(interval.high), n)


def mean_interval(scores: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """The mean of scores: Wilson's interval where all are 0 or 1, Student's t otherwise.

    Raises:
        ValueError: for no scores, a score that is no finite number, or one single fractional score.
    """
    values = _array(scores, "scores")
    if np.isin(values, (0.0, 1.0)).all():
        return wilson_interval(int(values.sum()), len(values), confidence=confidence)
    mean, low, high = _t_interval(values, confidence)
    return Estimate(mean, low, high, len(values))


def mean_difference(first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """mean(second) - mean(first) of scores paired by item, with Student's t interval of the differences."""
    differences = _differences(first, second)
    mean, low, high = _t_interval(differences, confidence)
    return Estimate(mean, low, high, len(differences))


def mcnemar(first: Sequence[bool], second: Sequence[bool], *, confidence: float = 0.95) -> Comparison:
    """Exact McNemar test of two models' right and wrong answers to the same items.

    The p-value is the binomial test's on the items where just one of them is right (1 when there is none);
    the interval is Student's t interval of the paired differences.
    """
    differences = _differences(first, second)
    if not np.isin(differences, (-1.0, 0.0, 1.0)).all() or not set(map(float, first)) <= {0.0, 1.0}:
        raise ValueError("McNemar's test takes right or wrong; use paired_bootstrap for fractional scores")
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    p_value = float(_scipy_stats().binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    mean, low, high = _t_interval(differences, confidence)
    return Comparison(mean, low, high, p_value, len(differences))


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int,
) -> Comparison:
    """Bootstrap over items of mean(second) - mean(first), for scores paired by item that may be fractions.

    Percentile interval. The p-value is twice the smaller share of resampled differences on one side of zero
    (a zero counts on both), with one added to each count so that it is never 0.
    """
    _check_confidence(confidence)
    differences = _differences(first, second)
    if resamples < 100:
        raise ValueError(f"resamples = {resamples} is too few for an interval: take 100 or more")
    draw = np.random.default_rng(seed)
    n = len(differences)
    rows = max(1, 2**22 // n)  # a block of resamples at a time: 32 MB of indices, whatever n is
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = np.concatenate([differences[draw.integers(n, size=(size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    side = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p_value = min(1.0, 2 * (side + 1) / (resamples + 1))
    return Comparison(float(differences.mean()), float(low), float(high), p_value, n)


def pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation of numbers paired by item; None where either side is the same for all items."""
    _differences(first, second)
    x, y = _array(first, "first"), _array(second, "second")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def majority_class(answers: Iterable[Hashable]) -> tuple[Hashable, float]:
    """The most frequent right answer (of several the first seen) and the score of always giving it."""
    counts: dict[Hashable, int] = {}
    for answer in answers:
        counts[answer] = counts.get(answer, 0) + 1
    if not counts:
        raise ValueError("no answers, so there is no majority class: give at least one")
    top = max(counts, key=counts.__getitem__)
    return top, counts[top] / sum(counts.values())


def chance(num_options: Sequence[int]) -> float:
    """The expected score of choosing an option at random: the mean of 1 / options over the items."""
    if not num_options or min(num_options) < 1:
        raise ValueError("chance needs every item's number of options, each at least 1")
    return math.fsum(1 / n for n in num_options) / len(num_options)


def over_seeds(values: Sequence[float]) -> Spread:
    """Mean, smallest, largest and standard deviation of one figure, one value per seed."""
    array = _array(values, "values").tolist()
    deviation = statistics.stdev(array) if len(array) > 1 else None
    return Spread(statistics.fmean(array), min(array), max(array), deviation, len(array))


def _t_interval(values: np.ndarray, confidence: float) -> tuple[float, float, float]:
    _check_confidence(confidence)
    if len(values) < 2:
        raise ValueError("an interval needs at least 2 items")
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    reach = float(_scipy_stats().t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return mean, mean - reach, mean + reach


def _differences(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    if len(first) != len(second):
        raise ValueError(f"paired scores must be of the same items, not of {len(first)} and {len(second)}")
    return _array(second, "second") - _array(first, "first")


def _array(values: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a list of at least one number")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}[{int(np.argmin(np.isfinite(array)))}] is no finite number")
    return array


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must lie between 0 and 1")


def _scipy_stats() -> ModuleType:
    try:
        import scipy.stats
    except ImportError:
        raise ModuleNotFoundError("intervals and tests need scipy: pip install 'umedtrain[eval]'") from None
    return scipy.stats
