"""The sampler through its public interface."""

import dataclasses
import random
from itertools import chain

import pytest
import torch

from umedtrain.losses.logprobs import token_logprobs
from umedtrain.model.config import LlamaConfig, RopeScaling
from umedtrain.model.heads import RewardModel
from umedtrain.model.layout import Layout
from umedtrain.model.llama import Llama
from umedtrain.sampling import Sampler, SamplingParams

EOS = (3, 8, 50)
PROMPTS = [[5, 9, 60], [1], list(range(10, 30)), [7, 7, 7, 7, 7], [5, 9, 61], list(range(40, 51))]


def tiny(*, kv_heads=2, tied=True, dtype=torch.float32, **overrides):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        initializer_range=0.15,
    )
    model = Llama(dataclasses.replace(config, **overrides))
    model.init_weights(seed=0)
    return model.to(dtype)


def trainer_logprobs(model, prompt, tokens):
    """As in training: one forward pass over the whole sequence."""
    ids = torch.tensor(prompt + tokens)
    hidden_TD = model(ids, Layout.packed([len(ids)]))
    return token_logprobs(hidden_TD[len(prompt) - 1 : -1], model.lm_head_weight, ids[len(prompt) :]).detach()


def tokens_of(outputs):
    return [[sample.tokens for sample in samples] for samples in outputs]


class LetterTokenizer:
    """One id per printable character; 0 begins, 3 ends."""

    bos_id, eos_ids, vocab_size, chat_template = 0, (3,), 97, "plain"

    def encode(self, text):
        return [ord(letter) - 28 for letter in text.replace("\n", " ")]

    def decode(self, ids, *, skip_special=False):
        return "".join(chr(i + 28) for i in ids)

    def special_id(self, name):
        return None


# --- log-probabilities


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}], ids=str)
def test_logprobs_are_the_trainers(kv_heads, tied, params):
    model = tiny(kv_heads=kv_heads, tied=tied, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16))
    outputs = Sampler(model, eos_ids=EOS).generate(PROMPTS, SamplingParams(max_tokens=30, n=5, seed=2, **params))
    lengths = set()
    for prompt, samples in zip(PROMPTS, outputs, strict=True):
        for sample in samples:
            assert len(sample.logprobs) == len(sample.tokens)
            wanted = trainer_logprobs(model, prompt, sample.tokens)
            torch.testing.assert_close(torch.tensor(sample.logprobs), wanted, atol=1e-5, rtol=0)
            lengths.add(len(sample.tokens))
    if params.get("temperature") != 0:
        assert len(lengths) > 2, "all samples end together: nothing was ever dropped from the batch"


def test_logprobs_in_bf16_are_as_near_as_bf16_allows():
    model = tiny(dtype=torch.bfloat16)
    outputs = Sampler(model, eos_ids=EOS).generate(PROMPTS, SamplingParams(max_tokens=30, n=5, seed=2))
    exact = tiny()
    exact.load_state_dict(model.state_dict())
    ours, theirs = [], []
    for prompt, samples in zip(PROMPTS, outputs, strict=True):
        for sample in samples:
            wanted = trainer_logprobs(exact, prompt, sample.tokens)
            ours.append(torch.tensor(sample.logprobs) - wanted)
            theirs.append(trainer_logprobs(model, prompt, sample.tokens) - wanted)
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    assert ours.abs().max() < 0.1
    # The whole-sequence pass in bf16 is itself that far from fp32.
    assert ours.square().mean() < 2 * theirs.square().mean()


# --- a request's tokens depend on nothing but the request


