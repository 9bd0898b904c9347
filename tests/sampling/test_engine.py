"""The engine on a real model: the same bits whatever runs beside a request, and the trainer's numbers."""

import functools
import itertools
import random

import pytest
import torch

from tests.ranks import run_ranks
from tests.sampling.test_sampler import EOS, LetterTokenizer, tiny, trainer_logprobs
from umedtrain.kernels import cpu
from umedtrain.sampling import Sampler, SamplingParams
from umedtrain.sampling.engine import RequestError
from umedtrain.sampling.forward import CppDecoder, TorchDecoder
from umedtrain.sampling.requests import check_request

PAGE_BYTES = 2 * 2 * 2 * 8 * 16 * 4  # of tiny(): keys and values, layers, heads, head dimension, slots, fp32
KINDS = [
    SamplingParams(max_tokens=20, seed=1, n=3),
    SamplingParams(max_tokens=30, seed=2, temperature=0.7, top_p=0.9, repetition_penalty=1.3, n=2),
    SamplingParams(max_tokens=9, seed=3, temperature=0.0, top_logprobs=3),
    SamplingParams(max_tokens=25, seed=4, top_k=10, logit_bias={5: 2.0, 7: -3.0}, min_tokens=8, prompt_logprobs=True),
    SamplingParams(max_tokens=25, seed=5, min_p=0.05, stop=("a", "Zz", "0"), top_logprobs=7, prompt_logprobs=True, n=2),
    SamplingParams(max_tokens=12, seed=6, n=8, stop_token_ids=(20, 21, 22)),
    SamplingParams(max_tokens=0, prompt_logprobs=True, top_logprobs=2),
]


def requests(kind="C++"):
    """Prompts, some with a common beginning, and everything that can be asked; fewer for the slow layers."""
    numbers = random.Random(0)
    common = [numbers.randrange(97) for _ in range(35)]
    prompts = [[numbers.randrange(97) for _ in range(numbers.randrange(1, 34))] for _ in range(10)]
    prompts += [[*common[: numbers.randrange(10, 34)], numbers.randrange(97)] for _ in range(4)]
    params = [KINDS[i % len(KINDS)] for i in range(len(prompts))]
    return (prompts, params) if kind == "C++" else (prompts[3:12:2], params[3:12:2])


def sampler_of(model, *, chunk_tokens=2048, **options):
    sampler = Sampler(model, LetterTokenizer(), eos_ids=EOS, **options)
    sampler.engine.scheduler.chunk_tokens = chunk_tokens
    return sampler


@functools.cache
def alone(kind):
    """A model, and every request's outputs alone in a fresh sampler."""
    model = tiny()
    prompts_and_params = zip(*requests(kind), strict=True)
    return model, [sampler_of(model, **EXACT[kind]).generate([p], [asked])[0] for p, asked in prompts_and_params]


EXACT = {"C++": {}, "PyTorch": {"exact": True}}


@pytest.fixture(params=EXACT)
def exact(request, monkeypatch):
    """Which of the exact decoders, and the options to get it."""
    if request.param == "PyTorch":
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip("no C++ compiler")
    decoder = sampler_of(tiny(), **EXACT[request.param]).engine.decoder
    assert isinstance(decoder, TorchDecoder if request.param == "PyTorch" else CppDecoder)
    return request.param, EXACT[request.param]


BUDGETS = [
    {"max_rows": 3, "chunk_tokens": 7},
    {"cache_bytes": 5 * PAGE_BYTES, "chunk_tokens": 20},
    {"draft_tokens": 3},
    {"max_rows": 1},
    {"max_rows": 100},
    {"chunk_tokens": 1},
    {"cache_bytes": 9 * PAGE_BYTES},
]


@pytest.mark.parametrize(
    "exact, options",
    [*(("C++", options) for options in BUDGETS), *(("PyTorch", options) for options in BUDGETS[:3])],
    indirect=["exact"],
    ids=str,
)
def test_outputs_have_the_same_bits_in_any_batch(exact, options):
    kind, own = exact
    prompts, params = requests(kind)
    model, wanted = alone(kind)
    sampler = sampler_of(model, **own, **options)
    order = random.Random(str(options)).sample(range(len(prompts)), len(prompts))
    for _ in range(2):  # the second time behind cached prefixes
        outputs = sampler.generate([prompts[i] for i in order], [params[i] for i in order])
        for index, got in zip(order, outputs, strict=True):
            assert got == wanted[index], f"prompts[{index}], {params[index]}"
        assert sampler.engine.pool.in_use == 0
    assert sampler.engine.scheduler.preemptions > 0 or options.get("cache_bytes", 2**30) > 5 * PAGE_BYTES


