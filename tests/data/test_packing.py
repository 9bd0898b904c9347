"""Packing: every example once, budgets held, equal counts, few and even micro-batches."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umedtrain.data.packing import pack

BUDGET = 100
lengths_lists = st.lists(st.integers(1, BUDGET), max_size=60)
ranks = st.integers(1, 5)


def loads(plan, lengths):
    return [[sum(lengths[index] for index in bin_) for bin_ in rank] for rank in plan]


@given(lengths_lists, ranks)
def test_every_example_once_within_budget_and_equal_counts(lengths, num_ranks):
    plan = pack(lengths, max_tokens=BUDGET, num_ranks=num_ranks)
    assert len(plan) == num_ranks
    assert sorted(index for rank in plan for bin_ in rank for index in bin_) == list(range(len(lengths)))
    assert all(load <= BUDGET for rank in loads(plan, lengths) for load in rank)
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) >= 1
    assert plan == pack(lengths, max_tokens=BUDGET, num_ranks=num_ranks)


@given(lengths_lists, ranks)
def test_micro_batches_run_from_full_to_empty(lengths, num_ranks):
    plan = pack(lengths, max_tokens=BUDGET, num_ranks=num_ranks)
    rounds = list(zip(*loads(plan, lengths), strict=True))
    for fuller, emptier in pairwise(rounds):
        assert min(fuller) >= max(emptier)


@given(lengths_lists, ranks)
def test_few_micro_batches(lengths, num_ranks):
    """Any two bins of a first-fit packing overfill one, so fewer than 2 * total / budget + 1 bins are needed."""
    per_rank = len(pack(lengths, max_tokens=BUDGET, num_ranks=num_ranks)[0])
    needed = max(1, 2 * sum(lengths) // BUDGET + 1)
    assert per_rank <= -(-needed // num_ranks)


def fewest_bins(lengths, budget):
    """By trying everything."""
    best = len(lengths)
    for places in product(range(len(lengths)), repeat=len(lengths)):
        sums = {}
        for place, length in zip(places, lengths, strict=True):
            sums[place] = sums.get(place, 0) + length
        if max(sums.values()) <= budget:
            best = min(best, len(sums))
    return best


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=5), st.integers(1, 3))
def test_near_the_fewest_possible(lengths, num_ranks):
    """First-fit decreasing needs at most 11/9 of the fewest bins + 6/9 (Dosa 2007); we never need more."""
    per_rank = len(pack(lengths, max_tokens=10, num_ranks=num_ranks)[0])
    bound = (11 * fewest_bins(lengths, 10) + 6) // 9
    assert per_rank <= -(-bound // num_ranks)


def test_first_fit_helps_where_even_loads_do_not_fit():
    # Longest into the emptiest bin puts 2 on 3 and overfills; 3+3 and 2+2+2 fit.
    assert pack([3, 3, 2, 2, 2], max_tokens=6, num_ranks=1) == [[[0, 1], [2, 3, 4]]]


@pytest.mark.parametrize(
    "lengths, plan",
    [
        # The longest goes first, though it stands last.
        ([1, 1, 4], [[[2]], [[0, 1]]]),
        # A full bin is no reason to give up even loads.
        ([10, 4, 4], [[[0]], [[1]], [[2]]]),
        # The rank with the fuller bin of the first round gets the emptier one of the second.
        ([10, 6, 6, 2], [[[0], [3]], [[1], [2]]]),
    ],
)
def test_even_loads(lengths, plan):
    assert pack(lengths, max_tokens=10, num_ranks=len(plan)) == plan


def test_packing_is_dense_and_even():
    lengths = [(37 * i) % 900 + 100 for i in range(512)]
    plan = pack(lengths, max_tokens=8192, num_ranks=8)
    totals = [sum(rank) for rank in loads(plan, lengths)]
    assert len(plan[0]) == -(-sum(lengths) // (8192 * 8))
    assert max(totals) - min(totals) < 0.01 * min(totals)


@given(lengths_lists)
def test_ranks_differ_by_less_than_a_micro_batch(lengths):
    totals = [sum(rank) for rank in loads(pack(lengths, max_tokens=BUDGET, num_ranks=3), lengths)]
    assert max(totals) - min(totals) <= BUDGET


def test_fewer_examples_than_ranks():
    assert pack([5], max_tokens=10, num_ranks=3) == [[[0]], [[]], [[]]]
    assert pack([], max_tokens=10, num_ranks=2) == [[[]], [[]]]


def test_example_over_the_budget():
    assert pack([10], max_tokens=10, num_ranks=1) == [[[0]]]
    with pytest.raises(ValueError, match="example 1 has 11 tokens"):
        pack([10, 11], max_tokens=10, num_ranks=1)


@pytest.mark.parametrize("arguments", [{"max_tokens": 0, "num_ranks": 1}, {"max_tokens": 1, "num_ranks": 0}])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        pack([], **arguments)