@pytest.fixture(scope="module")
def mixed():
    """A model, requests that differ in everything, and their tokens when each is sampled alone."""
    model = tiny()
    random_numbers = random.Random(0)
    prompts = [[random_numbers.randrange(97) for _ in range(random_numbers.randrange(1, 25))] for _ in range(20)]
    kinds = [
        SamplingParams(max_tokens=20, seed=1, n=3),
        SamplingParams(max_tokens=25, seed=2, temperature=0.7, top_p=0.9, n=6),
        SamplingParams(max_tokens=9, seed=3, temperature=0.0),
        SamplingParams(max_tokens=30, seed=4, temperature=1.3, top_k=10, n=2, stop_token_ids=(20, 21, 22)),
    ]
    params = [kinds[i % len(kinds)] for i in range(len(prompts))]
    alone = [
        tokens_of(Sampler(model, eos_ids=EOS).generate([prompt], asked))[0]
        for prompt, asked in zip(prompts, params, strict=True)
    ]
    return model, prompts, params, alone


@pytest.mark.parametrize("max_rows", [1, 7, 1024])
@pytest.mark.parametrize("cache_bytes", [2**30, 60 * 1024])
def test_tokens_do_not_depend_on_the_batch(mixed, max_rows, cache_bytes):
    model, prompts, params, alone = mixed
    sampler = Sampler(model, eos_ids=EOS, max_rows=max_rows, cache_bytes=cache_bytes)
    assert tokens_of(sampler.generate(prompts, params)) == alone


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tokens_do_not_depend_on_order_or_batch_mates(mixed, seed):
    model, prompts, params, alone = mixed
    chosen = random.Random(seed).sample(range(len(prompts)), 5 + seed)
    outputs = Sampler(model, eos_ids=EOS).generate([prompts[i] for i in chosen], [params[i] for i in chosen])
    assert tokens_of(outputs) == [alone[i] for i in chosen]


def test_sample_j_is_the_same_for_every_n():
    sampler = Sampler(tiny(), eos_ids=EOS)
    asked = SamplingParams(max_tokens=20, seed=5, n=16)
    many = tokens_of(sampler.generate(PROMPTS, asked))
    few = tokens_of(sampler.generate(PROMPTS, dataclasses.replace(asked, n=4)))
    assert [samples[:4] for samples in many] == few
    assert all(len({tuple(tokens) for tokens in samples}) > 12 for samples in many)


def test_seeds():
    sampler = Sampler(tiny(), eos_ids=())
    asked = SamplingParams(max_tokens=12, seed=1)
    first = tokens_of(sampler.generate([PROMPTS[0], PROMPTS[0]], asked))
    assert first[0] == first[1] == tokens_of(sampler.generate([PROMPTS[0]], asked))[0]
    assert first[0] != tokens_of(sampler.generate([PROMPTS[0]], dataclasses.replace(asked, seed=2)))[0]
    unseeded = dataclasses.replace(asked, seed=None)
    torch.manual_seed(0)
    fresh = tokens_of(sampler.generate([PROMPTS[0], PROMPTS[0]], unseeded))
    assert fresh[0] != fresh[1]
    assert fresh != tokens_of(sampler.generate([PROMPTS[0]] * 2, unseeded))
    torch.manual_seed(0)
    assert fresh == tokens_of(sampler.generate([PROMPTS[0], PROMPTS[0]], unseeded))


def test_a_seeded_call_leaves_the_default_generator_alone():
    sampler = Sampler(tiny(), eos_ids=())
    before = torch.get_rng_state()
    sampler.generate(PROMPTS, SamplingParams(max_tokens=3, seed=1))
    assert torch.get_rng_state().equal(before)


# --- where an answer ends


def test_answers_end_at_stop_tokens_or_at_the_limit():
    sampler = Sampler(tiny(), eos_ids=(8,))
    outputs = sampler.generate(PROMPTS, SamplingParams(max_tokens=25, n=8, seed=1, stop_token_ids=(3, 50)))
    reasons = set()
    for sample in (sample for samples in outputs for sample in samples):
        reasons.add(sample.finish_reason)
        assert not set(sample.tokens[:-1]) & set(EOS)
        assert (sample.tokens[-1] in EOS) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.tokens) == 25
        assert sample.text is None
    assert reasons == {"stop", "length"}