def test_the_number_of_samples_is_no_matter(exact):
    model, (_, own) = tiny(), exact
    one, many = (
        sampler_of(model, **own).generate([[5, 9, 60] * 7], SamplingParams(max_tokens=20, seed=3, n=n))[0]
        for n in (1, 8)
    )
    assert one == many[:1]


def test_a_prompt_that_is_scored_gets_the_logprobs_that_it_got_when_it_was_drawn(exact):
    kind, own = exact
    model, (prompts, _) = tiny(), requests(kind)
    asked = SamplingParams(max_tokens=25, seed=8, n=2, temperature=0.9)
    outputs = sampler_of(model, **own).generate(prompts, asked)
    texts = [(prompt, answer) for prompt, answers in zip(prompts, outputs, strict=True) for answer in answers]
    scores = sampler_of(model, **own, chunk_tokens=50).score([prompt + answer.tokens for prompt, answer in texts])
    for (prompt, answer), score in zip(texts, scores, strict=True):
        assert score[0] is None
        assert len(score) == len(prompt) + len(answer.tokens)
        assert score[len(prompt) :] == answer.logprobs
        wanted = trainer_logprobs(model, prompt[:1], prompt[1:] + answer.tokens)
        torch.testing.assert_close(torch.tensor(score[1:]), wanted, rtol=0, atol=1e-5)


