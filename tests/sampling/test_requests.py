"""What can be asked, what is answered, and what is refused."""

import dataclasses
import math

import pytest
import torch

from tests.sampling.test_engine import PAGE_BYTES
from tests.sampling.test_sampler import PROMPTS, LetterTokenizer, tiny
from umedtrain.sampling import Sampler, SamplingParams
from umedtrain.sampling.params import Output

EOS = (3, 8, 50)


def sampler_of(**options):
    return Sampler(tiny(), LetterTokenizer(), **{"eos_ids": EOS} | options)


@pytest.mark.parametrize("least", [1, 5, 12])
def test_no_answer_ends_before_min_tokens(least):
    asked = SamplingParams(max_tokens=20, n=8, seed=1, stop_token_ids=(20, 21), min_tokens=least)
    answers = [answer for samples in sampler_of().generate(PROMPTS, asked) for answer in samples]
    for answer in answers:
        assert len(answer.tokens) > least
        assert not {*EOS, 20, 21} & set(answer.tokens[:-1])
    assert min(len(answer.tokens) for answer in answers) == least + 1


def test_stop_ids_outside_of_the_vocabulary_stop_nothing_else():
    """As a tokenizer's may be that is larger than the model."""
    asked = SamplingParams(max_tokens=20, n=8, seed=1, min_tokens=10, stop_token_ids=(97, 98, 99, 2**40))
    plain = dataclasses.replace(asked, stop_token_ids=())
    model = tiny()
    with torch.no_grad():
        model.norm.weight.zero_()  # every token is equally likely
    sampler = Sampler(model, eos_ids=(200,))
    assert sampler.generate(PROMPTS, asked) == Sampler(model, eos_ids=()).generate(PROMPTS, plain)


def test_top_logprobs_hold_the_drawn_tokens_own():
    asked = SamplingParams(max_tokens=20, n=3, seed=1, top_logprobs=20, logit_bias={4: 1.0})
    wide = dataclasses.replace(asked, top_logprobs=0)
    sampler, seen = sampler_of(), 0
    for answers, others in zip(sampler.generate(PROMPTS, asked), sampler.generate(PROMPTS, wide), strict=True):
        for answer, other in zip(answers, others, strict=True):
            assert (answer.tokens, answer.logprobs) == (other.tokens, other.logprobs)
            assert other.top_logprobs is None
            for token, logprob, top in zip(answer.tokens, answer.logprobs, answer.top_logprobs, strict=True):
                values = [value for _, value in top]
                assert len(top) == 20
                assert values == sorted(values, reverse=True)
                assert logprob == dict(top).get(token, logprob)
                assert token in dict(top) or logprob <= values[-1]
                seen += token in dict(top)
    assert seen > 20


def test_prompt_logprobs_with_likeliest_tokens():
    prompt = list(range(40))
    asked = SamplingParams(max_tokens=1, seed=1, prompt_logprobs=True, top_logprobs=20)
    (answer,) = sampler_of().generate([prompt], asked)[0]
    assert answer.prompt_logprobs[0] is None
    assert answer.prompt_top_logprobs[0] is None
    assert len(answer.prompt_logprobs) == len(answer.prompt_top_logprobs) == 40
    for token, logprob, top in zip(prompt[1:], answer.prompt_logprobs[1:], answer.prompt_top_logprobs[1:], strict=True):
        assert dict(top).get(token, logprob) == logprob


def test_prompts_that_give_their_pages_back_while_they_are_scored():
    """Three prompts in a cache for little more than one, in small chunks."""
    prompts = [[i] * 50 for i in (1, 2, 4)]
    asked = SamplingParams(max_tokens=12, seed=1, prompt_logprobs=True, top_logprobs=2, n=2, ignore_eos=True)
    wanted = sampler_of().generate(prompts, asked)
    sampler = sampler_of(cache_bytes=7 * PAGE_BYTES)
    sampler.engine.scheduler.chunk_tokens = 9
    assert sampler.generate(prompts, asked) == wanted
    assert sampler.engine.scheduler.preemptions > 0


def test_a_prompt_can_be_scored_without_an_answer():
    asked = SamplingParams(max_tokens=0, prompt_logprobs=True, n=2)
    answers = sampler_of().generate([[1, 2, 3], [5]], asked)
    assert [len(samples) for samples in answers] == [2, 2]
    first = answers[0][0]
    assert (first.tokens, first.text, first.logprobs, first.finish_reason) == ([], "", [], "length")
    assert len(first.prompt_logprobs) == 3
    assert answers[1][0].prompt_logprobs == [None]
    assert sampler_of().score([[1, 2, 3], [5]]) == [first.prompt_logprobs, [None]]


