import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from umedtrain.evaluation.rewards import (
    ScoredPair,
    Stratum,
    calibration,
    length_bias,
    score_rewards,
    spearman_within,
    summarize_rewards,
)

PAIRS = [
    ScoredPair(2.0, 1.0, 100, 50, "easy"),  # longer, right
    ScoredPair(1.0, 1.0, 80, 40, "easy"),  # longer, tie
    ScoredPair(0.0, 3.0, 50, 100, "easy"),  # shorter, wrong
    ScoredPair(1.5, 1.0, 30, 60, "hard"),  # shorter, right
    ScoredPair(0.0, 0.5, 100, 90, "hard"),  # within 10%, longer, wrong
    ScoredPair(4.0, 0.0, 90, 90, "hard"),  # equal lengths, right
    ScoredPair(0.0, 1.0, 100, 89, "human"),  # just beyond 10%: longer, wrong
]


def test_by_hand():
    scores = score_rewards(PAIRS)
    assert scores.pairs == (1.0, 0.5, 0.0, 1.0, 0.0, 1.0, 0.0)
    assert scores.accuracy == pytest.approx(3.5 / 7)
    assert scores.groups == {
        "easy": Stratum(3, pytest.approx(0.5)),
        "hard": Stratum(3, pytest.approx(2 / 3)),
        "human": Stratum(1, 0.0),
    }
    assert scores.group_mean == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    assert scores.mean_margin == pytest.approx((1 + 0 - 3 + 0.5 - 0.5 + 4 - 1) / 7)
    assert scores.median_margin == 0.0
    assert score_rewards(PAIRS[:2]).median_margin == 0.5


def test_length_bias_by_hand():
    bias = length_bias(PAIRS)
    assert bias.chosen_longer_share == pytest.approx(4 / 7)
    assert bias.longer == Stratum(3, pytest.approx(1.5 / 3))
    assert bias.shorter == Stratum(2, 0.5)
    assert bias.similar == Stratum(2, 0.5)
    assert bias.longest_baseline == pytest.approx(4.5 / 7)
    # differing in both: long+ long+ (third: the longer one is preferred), fourth -, fifth -, seventh -
    assert (bias.spearman, bias.spearman_n) == (pytest.approx((1 + 1 - 1 - 1 - 1) / 5), 5)
    assert bias.preferred_longer_share == pytest.approx(2 / 5)


def test_published_averages_are_plain_means():
    """Medical RewardBench, UltraMedRM-8B: 94.12, 73.47, 77.30, 77.22 average 80.53, over all pairs 81.47."""
    pairs = []
    for group, right, n in [
        ("easy", 224, 238),
        ("hard", 144, 196),
        ("human", 126, 163),
        ("length", 139, 180),
    ]:
        pairs += [ScoredPair(float(i < right), 0.5, 1, 1, group) for i in range(n)]
    scores = score_rewards(pairs)
    groups = [round(100 * stratum.accuracy, 2) for stratum in scores.groups.values()]
    assert groups == [94.12, 73.47, 77.30, 77.22]
    assert round(100 * scores.group_mean, 2) == 80.53
    assert round(100 * scores.accuracy, 2) == 81.47


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=20))
def test_strata_are_all_pairs_and_swapping_mirrors(values):
    pairs = [ScoredPair(float(a), float(b), c, d) for a, b, c, d in values]
    swapped = [ScoredPair(float(b), float(a), d, c) for a, b, c, d in values]
    bias, mirror = length_bias(pairs), length_bias(swapped)
    assert bias.longer.n + bias.shorter.n + bias.similar.n == len(pairs)
    assert (bias.longer.n, bias.shorter.n) == (mirror.shorter.n, mirror.longer.n)
    assert score_rewards(pairs).accuracy == pytest.approx(1 - score_rewards(swapped).accuracy)
    assert bias.longest_baseline == pytest.approx(1 - mirror.longest_baseline)
    assert bias.spearman == mirror.spearman