def test_a_stop_token_is_the_last_of_the_same_tokens():
    model, asked = tiny(), SamplingParams(max_tokens=25, n=8, seed=1)
    free = tokens_of(Sampler(model, eos_ids=()).generate(PROMPTS, asked))
    stopped = tokens_of(Sampler(model, eos_ids=EOS).generate(PROMPTS, asked))
    for whole, cut in zip(chain(*free), chain(*stopped), strict=True):
        ends = [i for i, token in enumerate(whole) if token in EOS]
        assert cut == (whole[: ends[0] + 1] if ends else whole)


def test_positions_limit_the_answer():
    outputs = Sampler(tiny(), eos_ids=()).generate([[1] * 60, [1] * 63, [1]], SamplingParams(max_tokens=9, seed=1))
    assert [len(samples[0].tokens) for samples in outputs] == [4, 1, 9]
    assert all(samples[0].finish_reason == "length" for samples in outputs)


def test_end_ids_come_from_checkpoint_and_tokenizer_unless_given():
    model = tiny()
    model.eos_ids = (8, 9)
    assert Sampler(model).eos_ids == (8, 9)
    assert Sampler(model, LetterTokenizer()).eos_ids == (3, 8, 9)
    assert Sampler(model, LetterTokenizer(), eos_ids=[5]).eos_ids == (5,)
    assert Sampler(tiny()).eos_ids == ()


# --- text


def test_strings_and_chats():
    sampler = Sampler(tiny(), LetterTokenizer())
    chat = [{"role": "user", "content": "Hi"}]
    asked = SamplingParams(max_tokens=30, n=6, seed=1)
    outputs = sampler.generate(["abc", chat, [4, 5]], asked)
    chat_ids = LetterTokenizer().encode("User:\nHi\n\nAssistant:\n")
    by_ids = sampler.generate([[0, 69, 70, 71], [0, *chat_ids], [4, 5]], asked)
    assert outputs == by_ids
    for sample in (sample for samples in outputs for sample in samples):
        shown = sample.tokens[:-1] if sample.finish_reason == "stop" else sample.tokens
        assert sample.text == LetterTokenizer().decode(shown)
    assert {sample.finish_reason for samples in outputs for sample in samples} == {"stop", "length"}


# --- the model


