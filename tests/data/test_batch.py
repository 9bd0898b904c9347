"""Batches: which row predicts which target."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.makers import flat, pair, segment
from umedtrain.data.batch import collate
from umedtrain.data.example import Example
from umedtrain.model.layout import Layout
from umedtrain.model.llama import Llama


def test_conversations_and_a_pair_by_hand():
    talk = Example((segment([10, 11, 12, 13], [1, 0, 1, 1]),))
    batch = collate([talk, pair(20), flat(2, 40)])
    assert batch.tokens_T.tolist() == [10, 11, 12, 13, *range(20, 29), 40, 41]
    assert batch.layout.lengths == (4, 3, 2, 4, 2)
    assert batch.layout.parents == (None, None, 1, 1, None)
    # Token 10 is learned but nothing stands before it. The prompt's last row, 6, predicts both answers' first tokens.
    assert batch.targets_N.tolist() == [12, 13, 23, 24, 25, 26, 27, 28, 41]
    assert batch.rows_N.tolist() == [1, 2, 6, 7, 6, 9, 10, 11, 13]
    assert batch.segment_of_N.tolist() == [0, 0, 2, 2, 3, 3, 3, 3, 4]
    assert (batch.num_examples, batch.num_tokens, batch.num_targets) == (3, 15, 9)
    for tensor in (batch.tokens_T, batch.rows_N, batch.targets_N, batch.segment_of_N):
        assert tensor.dtype == torch.int64


def test_answers_alternate_in_the_leaves():
    batch = collate([pair(0), pair(20), pair(40)])
    first_tokens = [int(batch.tokens_T[batch.layout.starts[leaf]]) for leaf in batch.layout.leaves]
    assert first_tokens == [3, 5, 23, 25, 43, 45]


def test_margins_follow_the_pairs_and_what_is_unknown_is_0():
    known = dataclasses.replace(pair(20), margins=(1.5,))
    segments = (*known.segments, segment([30], parent=0))
    tree = Example(segments, pairs=((0, 1), (2, 1), (0, 2)), margins=(2.0, None, -1.0))
    batch = collate([pair(0), known, tree])
    assert batch.margins_P.tolist() == [0.0, 1.5, 2.0, 0.0, -1.0]
    assert batch.margins_P.dtype == torch.float32
    assert collate([]).margins_P.shape == (0,)


def test_batch_without_examples_is_legal():
    batch = collate([])
    assert (batch.num_examples, batch.num_tokens, batch.num_targets) == (0, 0, 0)
    assert batch.layout.num_tokens == len(batch.tokens_T) == 1
    for tensor in (batch.rows_N, batch.targets_N, batch.segment_of_N):
        assert tensor.shape == (0,)
        assert tensor.dtype == torch.int64


def test_batch_without_targets_is_legal():
    batch = collate([Example((segment([1, 2], [1, 0]),))])
    assert (batch.num_examples, batch.num_tokens, batch.num_targets) == (1, 2, 0)


def test_to_moves_every_tensor():
    moved = collate([pair(0), flat(3)]).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8
    for tensor in (*tensors, moved.layout.positions_T):
        assert tensor.device.type == "meta"
    assert (moved.num_examples, moved.num_tokens, moved.num_targets) == (2, 12, 8)


@st.composite
def examples(draw):
    """Trees of up to four segments with random masks, every token of a kind of its own."""
    segments = []
    for number in range(draw(st.integers(1, 4))):
        parent = draw(st.one_of(st.none(), st.integers(0, number - 1))) if number else None
        mask = draw(st.lists(st.booleans(), min_size=1, max_size=4))
        tokens = draw(st.lists(st.integers(0, 99), min_size=len(mask), max_size=len(mask)))
        segments.append(segment(tokens, mask, parent))
    return Example(tuple(segments))


@given(st.lists(examples(), max_size=5))
def test_rows_and_targets_follow_the_definition(batch_examples):
    batch = collate(batch_examples)
    expected = []
    start_of_example = []
    stream = []
    segment_number = 0
    for example in batch_examples:
        ends = {}
        start_of_example.append(len(stream))
        for number, part in enumerate(example.segments):
            for place, (token, learned) in enumerate(zip(part.tokens, part.loss_mask, strict=True)):
                row = len(stream) - 1 if place else ends.get(part.parent)
                if learned and row is not None:
                    expected.append((row, int(token), segment_number))
                stream.append(int(token))
            ends[number] = len(stream) - 1
            segment_number += 1
    found = zip(batch.rows_N.tolist(), batch.targets_N.tolist(), batch.segment_of_N.tolist(), strict=True)
    assert list(found) == expected
    assert batch.num_targets == sum(example.num_targets for example in batch_examples)
    assert batch.num_tokens == sum(example.num_tokens for example in batch_examples)
    if batch_examples:
        assert batch.tokens_T.tolist() == stream


@pytest.mark.parametrize("answer", [1, 2])
def test_logprobs_of_a_pair_equal_those_of_each_dialog_alone(tiny_config, answer):
    model = Llama(tiny_config)
    model.init_weights(seed=1)
    example = pair(30, prompt=4, chosen=3, rejected=5)
    batch = collate([flat(6, 1), example])

    def logprobs(tokens_T, layout, rows_N, targets_N):
        logits_NV = model.logits(model(tokens_T, layout)[rows_N])
        return logits_NV.log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]

    with torch.no_grad():
        packed = logprobs(batch.tokens_T, batch.layout, batch.rows_N, batch.targets_N)
        packed = packed[batch.segment_of_N == 1 + answer]
        prompt, reply = (torch.from_numpy(example.segments[i].tokens).long() for i in (0, answer))
        alone_T = torch.cat([prompt, reply])
        rows = torch.arange(len(prompt) - 1, len(alone_T) - 1)
        alone = logprobs(alone_T, Layout.packed([len(alone_T)]), rows, reply)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
