"""The loader: a step's examples are a function of data, seed and step."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.makers import flat, pair, segment
from umedtrain.data.example import Example
from umedtrain.data.loader import Loader

# Each example is known by its first token: 100 apart, at most 60 tokens long.
SOURCES = [[flat(5 + (7 * i) % 50, 100 * i) for i in range(23)], [flat(20 + i, 100 * (23 + i)) for i in range(9)]]


def loader(sources=None, **options):
    return Loader(sources or SOURCES, **{"batch_size": 8, "max_tokens": 64, "seed": 3, **options})


def seen(batches):
    """The examples of some batches, by number, in order."""
    return [
        int(batch.tokens_T[start]) // 100 for batch in batches if batch.num_examples for start in batch.layout.starts
    ]


@settings(deadline=None, max_examples=30)
@given(
    batch_size=st.integers(1, 40),
    max_tokens=st.integers(60, 300),
    num_ranks=st.integers(1, 4),
    epochs=st.sampled_from([1.0, 2.0, 0.5, 1.3]),
    weights=st.sampled_from([(), (1.0, 2.0), (0.5, 1.0)]),
)
def test_same_examples_however_they_are_cut_up(batch_size, max_tokens, num_ranks, epochs, weights):
    options = {"batch_size": batch_size, "epochs": epochs, "weights": weights}
    whole = loader(max_tokens=10_000, **options)
    shares = [loader(max_tokens=max_tokens, rank=rank, num_ranks=num_ranks, **options) for rank in range(num_ranks)]
    total = Counter()
    for step in range(whole.num_steps):
        [batch] = whole.batch(step)
        micro_batches = [share.batch(step) for share in shares]
        assert len({len(batches) for batches in micro_batches}) == 1
        assert all(batch.num_tokens <= max_tokens for batches in micro_batches for batch in batches)
        together = sorted(example for batches in micro_batches for example in seen(batches))
        assert together == sorted(seen([batch])) == sorted(whole.step_examples(step))
        assert sum(batch.num_targets for batches in micro_batches for batch in batches) == batch.num_targets
        last = step == whole.num_steps - 1
        assert len(together) == batch_size or (last and 0 < len(together) < batch_size)
        total.update(together)
    # Nothing lost: the steps are the mixture's sequence, cut into pieces.
    stream = [int(example) for epoch in range(3) for example in whole.mixture.epoch(epoch)]
    assert total == Counter(stream[: whole.mixture.num_examples(epochs)])


def test_one_epoch_sees_every_example_once():
    one = loader()
    assert one.num_steps == 4
    assert sorted(example for step in range(4) for example in seen(one.batch(step))) == list(range(32))


def test_two_epochs_see_every_example_twice_and_a_step_may_span_both():
    two = loader(batch_size=7, epochs=2.0)
    assert two.num_steps == 10
    stream = [example for step in range(10) for example in two.step_examples(step)]
    assert stream == [*two.mixture.epoch(0), *two.mixture.epoch(1)]
    assert len(two.step_examples(9)) == 1


def test_any_step_can_be_asked_for_first():
    forward = loader(epochs=3.0, batch_size=5)
    in_order = [forward.step_examples(step) for step in range(forward.num_steps)]
    backward = loader(epochs=3.0, batch_size=5)
    assert [backward.step_examples(step) for step in reversed(range(forward.num_steps))] == in_order[::-1]
    first, again = forward.batch(4), backward.batch(4)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.tokens_T, other.tokens_T)


def test_more_epochs_or_fewer_steps_keep_the_beginning():
    long, short = loader(epochs=2.0), loader(max_steps=3)
    assert short.num_steps == 3
    assert [long.step_examples(step) for step in range(3)] == [short.step_examples(step) for step in range(3)]
    assert loader(max_steps=100).num_steps == 4


def test_without_shuffling_the_files_order_is_kept():
    plain = loader(shuffle=False, num_ranks=1, batch_size=4)
    assert [plain.step_examples(step) for step in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_pairs_stay_whole():
    share = loader([[pair(100 * i) for i in range(10)]], max_tokens=20, num_ranks=2, rank=1)
    for step in range(share.num_steps):
        for batch in share.batch(step):
            assert len(batch.layout.leaves) == 2 * batch.num_examples or not batch.num_examples
            assert batch.num_targets == 6 * batch.num_examples


def test_more_ranks_than_examples():
    batches = [loader([[flat(5)]], rank=rank, num_ranks=3).batch(0) for rank in range(3)]
    assert [[batch.num_examples for batch in share] for share in batches] == [[1], [0], [0]]


def test_step_out_of_range():
    with pytest.raises(IndexError):
        loader().batch(4)
    with pytest.raises(IndexError):
        loader().batch(-1)


def test_state_does_not_depend_on_ranks_budget_or_length_of_run():
    other = loader(rank=1, num_ranks=4, max_tokens=500, epochs=3.0)
    assert loader().state_dict() == other.state_dict()
    other.check_state(loader().state_dict())
    # Values that any format keeps as they are.
    assert {type(value) for value in other.state_dict().values()} <= {int, bool, str}


def changed_sources(change):
    sources = [list(source) for source in SOURCES]
    sources[0][3] = change(sources[0][3].segments[0])
    return sources


@pytest.mark.parametrize(
    "other, key",
    [
        ({"seed": 4}, "seed"),
        ({"batch_size": 4}, "batch_size"),
        ({"shuffle": False}, "shuffle"),
        ({"weights": (1.0, 0.5)}, "weights"),
        ({"sources": SOURCES[:1]}, "sizes"),
        ({"sources": [SOURCES[0], SOURCES[1][::-1]]}, "examples"),
        ({"sources": changed_sources(lambda s: Example((segment(s.tokens + 1, s.loss_mask),)))}, "examples"),
        ({"sources": changed_sources(lambda s: Example((segment(s.tokens, ~s.loss_mask),)))}, "examples"),
        ({"sources": changed_sources(lambda s: Example((segment(s.tokens[:2]), segment(s.tokens[2:]))))}, "examples"),
        ({"sources": changed_sources(lambda s: Example((s,), margins=(1.0,)))}, "examples"),
    ],
)
def test_resuming_on_other_data_is_refused(other, key):
    state = loader().state_dict()
    with pytest.raises(ValueError, match=f"{key} was .* and is "):
        loader(**other).check_state(state)


def test_state_without_a_key_is_refused():
    with pytest.raises(ValueError, match="seed was None"):
        loader().check_state({key: value for key, value in loader().state_dict().items() if key != "seed"})


def test_moved_files_are_the_same_data():
    moved = [[Example(example.segments, "elsewhere.jsonl", 1) for example in source] for source in SOURCES]
    loader(moved).check_state(loader().state_dict())


def test_example_over_the_micro_batch_is_named():
    with pytest.raises(
        ValueError, match=r"flat\.jsonl, line 201: the example has 90 tokens.*batch\.micro_batch_tokens"
    ):
        loader([[flat(5), flat(90, 200)]])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, r"batch\.examples"),
        ({"epochs": 0.0}, r"batch\.epochs"),
        ({"epochs": float("nan")}, r"batch\.epochs"),
        ({"epochs": float("inf")}, r"batch\.epochs"),
        ({"max_steps": -1}, r"batch\.max_steps"),
        ({"epochs": 0.001}, "not a single example"),
        ({"weights": (1.0,)}, r"data\.weights"),
        ({"sources": [[flat(3)], []]}, "at least one example"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        loader(**options)
