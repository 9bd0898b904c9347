"""Pairs of one prompt as one tree."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.makers import segment
from umedtrain.data.batch import collate
from umedtrain.data.example import Example
from umedtrain.data.ranking import merge_pairs
from umedtrain.losses import bradley_terry
from umedtrain.model.heads import RewardModel
from umedtrain.training.tasks import RewardTask


def pair(prompt, better, worse, line=0):
    segments = (segment(prompt, [0] * len(prompt)), segment(better, parent=0), segment(worse, parent=0))
    return Example(segments, "pairs.jsonl", line, pairs=((0, 1),))


def tokens(example):
    return [tuple(part.tokens.tolist()) for part in example.segments]


def test_pairs_of_one_prompt_become_one_tree_with_each_answer_once():
    a, b, c = [10, 2], [11, 12, 2], [13, 2]
    merged = merge_pairs(
        [pair([1, 5], a, b, 1), pair([1, 6], b, c, 2), pair([1, 5], a, c, 3), pair([1, 5], a, b, 4)], max_tokens=100
    )
    assert [tokens(example) for example in merged] == [
        [(1, 5), tuple(a), tuple(b), tuple(c)],
        [(1, 6), tuple(b), tuple(c)],
    ]
    assert [example.pairs for example in merged] == [((0, 1), (0, 2)), ((0, 1),)]
    assert [(example.source, example.line) for example in merged] == [("pairs.jsonl", 1), ("pairs.jsonl", 2)]


def test_margins_stay_with_their_pairs():
    a, b, c = [10, 2], [11, 12, 2], [13, 2]
    pairs = [pair([1, 5], a, b), pair([1, 5], c, b), pair([1, 5], a, b), pair([1, 5], a, c), pair([1, 5], c, b)]
    margins = (None, 1.0, 2.0, None, 3.0)
    known = [dataclasses.replace(one, margins=(margin,)) for one, margin in zip(pairs, margins, strict=True)]
    (merged,) = merge_pairs(known, max_tokens=100)
    assert dict(zip(merged.pairs, merged.margins, strict=True)) == {(0, 1): 2.0, (2, 1): 1.0, (0, 2): None}
    apart = [example.margins for example in merge_pairs(known, max_tokens=8)]
    assert apart == [(None,), (1.0,), (2.0,), (None,), (3.0,)]
    assert merge_pairs(pairs, max_tokens=100)[0].margins == ()


def test_answers_that_do_not_fit_together_are_shared_out():
    answers = [[20 + number, 7, 2] for number in range(6)]
    pairs = [pair([1, 5], answers[0], worse, line) for line, worse in enumerate(answers[1:])]
    merged = merge_pairs(pairs, max_tokens=2 + 9)
    assert [example.num_tokens for example in merged] == [11, 11, 8]
    assert [example.line for example in merged] == [0, 2, 4]
    assert [example.pairs for example in merged] == [((0, 1), (0, 2)), ((0, 1), (0, 2)), ((0, 1),)]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 4)).filter(lambda t: t[1] != t[2])),
    st.integers(9, 30),
)
def test_every_pair_is_there_once_and_no_example_is_too_long(triples, max_tokens):
    words = [[30 + number] * (1 + number % 3) + [2] for number in range(5)]
    merged = merge_pairs([pair([1, 40 + p], words[b], words[w]) for p, b, w in triples], max_tokens=max_tokens)
    assert all(example.num_tokens <= max_tokens for example in merged)
    found = []
    for example in merged:
        prompt, *answers = tokens(example)
        assert len(set(answers)) == len(answers)
        found += [(prompt[1] - 40, answers[b][0] - 30, answers[w][0] - 30) for b, w in example.pairs]
    # A pair is repeated only where its prompt's answers were shared out between its two occurrences.
    assert set(found) == set(triples)
    if max_tokens == 30:
        assert len(found) == len(set(triples))


def test_the_loss_of_a_tree_is_the_mean_over_its_pairs(tiny_config):
    model = RewardModel(tiny_config)
    model.init_weights(seed=1)
    random = np.random.default_rng(0)
    prompts = [[1, 5, 6], [1, 7]]
    answers = [[random.integers(10, 90, 4).tolist() for _ in range(count)] for count in (4, 2)]
    pairs = [
        pair(prompt, texts[0], worse) for prompt, texts in zip(prompts, answers, strict=True) for worse in texts[1:]
    ]
    alone = [collate([example]) for example in pairs]
    losses_P = torch.cat([bradley_terry(*model(batch.tokens_T, batch.layout).split(1)) for batch in alone])
    batch = collate(merge_pairs(pairs, max_tokens=100))
    assert (batch.num_examples, batch.num_pairs) == (2, 4)
    task = RewardTask()
    loss, sums = task(model, batch)
    torch.testing.assert_close(loss, losses_P[:3].mean() + losses_P[3], atol=1e-6, rtol=1e-6)
    assert task.count(batch) == 2
    ranked_P = (losses_P < torch.log(torch.tensor(2.0))).float()
    assert float(sums["accuracy"]) == pytest.approx(float(ranked_P[:3].mean() + ranked_P[3]))
