import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umedtrain.evaluation.votes import (
    Samples,
    best_of_n,
    count_votes,
    expected_majority_score,
    majority_vote,
    pass_at_k,
    reward_weights,
    score_prefixes,
    score_samples,
    weighted_vote,
)

ANSWERS = st.lists(st.sampled_from(["A", "B", "C", None]), min_size=1, max_size=8)


def test_majority_leaves_unread_answers_out():
    assert count_votes([None, "B", None, None, "A", "B"]) == {"B": 2, "A": 1}
    assert majority_vote([None, None, None, "B"]) == "B"
    assert majority_vote([None, None]) is None
    assert majority_vote([]) is None


def test_ties_go_to_the_larger_sum_of_scores():
    assert majority_vote(["A", "B", "A", "B"], scores=[1.0, 3.0, 1.0, -2.0]) == "A"
    assert majority_vote(["A", "B", "A", "B"], scores=[-5.0, 3.0, 1.0, -2.0]) == "B"
    # scores never outvote a larger number of votes
    assert majority_vote(["A", "B", "A"], scores=[0.0, 99.0, 0.0]) == "A"


def test_left_ties_fall_evenly_by_seed_and_not_by_first_sample():
    answers = ["A", "B", "C", "A", "B", "C"]
    wins = [majority_vote(answers, seed=seed) for seed in range(600)]
    assert wins == [majority_vote(answers, scores=[1.0] * 6, seed=seed) for seed in range(600)]
    for letter in "ABC":
        assert 150 < wins.count(letter) < 250


@settings(max_examples=60, deadline=None)
@given(ANSWERS, st.sampled_from("ABC"))
def test_expected_score_is_the_mean_over_all_orders(answers, gold):
    """Enumerate: a tie goes to the tied answer that comes first in an order of the samples."""
    counts = count_votes(answers)
    tied = {answer for answer in counts if counts[answer] == max(counts.values())}
    wins = orders = 0
    for order in itertools.permutations(sorted(tied)):
        orders += 1
        wins += bool(order) and order[0] == gold
    assert expected_majority_score(answers, gold) == pytest.approx(wins / orders)


@settings(max_examples=25, deadline=None)
@given(ANSWERS, st.sampled_from("ABC"))
def test_seeded_ties_average_to_the_expected_score(answers, gold):
    mean = sum(majority_vote(answers, seed=seed) == gold for seed in range(300)) / 300
    counts = count_votes(answers)
    tied = [answer for answer in counts if counts[answer] == max(counts.values())]
    # An answer with as many samples as each of the others comes first as often as each of them.
    assert mean == pytest.approx(expected_majority_score(answers, gold), abs=0.15 if len(tied) > 1 else 0)


def test_weighted_vote():
    assert weighted_vote(["A", "B", "B", None], [1.0, 0.4, 0.5, 9.0]) == "A"
    assert weighted_vote(["A", "B", "B"], [1.0, 0.6, 0.5]) == "B"
    assert weighted_vote([None], [1.0]) is None


def test_reward_weights_do_not_depend_on_the_zero_point():
    assert reward_weights([0.0, math.log(2)]) == pytest.approx([0.5, 1.0])
    assert reward_weights([1000.0, 1000.0 + math.log(2)]) == pytest.approx([0.5, 1.0])
    answers, rewards = ["A", "B", "B"], [-3.0, -3.5, -3.5]
    assert weighted_vote(answers, reward_weights(rewards)) == "B"  # sums of raw rewards: A -3, B -7


