"""Adjusted logits against transformers' own processors, and draws against the exact distribution."""

import math

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.sampling.test_sampler import tiny
from umedtrain.model.layout import Layout
from umedtrain.sampling import Sampler, SamplingParams
from umedtrain.sampling.drawing import Drawer, logprobs_of, top_logprobs
from umedtrain.sampling.requests import Request, request_key
from umedtrain.sampling.sequence import Sequence

PROMPT = [5, 9, 60, 5]
VOCABULARY = 97
ROWS = 4000


def next_logits(model, ids):
    with torch.no_grad():
        return model.logits(model(torch.tensor(ids), Layout.packed([len(ids)])))[-1]


def exact_distribution(logits_V, ids, params):
    """Temperature, top-k, top-p, min-p in this order, by transformers."""
    logits_V = logits_V.double()
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    logits_1V = steps(torch.tensor([ids]), logits_V[None].clone())
    for token, bias in params.logit_bias.items():
        logits_1V[0, token] += bias
    steps = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(torch.tensor([ids]), logits_1V)[0].softmax(-1)


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 12},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "temperature": 1.2, "min_p": 0.1},
    {"logit_bias": {5: 3.0, 6: -2.0, 7: -math.inf}, "top_p": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_exact_distribution_and_report_it(settings):
    model = tiny()
    params = SamplingParams(max_tokens=1, n=ROWS, seed=11, **settings)
    logits_V = next_logits(model, PROMPT)
    exact_V = exact_distribution(logits_V, PROMPT, params)
    answers = Sampler(model, eos_ids=(), max_rows=ROWS).generate([PROMPT], params)[0]
    counts_V = torch.bincount(torch.tensor([answer.tokens[0] for answer in answers]), minlength=VOCABULARY)
    assert not counts_V[exact_V == 0].any()
    # Rare tokens together, for the test wants some 5 of each.
    common = exact_V * ROWS >= 5
    observed = [*counts_V[common].tolist(), counts_V[~common].sum().item()]
    wanted = [*(exact_V[common] * ROWS).tolist(), (exact_V[~common].sum() * ROWS).item()]
    if wanted[-1] < 1e-6:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 2
    assert chisquare(observed, [w * ROWS / sum(wanted) for w in wanted]).pvalue > 1e-3
    model_V = logits_V.double().log_softmax(-1)
    for answer in answers[:300]:
        token = answer.tokens[0]
        assert abs(answer.draw_logprobs[0] - exact_V[token].log().item()) < 1e-5
        assert abs(answer.logprobs[0] - model_V[token].item()) < 1e-5


@pytest.mark.parametrize("penalty", [1.4, 0.7])
def test_the_penalty_is_on_what_has_been_drawn_too(penalty):
    model = tiny()
    params = SamplingParams(max_tokens=12, seed=2, repetition_penalty=penalty, n=3)
    for answer in Sampler(model, eos_ids=()).generate([PROMPT], params)[0]:
        ids = list(PROMPT)
        for token, logprob in zip(answer.tokens, answer.draw_logprobs, strict=True):
            exact = exact_distribution(next_logits(model, ids), ids, params)[token].log().item()
            assert abs(logprob - exact) < 1e-5
            ids.append(token)


def test_greedy_draws_take_the_adjusted_best_and_report_zero():
    model = tiny()
    params = SamplingParams(max_tokens=12, temperature=0, repetition_penalty=1.5, logit_bias={3: 0.5})
    (answer,) = Sampler(model, eos_ids=()).generate([PROMPT], params)[0]
    ids = list(PROMPT)
    sharp = SamplingParams(repetition_penalty=1.5, logit_bias={3: 0.5})
    for token in answer.tokens:
        assert token == exact_distribution(next_logits(model, ids), ids, sharp).argmax()
        ids.append(token)
    assert answer.draw_logprobs == [0.0] * 12
    assert max(answer.logprobs) < 0


def drawer(kinds, vocabulary, only=None):
    """For one row of each kind, or for one of those alone."""
    sequences = []
    for row, params in enumerate(kinds):
        ids = [row % vocabulary]
        sequences.append(Sequence(Request(ids, params, request_key(0, ids), 9, "prompt"), 0, []))
    sequences = sequences if only is None else [sequences[only]]
    return Drawer(sequences, [(1,)] * len(sequences), vocabulary, 0, torch.device("cpu"))


def test_a_row_is_the_same_beside_rows_of_other_kinds():
    kinds = [SamplingParams(**settings) for settings in SETTINGS] + [SamplingParams(min_tokens=3)]
    logits_RV = torch.randn(len(kinds), 50) * 3
    together, alone = drawer(kinds, 50), [drawer(kinds, 50, only=row) for row in range(len(kinds))]
    for _ in range(4):
        drawn = together.draw(logits_RV)
        for row, one in enumerate(alone):
            own = one.draw(logits_RV[row : row + 1])
            for name in ("token_R", "logprob_R", "draw_logprob_R", "stopped_R"):
                assert getattr(own, name)[0] == getattr(drawn, name)[row], (name, kinds[row])
        logits_RV = logits_RV.roll(1, dims=-1)


def test_likeliest_tokens_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 1e4, 1e-30):
        logits_RV = (torch.randn(6, 300, generator=generator) * 4).round() * scale
        logits_RV[0, 7] = -0.0
        values, ids = top_logprobs(logits_RV, 20)
        order = torch.sort(logits_RV + 0.0, dim=-1, descending=True, stable=True).indices[:, :20]
        assert ids.equal(order)
        exact = logits_RV.double().log_softmax(-1).gather(1, order)
        torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=1e-5)
    assert top_logprobs(torch.zeros(2, 5), 20)[1].tolist() == [[0, 1, 2, 3, 4]] * 2


def test_logprobs_of_any_tokens():
    logits_RV = torch.randn(5, 1001) * 10
    ids_RW = torch.randint(1001, (5, 3))
    exact = logits_RV.double().log_softmax(-1).gather(1, ids_RW)
    torch.testing.assert_close(logprobs_of(logits_RV, ids_RW).double(), exact, rtol=0, atol=1e-5)
