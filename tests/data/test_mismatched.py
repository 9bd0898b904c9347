"""Prompts with answers to other prompts."""

import numpy as np
import pytest

from tests.data.makers import segment
from umedtrain.data.example import Example
from umedtrain.data.loader import Loader
from umedtrain.data.mismatched import mismatched_loader


def example(number, *, answers=(2, 3), prompt=4):
    """Prompt and answers of tokens that tell whose they are."""
    texts = (segment([100 * number + place] * size, parent=0) for place, size in enumerate(answers, start=1))
    return Example((segment([100 * number] * prompt, [0] * prompt), *texts), "a.jsonl", number, pairs=((0, 1),))


def loader_of(examples, **options):
    return Loader([examples], **{"batch_size": 3, "max_tokens": 20, "seed": 1, **options})


def owners(found):
    """Whose prompt and whose answer each example is made of."""
    return [tuple(int(part.tokens[0]) // 100 for part in made.segments) for made in found.examples]


def test_every_prompt_gets_an_answer_to_another_one_to_be_learned_nowhere_in_pairs():
    loader = loader_of([example(number) for number in range(1, 9)])
    found = mismatched_loader(loader)
    assert sorted(prompt for prompt, _ in owners(found)) == list(range(1, 9))
    assert all(prompt != answer for prompt, answer in owners(found))
    assert len({int(made.segments[1].tokens[0]) % 100 for made in found.examples}) == 2, "chosen and rejected ones"
    for made in found.examples:
        assert made.pairs == ()
        assert made.segments[1].parent == 0
        assert made.num_targets == len(made.segments[1].tokens)
    assert (found.num_steps, found.batch_size) == (3, 3)
    assert owners(mismatched_loader(loader)) == owners(found)


def test_the_draw_is_the_same_on_every_rank_and_another_with_another_seed():
    examples = [example(number) for number in range(1, 30)]
    one, two, other = (
        mismatched_loader(loader_of(examples, **options))
        for options in ({"rank": 0, "num_ranks": 2}, {"rank": 1, "num_ranks": 2}, {"seed": 2})
    )
    assert owners(one) == owners(two) != owners(other)
    assert (two.rank, two.num_ranks) == (1, 2)
    steps = [set(part.numbers) for loader in (one, two) for part in loader.batch(0)]
    assert set.union(*steps) == set(one.step_examples(0))


def test_pairs_of_one_prompt_do_not_answer_each_other():
    examples = [example(1, answers=(1, 2)), example(1, answers=(3, 4)), example(2)]
    assert set(owners(mismatched_loader(loader_of(examples)))) <= {(1, 2), (2, 1)}
    with pytest.raises(ValueError, match=r"^dpo\.loss kto needs answers to other prompts"):
        mismatched_loader(loader_of(examples[:2]))


def test_a_prompt_without_an_answer_that_fits_is_left_out():
    examples = [example(1, prompt=18, answers=(1, 1)), example(2, answers=(8, 8)), example(3, answers=(8, 8))]
    found = mismatched_loader(loader_of(examples))
    assert sorted(prompt for prompt, _ in owners(found)) == [2, 3]
    assert max(made.num_tokens for made in found.examples) <= 20
    assert np.array_equal(found.examples[0].segments[0].tokens[:1] // 100, [found.examples[0].line])