def test_spearman_within_prompts():
    draw = np.random.default_rng(0)
    prompts = [(draw.normal(size=6).tolist(), draw.integers(5, 9, size=6).tolist()) for _ in range(10)]
    ranks = [np.corrcoef(scipy.stats.rankdata(r), scipy.stats.rankdata(n))[0, 1] for r, n in prompts]
    constant = [([1.0, 1.0, 1.0], [1, 2, 3]), ([1.0, 2.0], [5, 5]), ([1.0], [5])]
    value, n = spearman_within(prompts + constant)
    assert (value, n) == (pytest.approx(np.mean(ranks)), 10)
    for rewards, lengths in [([1.0, 2.0], [3, 9]), ([2.0, 1.0], [3, 9])]:
        assert spearman_within([(rewards, lengths)])[0] == pytest.approx(
            scipy.stats.spearmanr(rewards, lengths).statistic
        )
    assert spearman_within(constant) == (None, 0)
    # across prompts the correlation is 1, within each it is -1
    assert spearman_within([([2.0, 1.0], [10, 20]), ([9.0, 8.0], [100, 200])]) == (-1.0, 2)


def test_both_sides_and_calibration_are_among_the_scores():
    scores = score_rewards(PAIRS)
    chosen = [pair.chosen for pair in PAIRS]
    assert (scores.chosen.mean, scores.chosen.std) == (pytest.approx(np.mean(chosen)), pytest.approx(np.std(chosen)))
    lengths = [pair.rejected_length for pair in PAIRS]
    correlation = np.corrcoef([pair.rejected for pair in PAIRS], lengths)[0, 1]
    assert scores.rejected.length_correlation == pytest.approx(correlation)
    assert scores.calibration == calibration(PAIRS)


def test_calibration_by_hand():
    logit = {p: math.log(p / (1 - p)) for p in (0.52, 0.54, 0.72, 0.99)}
    margins = [logit[0.52], -logit[0.54], logit[0.72], 0.0, logit[0.99], 1000.0, -1000.0]
    found = calibration([ScoredPair(margin, 0.0, 1, 1) for margin in margins])
    # Of 0.50, 0.52 and 0.54: a tie, right, wrong.
    assert [(part.n, part.accuracy) for part in found.bins] == [(3, 0.5), (1, 1.0), (3, pytest.approx(2 / 3))]
    assert [part.confidence for part in found.bins] == pytest.approx([0.52, 0.72, 2.99 / 3])
    assert found.confidence == pytest.approx((0.5 + 0.52 + 0.54 + 0.72 + 2.99) / 7)
    assert found.probability == pytest.approx((0.52 + 0.46 + 0.72 + 0.5 + 0.99 + 1.0 + 0.0) / 7)
    assert found.expected_error == pytest.approx((3 * 0.02 + 0.28 + (2.99 - 2)) / 7)
    one = calibration([ScoredPair(margin, 0.0, 1, 1) for margin in margins], bins=1)
    assert one.expected_error == pytest.approx(abs(4.5 / 7 - found.confidence))


def test_a_model_that_is_as_sure_as_it_is_right_has_no_error():
    pairs = [ScoredPair(math.log(3) if right else -math.log(3), 0.0, 1, 1) for right in (True, True, True, False)]
    assert calibration(pairs).expected_error == pytest.approx(0.0, abs=1e-12)


def test_summary_by_hand():
    summary = summarize_rewards([1.0, 2.0, 6.0], [10, 30, 20])
    assert (summary.count, summary.mean, summary.std) == (3, 3.0, pytest.approx(math.sqrt(14 / 3)))
    assert summary.length_correlation == pytest.approx(np.corrcoef([1, 2, 6], [10, 30, 20])[0, 1])
    assert summarize_rewards([1.0], [3]).std == 0.0
    assert summarize_rewards([1.0, 2.0], [3, 3]).length_correlation is None


def test_errors():
    with pytest.raises(ValueError, match="finite"):
        ScoredPair(math.nan, 0.0, 1, 1)
    with pytest.raises(ValueError, match="negative"):
        ScoredPair(0.0, 0.0, -1, 1)
    with pytest.raises(ValueError, match="one bin, not 1 and 0"):
        calibration(PAIRS[:1], bins=0)
    for call in (score_rewards, length_bias, calibration):
        with pytest.raises(ValueError, match="at least one"):
            call([])
    with pytest.raises(ValueError, match="prompt 0 has 2 rewards and 1 lengths"):
        spearman_within([([1.0, 2.0], [1])])
