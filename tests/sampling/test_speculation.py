import pytest
import torch

from tests.sampling.test_sampler import PROMPTS, tiny
from umedtrain.sampling import Sampler, SamplingParams
from umedtrain.sampling.speculation import look_up

SETTINGS = [
    SamplingParams(max_tokens=40, temperature=0),
    SamplingParams(max_tokens=40, temperature=0.3, seed=1, n=3),
    SamplingParams(max_tokens=40, temperature=1.0, top_p=0.8, top_k=9, seed=2, n=2, top_logprobs=3),
    SamplingParams(max_tokens=9, temperature=0.7, seed=3, repetition_penalty=1.2),
]


def other():
    model = tiny()
    model.init_weights(seed=5)
    return model


def flat(outputs):
    return [(o.tokens, o.logprobs, o.draw_logprobs, o.finish_reason, o.top_logprobs) for many in outputs for o in many]


@pytest.mark.parametrize("params", SETTINGS, ids=["greedy", "sharp", "truncated", "adjusted"])
@pytest.mark.parametrize("drafter", ["lookup", "itself", "another"])
@pytest.mark.parametrize("count", [1, 4])
def test_answers_are_the_same_as_without_guesses(params, drafter, count):
    model = tiny()
    draft = {"lookup": None, "itself": model, "another": other()}[drafter]
    plain = Sampler(model, eos_ids=(3,)).generate(PROMPTS, params)
    sampler = Sampler(model, eos_ids=(3,), draft=draft, draft_tokens=count)
    assert flat(sampler.generate(PROMPTS, params)) == flat(plain)
    # Again, on a warm cache.
    assert flat(sampler.generate(PROMPTS, params)) == flat(plain)
    assert sampler.engine.pool.in_use == 0


def test_a_model_that_guesses_for_itself_is_always_right():
    model = tiny()
    sampler = Sampler(model, eos_ids=(), draft=model, draft_tokens=4)
    sampler.generate([[1, 2, 3]], SamplingParams(max_tokens=41, temperature=1.0, seed=1))
    # The prompt draws one token; eight rounds confirm four and draw one more each.
    assert sampler.engine.confirmed_tokens == 32


def test_guesses_survive_a_cache_that_is_too_small_for_all():
    model, params = tiny(), SamplingParams(max_tokens=60, temperature=0.2, seed=4, n=3)
    plain = Sampler(model, eos_ids=()).generate(PROMPTS, params)
    config = model.config
    page_bytes = 16 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    sampler = Sampler(model, eos_ids=(), cache_bytes=14 * page_bytes, draft=other(), draft_tokens=3)
    assert flat(sampler.generate(PROMPTS, params)) == flat(plain)


def test_look_up_takes_the_latest_and_longest_match():
    assert look_up([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert look_up([5, 3, 7, 1, 2, 3, 8, 4, 2, 3], 2) == [8, 4]
    assert look_up([1, 7, 1, 8, 1], 1) == [8]
    assert look_up([1, 2, 3], 4) == []
    assert look_up([1], 4) == []


def test_draft_of_changed_weights():
    model, draft = tiny(), other()
    sampler = Sampler(model, eos_ids=(), draft=draft, draft_tokens=2)
    params = SamplingParams(max_tokens=12, temperature=0)
    sampler.generate(PROMPTS, params)
    with torch.no_grad():
        for parameter in (*model.parameters(), *draft.parameters()):
            parameter.mul_(1.1)
    assert flat(sampler.generate(PROMPTS, params)) == flat(Sampler(model, eos_ids=()).generate(PROMPTS, params))


def test_bad_drafts_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="draft_tokens must be at least 1"):
        Sampler(model, draft=tiny())
    with pytest.raises(ValueError, match="draft_tokens must be at least 0"):
        Sampler(model, draft_tokens=-1)
    with pytest.raises(ValueError, match="same tokenizer"):
        Sampler(model, draft=tiny(vocab_size=model.config.vocab_size + 1), draft_tokens=2)