def test_pytorch_without_the_exact_mode_is_near(monkeypatch):
    model = tiny()
    prompts, params = requests()
    wanted = sampler_of(model).generate(prompts, params)
    monkeypatch.setattr(cpu, "available", lambda: False)
    sampler = sampler_of(model, max_rows=5, chunk_tokens=30)
    assert isinstance(sampler.engine.decoder, TorchDecoder)
    for ours, theirs in zip(sampler.generate(prompts, params), wanted, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.tokens == other.tokens
            for name in ("logprobs", "draw_logprobs"):
                torch.testing.assert_close(
                    torch.tensor(getattr(one, name)), torch.tensor(getattr(other, name)), rtol=0, atol=1e-5
                )


def test_likeliest_tokens_are_the_lowest_ids_among_equals_whatever_else_is_asked():
    model = tiny()
    with torch.no_grad():
        model.embed_tokens.weight[40:80] = model.embed_tokens.weight[10]
    asked = [SamplingParams(max_tokens=6, seed=1, top_logprobs=count, ignore_eos=True) for count in (2, 5, 20)]
    prompts = [[10, 3], [10, 4], [10, 3]]
    outputs = Sampler(model).generate(prompts, asked)
    for prompt, params, (got,) in zip(prompts, asked, outputs, strict=True):
        assert got == Sampler(model).generate([prompt], params)[0][0]
        for place in got.top_logprobs:
            values = [value for _, value in place]
            assert values == sorted(values, reverse=True)
            ties = [i for i, value in place if value == values[0]]
            assert ties == sorted(ties)
    assert any(len({value for _, value in place}) < len(place) for place in outputs[2][0].top_logprobs), "no ties"


def on_a_rank(world, prompts, params):
    mine = range(world.rank, len(prompts), world.size)
    torch.manual_seed(world.rank)
    outputs = sampler_of(tiny()).generate([prompts[i] for i in mine], [params[i] for i in mine])
    return dict(zip(mine, outputs, strict=True))


def test_two_ranks_give_what_one_gives():
    prompts, params = requests()
    halves = run_ranks(2, on_a_rank, prompts, params)
    assert (halves[0] | halves[1]) == dict(enumerate(sampler_of(tiny()).generate(prompts, params)))


# --- weights


def scaled(model, factor=1.3):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def copied(model):
    other = tiny()
    other.load_state_dict(model.state_dict())
    return other


def test_an_update_between_calls_is_seen_and_its_cache_forgotten(exact):
    _, own = exact
    model, prompts = tiny(), [list(range(40)), list(range(33))]
    sampler, asked = sampler_of(model, **own), SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    first = sampler.generate(prompts, asked)
    assert sampler.generate(prompts, asked) == first
    scaled(model)
    second = sampler.generate(prompts, asked)
    assert second != first
    assert second == sampler_of(copied(model), **own).generate(prompts, asked)
    model.load_state_dict({name: x.clone() for name, x in tiny().state_dict().items()}, assign=True)
    assert sampler.generate(prompts, asked) == first


def submitted(sampler, ids, **params):
    request = check_request(ids, SamplingParams(**params), sampler.tokenizer, sampler.model.config)
    return sampler.engine.submit(request)


def test_an_update_while_requests_run_is_an_error_until_they_are_dropped():
    model = tiny()
    sampler = sampler_of(model)
    sequences = submitted(sampler, [1, 2, 3], max_tokens=30, seed=1, n=2, ignore_eos=True)
    sampler.engine.step(2)
    scaled(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="weights were written to while requests were running"):
            sampler.engine.step()
    sampler.engine.cancel(sequences)
    asked = SamplingParams(max_tokens=8, seed=1)
    assert sampler.generate([[4, 5]], asked) == sampler_of(copied(model)).generate([[4, 5]], asked)


def test_an_update_is_an_error_for_a_request_that_had_to_give_its_pages_back():
    """It holds no pages any more, but tokens of the old weights."""
    model = tiny()
    sampler = sampler_of(model, cache_bytes=4 * PAGE_BYTES)
    first = submitted(sampler, [1] * 30, max_tokens=19, seed=1, ignore_eos=True)[0]
    second = submitted(sampler, [2], max_tokens=40, seed=1, ignore_eos=True)[0]
    while not first.finished:
        sampler.engine.step(1)
    assert sampler.engine.scheduler.preemptions > 0
    assert not sampler.engine.scheduler.running
    assert second.generated
    scaled(model)
    with pytest.raises(RuntimeError, match="weights were written to"):
        sampler.engine.step()


def test_an_update_is_no_matter_to_a_request_that_has_not_begun():
    model = tiny()
    sampler = sampler_of(model)
    sequence = submitted(sampler, [1, 2, 3], max_tokens=5, seed=1)[0]
    scaled(model)
    while sampler.engine.busy:
        sampler.engine.step()
    fresh = sampler_of(copied(model)).generate([[1, 2, 3]], SamplingParams(max_tokens=5, seed=1))[0][0]
    assert (sequence.answer, sequence.logprobs) == (fresh.tokens, fresh.logprobs)


def test_a_model_made_in_inference_mode():
    """Its parameters have no version counters."""
    with torch.inference_mode():
        model = tiny()
    asked = SamplingParams(max_tokens=5, seed=1)
    assert sampler_of(model).generate([[1, 2]], asked) == sampler_of(tiny()).generate([[1, 2]], asked)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("library", [True, False])
def test_fewer_bits(monkeypatch, bits, library):
    if not library:
        monkeypatch.setattr(cpu, "available", lambda: False)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
    model = tiny(tied=False, **sizes)
    prompts = [list(range(20)), [5, 6, 7]]
    fp32, few = sampler_of(model), sampler_of(model, quantize=bits)

    def difference():
        pairs = zip(fp32.score(prompts), few.score(prompts), strict=True)
        return max((torch.tensor(a[1:]) - torch.tensor(b[1:])).abs().max().item() for a, b in pairs)

    near = {"int8": 0.3, "int4": 4.0}[bits]
    assert 0 < difference() < near
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    assert 0 < difference() < near, "the copies are those of the old weights"


# --- models that give no numbers


def poisoned_token(model, token):
    """Everything after this token is NaN."""
    with torch.no_grad():
        model.embed_tokens.weight[token] = torch.nan
    return model


def test_a_request_without_numbers_ends_alone():
    model = poisoned_token(tiny(tied=False), 11)
    sampler = sampler_of(model)
    good = submitted(sampler, [1, 2, 3], max_tokens=20, seed=1, logit_bias={11: -100.0}, ignore_eos=True)
    bad = [submitted(sampler, [1, 11], max_tokens=most, seed=1, n=3) for most in (1, 5)]
    ended = []
    while sampler.engine.busy:
        try:
            sampler.engine.step()
        except RequestError as error:
            ended.append(error.request)
    assert {one[0].request for one in bad} == set(ended)
    assert good[0].finished
    assert good[0].generated == 20
    assert sampler.engine.pool.in_use == 0


def test_scores_without_numbers_are_an_error():
    sampler = sampler_of(poisoned_token(tiny(tied=False), 11))
    with pytest.raises(ValueError, match=r"prompts\[1\].*not finite"):
        sampler.score([[1, 2], [1, 11, 2]])
    assert sampler.engine.pool.in_use == 0
    assert not sampler.engine.busy
    assert sampler.score([[1, 2]])[0][0] is None


def test_an_interrupted_call_leaves_nothing_behind(monkeypatch):
    sampler, calls = sampler_of(tiny()), itertools.count()
    wanted = sampler.generate(*requests())
    step = sampler.engine.step

    def interrupted(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(sampler.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(*requests())
    assert sampler.engine.pool.in_use == 0
    assert not sampler.engine.busy
    assert not sampler.engine._texts
    assert sampler.generate(*requests()) == wanted