def test_the_best_of_several():
    everything = sampler_of().generate(PROMPTS, SamplingParams(max_tokens=12, seed=1, n=6))
    best = sampler_of().generate(PROMPTS, SamplingParams(max_tokens=12, seed=1, n=2, best_of=6))
    for answers, two in zip(everything, best, strict=True):
        ranked = sorted(answers, key=lambda answer: -sum(answer.logprobs) / len(answer.logprobs))
        assert two == ranked[:2]
    given = []

    def shortest(ids, outputs):
        given.append(ids)
        assert all(isinstance(output, Output) for output in outputs)
        return [-len(output.tokens) for output in outputs]

    short = sampler_of().generate(PROMPTS, SamplingParams(max_tokens=12, seed=1, n=2, best_of=6), scorer=shortest)
    for answers, two in zip(everything, short, strict=True):
        assert two == sorted(answers, key=lambda answer: len(answer.tokens))[:2]
    assert sorted(given) == sorted(PROMPTS)
    with pytest.raises(ValueError, match="scorer gave 1 numbers for 6 outputs"):
        sampler_of().generate([[1]], SamplingParams(max_tokens=2, seed=1, best_of=6), scorer=lambda ids, outputs: [0.0])


def test_biases_forbid_and_force():
    asked = SamplingParams(max_tokens=20, n=4, seed=1, ignore_eos=True)
    banned = dataclasses.replace(asked, logit_bias={i: -math.inf for i in range(50)})
    answers = sampler_of().generate(PROMPTS, banned)
    assert all(min(answer.tokens) >= 50 for samples in answers for answer in samples)
    forced = dataclasses.replace(asked, logit_bias={7: 1000.0})
    for answer in (answer for samples in sampler_of().generate(PROMPTS, forced) for answer in samples):
        assert set(answer.tokens) == {7}
        assert answer.draw_logprobs == [0.0] * 20
        assert all(logprob < 0 for logprob in answer.logprobs)


def test_a_request_that_forbids_every_token_is_an_error_that_says_so():
    asked = SamplingParams(max_tokens=4, seed=1, logit_bias={i: -math.inf for i in range(97)})
    with pytest.raises(ValueError, match=r"prompts\[0\], sample 0: .*logit_bias"):
        sampler_of().generate([[1]], asked)


# --- what is refused

WRONG = {
    "max_tokens": [-1, 0, 1.0, "5", None, True, math.nan],
    "temperature": [-1, math.nan, math.inf, "1", None, True],
    "top_p": [0, -0.1, 1.1, math.nan, "1", None],
    "top_k": [-1, 1.5, None, math.nan],
    "n": [0, -1, 1.5, None],
    "seed": [0.5, "1", math.nan],
    "min_p": [-0.1, 1.1, math.nan, None],
    "min_tokens": [-1, 0.5, 300, None],
    "repetition_penalty": [0, -1, math.nan, math.inf, None],
    "top_logprobs": [-1, 21, 1.5, None, True],
    "best_of": [0, 1.5, "2"],
    "stop_token_ids": [5, None, "ab", [1.5], [-1], [True], [None]],
    "stop": [5, None, [""], "", [5], [None]],
    "logit_bias": [5, None, [1, 2], {"a": 1}, {-1: 1.0}, {1: math.nan}, {1: math.inf}, {1: "2"}, {1: None}],
    "prompt_logprobs": [2, "yes", None],
    "ignore_eos": [2, "yes", None],
}


@pytest.mark.parametrize("field, value", [(name, value) for name, values in WRONG.items() for value in values], ids=str)
def test_a_wrong_value_is_an_error_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field} must"):
        SamplingParams(**{field: value})


def test_best_of_is_at_least_n():
    with pytest.raises(ValueError, match="best_of must be at least n=3, got 2"):
        SamplingParams(n=3, best_of=2)


def test_what_only_the_model_can_refuse():
    with pytest.raises(ValueError, match="logit_bias names token 97"):
        sampler_of().generate([[1]], SamplingParams(logit_bias={97: 1.0}))
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        Sampler(tiny()).generate([[1]], SamplingParams(stop="a"))


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(2**70)])
def test_any_integer_is_a_seed(seed):
    asked = SamplingParams(max_tokens=3, seed=seed)
    assert sampler_of().generate([[1]], asked) == sampler_of().generate([[1]], asked)


def test_a_stop_id_that_is_named_twice_is_one():
    assert SamplingParams(stop_token_ids=[5, 3, 5]).stop_token_ids == (5, 3)
