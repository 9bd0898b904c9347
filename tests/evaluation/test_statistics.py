import math
import sys

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from umedtrain.evaluation.statistics import (
    Spread,
    chance,
    majority_class,
    mcnemar,
    mean_difference,
    mean_interval,
    over_seeds,
    paired_bootstrap,
    pearson,
    wilson_interval,
)


def test_wilson_by_hand():
    # 8 of 10, z = 1.96: centre (0.8 + 0.19208) / 1.38416 = 0.71674, half 0.22657
    estimate = wilson_interval(8, 10)
    assert (estimate.value, estimate.n) == (0.8, 10)
    assert (estimate.low, estimate.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@settings(max_examples=50)
@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_solves_its_equation(n, share, confidence):
    """The ends are the p at which the observed share lies z standard errors away (Wilson 1927)."""
    right = round(n * share)
    estimate = wilson_interval(right, n, confidence=confidence)
    z = scipy.stats.norm.ppf((1 + confidence) / 2)
    for end in (estimate.low, estimate.high):
        assert (right / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-9)


def test_wilson_errors():
    for right, n in [(1, 0), (-1, 5), (6, 5)]:
        with pytest.raises(ValueError, match="share needs"):
            wilson_interval(right, n)
    with pytest.raises(ValueError, match=r"confidence = 95"):
        wilson_interval(1, 2, confidence=95)


def test_mean_interval_by_kind_of_score():
    assert mean_interval([1.0, 0.0, 1.0, 1.0]) == wilson_interval(3, 4)
    assert mean_interval([True]) == wilson_interval(1, 1)
    values = [0.25, 0.5, 1.0, 0.0]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    estimate = mean_interval(values)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.4375, *expected))
    for bad, message in [([], "at least one"), ([0.5], "at least 2"), ([0.5, math.nan], r"scores\[1\]")]:
        with pytest.raises(ValueError, match=message):
            mean_interval(bad)


def test_mean_difference_is_the_paired_t_interval():
    first, second = [0.1, 0.5, 0.4, 0.9], [0.3, 0.5, 0.9, 0.8]
    expected = scipy.stats.ttest_rel(second, first).confidence_interval(0.95)
    estimate = mean_difference(first, second)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.15, *expected))
    same = mean_difference(first, first)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="4 and 3"):
        mean_difference(first, second[:3])


def test_mcnemar_by_hand():
    # 1 lost, 6 gained: p = 2 (1 + 7) / 2^7 = 0.125
    first = [True] * 4 + [False] * 9
    second = [True] * 3 + [False] + [True] * 6 + [False] * 3
    result = mcnemar(first, second)
    assert result.p_value == pytest.approx(0.125)
    assert result.difference == pytest.approx(5 / 13)
    assert result.low < result.difference < result.high
    assert mcnemar(second, first).p_value == pytest.approx(0.125)
    assert mcnemar(second, first).difference == pytest.approx(-5 / 13)


@settings(max_examples=50)
@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_binomial_tail(gained, lost):
    first = [False] * gained + [True] * lost + [True, False]
    second = [True] * gained + [False] * lost + [True, False]
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n
    assert mcnemar(first, second).p_value == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_refuses_fractions():
    for first, second in [([0.5, 1.0], [1.0, 1.0]), ([0.5, 0.5], [0.5, 0.5])]:
        with pytest.raises(ValueError, match="paired_bootstrap"):
            mcnemar(first, second)


def test_bootstrap_against_scipy():
    draw = np.random.default_rng(0)
    first = draw.random(120)
    second = np.clip(first + draw.normal(0.02, 0.15, 120), 0, 1)
    ours = paired_bootstrap(first.tolist(), second.tolist(), seed=1, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (second - first,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    assert ours.difference == pytest.approx((second - first).mean())
    assert ours.p_value == pytest.approx(scipy.stats.ttest_rel(second, first).pvalue, abs=0.02)
    assert paired_bootstrap(first.tolist(), second.tolist(), seed=1, resamples=20_000) == ours


def test_bootstrap_p_value():
    scores = [0.0, 0.5, 1.0, 0.5]
    assert paired_bootstrap(scores, scores, seed=0).p_value == 1.0
    better = paired_bootstrap([0.0] * 20, [1.0] * 20, seed=0, resamples=999)
    assert better.p_value == pytest.approx(2 / 1000)
    assert (better.low, better.high) == (1.0, 1.0)
    with pytest.raises(ValueError, match="resamples = 10"):
        paired_bootstrap(scores, scores, seed=0, resamples=10)


def test_bootstrap_does_not_depend_on_its_blocks(monkeypatch):
    """Half of the items better: the differences' bootstrap is that of a binomial."""
    result = paired_bootstrap([0.0] * 400, [1.0, 0.0] * 200, seed=5, resamples=25_000)
    low, high = scipy.stats.binom(400, 0.5).ppf([0.025, 0.975]) / 400
    assert (result.low, result.high) == pytest.approx((low, high), abs=0.004)


def test_baselines():
    assert majority_class(["A", "B", "B", "C"]) == ("B", 0.5)
    assert majority_class(["C", "A", "A", "C"]) == ("C", 0.5)
    assert chance([4, 4, 5, 2]) == pytest.approx((0.25 + 0.25 + 0.2 + 0.5) / 4)
    for call in (lambda: majority_class([]), lambda: chance([]), lambda: chance([4, 0])):
        with pytest.raises(ValueError, match="at least"):
            call()


def test_over_seeds():
    spread = over_seeds([0.70, 0.74, 0.72])
    assert (spread.mean, spread.low, spread.high, spread.n) == (pytest.approx(0.72), 0.70, 0.74, 3)
    assert spread.sd == pytest.approx(np.std([0.70, 0.74, 0.72], ddof=1))
    assert over_seeds([0.5]) == Spread(0.5, 0.5, 0.5, None, 1)
    with pytest.raises(ValueError, match=r"values\[1\]"):
        over_seeds([0.5, math.inf])


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ModuleNotFoundError, match=r"umedtrain\[eval\]"):
        wilson_interval(1, 2)


def test_pearson():
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(2, 30))
    assert pearson(first, second) == pytest.approx(scipy.stats.pearsonr(first, second).statistic)
    assert pearson([1, 2, 3], [5, 3, 1]) == pytest.approx(-1)
    assert pearson([1, 1], [1, 2]) is None
    assert pearson([1, 2], [1, 1]) is None
    assert pearson([1], [2]) is None
    with pytest.raises(ValueError, match="not of 2 and 1"):
        pearson([1, 2], [1])
    with pytest.raises(ValueError, match="at least one"):
        pearson([], [])