def test_best_of_n():
    assert best_of_n([0.1, 0.7, 0.7], ["x", "y", "z"]) == "y"
    assert best_of_n([-1.0], ["x"]) == "x"
    for rewards, samples, message in [
        ([], [], "0 samples"),
        ([1.0], ["x", "y"], "2 samples with 1"),
        ([math.nan], ["x"], "nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            best_of_n(rewards, samples)


@pytest.mark.parametrize(
    "n,right,k,expected", [(5, 2, 1, 0.4), (5, 2, 2, 0.7), (5, 2, 4, 1.0), (4, 0, 4, 0.0), (3, 3, 1, 1.0)]
)
def test_pass_at_k_by_hand(n, right, k, expected):
    assert pass_at_k(n, right, k) == pytest.approx(expected)


@settings(max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, data):
    k = data.draw(st.integers(1, len(right)))
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_arguments():
    for n, right, k in [(3, 4, 1), (3, 1, 0), (3, 1, 4), (3, -1, 1)]:
        with pytest.raises(ValueError, match="pass@k"):
            pass_at_k(n, right, k)


POOL = [
    Samples("A", ("A", "B", "B", None), (2.0, 1.0, 0.0, 9.0), (False, False, False, True)),
    Samples("C", ("C", "C", "D", "D"), (0.0, 0.0, 5.0, -6.0), (False, False, False, False)),
    Samples("B", ("A", "A", "A", "B"), (0.0, 0.0, 0.0, 3.0), (False, True, False, False)),
]


def test_pool_by_hand():
    scores = score_samples(POOL)
    assert scores.k == 4
    assert scores.scores == {
        "mean": (0.25, 0.5, 0.25),
        "majority": (0.0, 1.0, 0.0),  # the second by the sum of rewards: 0 against -1
        "majority_expected": (0.0, 0.5, 0.0),
        # first: A e^2 = 7.39 against B e^1 + e^0 = 3.72; second: D by e^5; third: B by e^3 against 3
        "weighted": (1.0, 0.0, 1.0),
        "best_of_n": (0.0, 0.0, 1.0),  # first: an answer that could not be read
        "oracle": (1.0, 1.0, 1.0),
    }
    assert scores.means()["mean"] == pytest.approx(1 / 3)
    assert scores.unparsed_rate == pytest.approx(1 / 12)
    assert scores.truncated_rate == pytest.approx(2 / 12)


def test_prefixes_are_the_first_samples():
    one, two, four = score_prefixes(POOL, (1, 2, 4))
    assert [item.k for item in (one, two, four)] == [1, 2, 4]
    assert set(one.scores.values()) == {(1.0, 1.0, 0.0)}  # with one sample all methods agree
    assert two.scores["oracle"] == (1.0, 1.0, 0.0)
    assert two.scores["best_of_n"] == (1.0, 1.0, 0.0)
    assert four == score_samples(POOL)
    with pytest.raises(ValueError, match="first 8 of 4"):
        score_prefixes(POOL, (8,))


def test_pool_without_rewards():
    scores = score_samples([Samples("A", ("A", None))])
    assert set(scores.scores) == {"mean", "majority", "majority_expected", "oracle"}
    assert (scores.unparsed_rate, scores.truncated_rate) == (0.5, None)


def test_unread_answers_are_never_right():
    scores = score_samples([Samples("A", (None, None), (1.0, 2.0))])
    assert set(scores.scores.values()) == {(0.0,)}
    assert scores.unparsed_rate == 1.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["A", "B", None]), min_size=4, max_size=4), min_size=1, max_size=5))
def test_bounds(pool):
    means = score_samples([Samples("A", tuple(answers), (0.0, 1.0, 2.0, 3.0)) for answers in pool]).means()
    assert 0 <= means["mean"] <= means["oracle"] <= 1
    assert all(value <= means["oracle"] for value in means.values())


def test_pool_errors():
    with pytest.raises(ValueError, match="2 answers with 1 rewards"):
        Samples("A", ("A", "B"), (1.0,))
    with pytest.raises(ValueError, match="without samples"):
        Samples("A", ())
    with pytest.raises(ValueError, match="empty pool"):
        score_samples([])
    with pytest.raises(ValueError, match="equally many"):
        score_samples([Samples("A", ("A",)), Samples("A", ("A", "B"))])
    with pytest.raises(ValueError, match="some questions have rewards"):
        score_samples([Samples("A", ("A",)), Samples("A", ("A",), (1.0,))])