def test_weights_are_read_anew_at_each_call():
    model, asked = tiny(), SamplingParams(max_tokens=10, seed=1, n=2)
    sampler = Sampler(model, eos_ids=())
    sampler.generate(PROMPTS, asked)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    fresh = tiny()
    fresh.load_state_dict(model.state_dict())
    assert sampler.generate(PROMPTS, asked) == Sampler(fresh, eos_ids=()).generate(PROMPTS, asked)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = tiny().train(training)
    plain = Sampler(model, eos_ids=EOS).generate(PROMPTS, SamplingParams(max_tokens=5, seed=1))
    with torch.inference_mode():
        assert Sampler(model, eos_ids=EOS).generate(PROMPTS, SamplingParams(max_tokens=5, seed=1)) == plain
    assert all(module.training == training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    # Nothing made while sampling may stand in the way of training.
    model(torch.tensor([1, 2]), Layout.packed([2])).sum().backward()


def watched(monkeypatch, model, **options):
    """A sampler and the numbers of tokens and rows of its passes and projections, and whether these had a graph."""
    sampler, streamed, projected, graphs = Sampler(model, eos_ids=(), **options), [], [], []
    decoder = sampler.engine.decoder
    hidden, logits = decoder.hidden, decoder.logits
    monkeypatch.setattr(decoder, "hidden", lambda s: streamed.append(len(s.tokens_T)) or hidden(s))

    def project(rows):
        projected.append(len(rows))
        result = logits(rows)
        graphs.append(result.requires_grad)
        return result

    monkeypatch.setattr(decoder, "logits", project)
    return sampler, streamed, projected, graphs


def test_no_graph_is_built(monkeypatch):
    sampler, *_, graphs = watched(monkeypatch, tiny())
    sampler.generate(PROMPTS, SamplingParams(max_tokens=3, seed=1))
    assert graphs == [False] * 3


def test_only_the_prompts_last_rows_are_projected_and_prompts_run_once(monkeypatch):
    sampler, streamed, projected, _ = watched(monkeypatch, tiny())
    sampler.generate(PROMPTS, SamplingParams(max_tokens=4, seed=1, n=5))
    rows = 5 * len(PROMPTS)
    assert projected == [rows] * 4
    assert streamed == [sum(map(len, PROMPTS)), rows, rows, rows]


def test_progress_counts_samples():
    calls = []
    sampler = Sampler(tiny(), eos_ids=EOS, max_rows=4)
    sampler.generate(PROMPTS, SamplingParams(max_tokens=20, n=3, seed=1), progress=lambda *call: calls.append(call))
    done = [finished for finished, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == 18
    assert len(done) > 3
    assert {total for _, total in calls} == {18}


# --- mistakes


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("n", 0),
        ("n", True),
        ("seed", 1.5),
        ("stop_token_ids", (1, -2)),
        ("stop_token_ids", ("a",)),
    ],
)
def test_parameters_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"^{field} must"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], r"prompts\[1\] is empty"),
        ([1, 97], r"prompts\[1\] holds token id 97, outside the model's vocabulary of 97"),
        ([-1], r"prompts\[1\] holds token id -1"),
        ([1] * 64, r"prompts\[1\] has 64 tokens.*max_position_embeddings of 64"),
        ([1.5], r"prompts\[1\] must be"),
        ([[1], [2, 3]], r"prompts\[1\] must be"),
        (7, r"prompts\[1\] is 7"),
        ("text", r"prompts\[1\] is text"),
        ([{"role": "user", "content": "Hi"}], r"prompts\[1\] is text"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_sampled_from(prompt, message):
    with pytest.raises(ValueError, match=message):
        Sampler(tiny()).generate([[1], prompt], SamplingParams(max_tokens=2, seed=1))


def test_other_mistakes():
    model, asked = tiny(), SamplingParams(max_tokens=2, seed=1)
    with pytest.raises(ValueError, match="prompts must be a list"):
        Sampler(model, LetterTokenizer()).generate("abc", asked)
    with pytest.raises(ValueError, match=r"prompts\[0\]: .*role"):
        Sampler(model, LetterTokenizer()).generate([[{"role": "nobody", "content": ""}]], asked)
    with pytest.raises(ValueError, match="1 sampling parameters for 2 prompts"):
        Sampler(model).generate([[1], [2]], [asked])
    with pytest.raises(ValueError, match=r"prompts\[0\] needs a cache for 15 tokens and 2 new ones"):
        Sampler(model, cache_bytes=4096).generate([[1] * 15], asked)
    with pytest.raises(ValueError, match="cache_bytes=300 has no room for a page of 16 tokens"):
        Sampler(model, cache_bytes=300)
    with pytest.raises(ValueError, match="max_rows must be positive"):
        Sampler(model, max_rows=0)
    with pytest.raises(ValueError, match="model is a RewardModel"):
        Sampler(RewardModel(model.config))
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"prompts\[0\], sample 0: the model's logits are not finite"):
        Sampler(model).generate([[1]], asked)


def test_nothing_asked_nothing_answered():
    assert Sampler(tiny()).generate([], SamplingParams(seed=1)) == []


def test_a_model_that_changes_its_dtype_needs_a_new_sampler():
    model = tiny()
    sampler = Sampler(model, eos_ids=())
    sampler.generate(PROMPTS[:1], SamplingParams(max_tokens=2, temperature=0))
    model.bfloat16()
    with pytest.raises(RuntimeError, match=r"was torch.float32 on cpu .* is torch.bfloat16 on cpu now; make a new"):
        sampler.generate(PROMPTS[:1], SamplingParams(max_tokens=2, temperature=0))
    assert len(Sampler(model, eos_ids=()).generate(PROMPTS[:1], SamplingParams(max_tokens=2))[0][0].tokens) == 2
