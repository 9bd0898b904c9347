"""Mixtures: a weight is how often a source's examples are seen per epoch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umedtrain.data.mixture import Mixture

sizes_and_weights = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.7, 2.0, 2.5])), min_size=1, max_size=4
).map(lambda sources: tuple(zip(*sources, strict=True)))


def epochs(mixture, count):
    return [mixture.epoch(number).tolist() for number in range(count)]


def test_weight_one_is_every_example_once():
    for epoch in epochs(Mixture([5, 3], seed=1), 4):
        assert sorted(epoch) == list(range(8))


def test_weight_two_is_every_example_twice():
    for epoch in epochs(Mixture([5, 3], [2.0, 1.0], seed=1), 3):
        assert Counter(epoch) == dict.fromkeys(range(5), 2) | dict.fromkeys(range(5, 8), 1)


@pytest.mark.parametrize("size", [10, 11])
def test_half_weight_covers_all_in_two_epochs(size):
    first, second, third, fourth = epochs(Mixture([size], [0.5], seed=3), 4)
    assert sorted(first + second) == sorted(third + fourth) == list(range(size))
    assert abs(len(first) - len(second)) <= 1
    # Another half in the next pass, and not simply the first examples of the file.
    assert sorted(first) not in (sorted(third), sorted(fourth), list(range(len(first))))


def test_weight_two_and_a_half():
    first, second = epochs(Mixture([4], [2.5], seed=3), 2)
    assert sorted(Counter(first).values()) == [2, 2, 3, 3]
    assert Counter(first + second) == dict.fromkeys(range(4), 5)


def test_ten_epochs_at_a_tenth_are_one_pass():
    seen = [example for epoch in epochs(Mixture([3], [0.1], seed=0), 10) for example in epoch]
    assert sorted(seen) == [0, 1, 2]
    # The binary fraction nearest to 0.3 is a little less than 0.3.
    assert Mixture([1], [0.3]).start(10) == 3


@given(sizes_and_weights, st.integers(0, 100))
def test_counts_never_differ_by_more_than_one(sources, seed):
    sizes, weights = sources
    mixture = Mixture(sizes, weights, seed)
    counts = np.zeros(sum(sizes), int)
    for number, epoch in enumerate(epochs(mixture, 6)):
        assert len(epoch) == mixture.start(number + 1) - mixture.start(number)
        np.add.at(counts, epoch, 1)
        start = 0
        for size, weight in zip(sizes, weights, strict=True):
            own = counts[start : start + size]
            assert own.max() - own.min() <= 1
            assert abs(own.sum() - (number + 1) * weight * size) < 1 + 1e-9
            start += size


@given(sizes_and_weights, st.integers(0, 200))
def test_epoch_of_a_position(sources, position):
    mixture = Mixture(*sources)
    epoch = mixture.epoch_of(position)
    assert mixture.start(epoch) <= position < mixture.start(epoch + 1)


def test_order_depends_on_seed_and_epoch_only():
    def order(seed):
        return epochs(Mixture([50, 20], [1.0, 0.5], seed), 2)

    assert order(5) == order(5)
    assert order(5) != order(6)
    assert order(5)[0] != order(5)[1]
    # Where the second source's examples stand differs too.
    first, second = epochs(Mixture([50, 20], seed=5), 2)
    assert [example >= 50 for example in first] != [example >= 50 for example in second]
    # The sources are mixed: both halves of an epoch hold examples of the second.
    assert any(example >= 50 for example in first[:30])
    assert any(example >= 50 for example in first[30:])


def test_order_is_the_same_on_every_machine():
    """Written down once: another order would change what a resumed run sees."""
    assert Mixture([5, 3], [1.0, 1.0], seed=42).epoch(0).tolist() == [7, 2, 3, 4, 6, 5, 0, 1]


def test_permutations_are_uniform():
    """Each of the 6 orders of 3 examples about equally often: chi-squared with 5 degrees, 99.9% below 20.5."""
    counts = Counter(tuple(Mixture([3], seed=seed).epoch(0).tolist()) for seed in range(600))
    assert len(counts) == 6
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 20.5


def test_without_shuffling():
    mixture = Mixture([3, 2], [1.0, 2.0], shuffle=False)
    assert epochs(mixture, 2) == [[0, 1, 2, 3, 4, 3, 4]] * 2


def test_parts_of_epochs():
    mixture = Mixture([10], seed=0)
    assert [mixture.num_examples(count) for count in (1, 2, 0.25, 2.5, 0.1)] == [10, 20, 2, 25, 1]
    assert Mixture([5], [0.5]).num_examples(2) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([],), "at least one example"),
        (([3, 0],), "at least one example"),
        (([3], [1.0, 2.0]), "2 numbers for 1 files"),
        (([3], [0.0]), "positive"),
        (([3], [-1.0]), "positive"),
        (([3], [float("nan")]), "positive"),
        (([3], [float("inf")]), "positive"),
        (([3], [], -1), "seed"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mixture(*arguments)
