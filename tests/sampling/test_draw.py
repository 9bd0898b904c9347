"""Random numbers against the published generator, draws against exact probabilities."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from umedtrain.sampling.draw import Policy, choose, derive_keys, request_key, uniforms
from umedtrain.sampling.params import SamplingParams

CPU = torch.device("cpu")


def exact_probabilities(logits_V, *, temperature=1.0, top_k=0, top_p=1.0):
    """The definition, by sorting, in numpy's fp64."""
    weights = np.exp((np.asarray(logits_V, dtype=np.float64) - max(logits_V)) / temperature)
    order = np.argsort(-weights, kind="stable")[: top_k or None]
    mass = np.cumsum(weights[order])
    kept = order[: 1 + int((mass < top_p * mass[-1]).sum())]
    probabilities = np.zeros_like(weights)
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


def draws(logits_V, count, **params):
    keys_R = derive_keys(torch.full((count,), 11), torch.arange(count))
    policy = Policy.of([SamplingParams(**params)] * count, len(logits_V), CPU)
    logits_RV = torch.tensor(logits_V, dtype=torch.float32).expand(count, -1)
    return choose(logits_RV, keys_R, policy).numpy()


@pytest.mark.parametrize(
    "seed, published",
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_keys_are_splitmix64(seed, published):
    outputs = derive_keys(torch.full((3,), seed), torch.arange(3))
    assert [value % 2**64 for value in outputs.tolist()] == published


def test_uniform_numbers_are_uniform_along_samples_and_positions():
    keys = derive_keys(torch.full((4000,), request_key(3, [1, 2])), torch.arange(4000))
    along_samples = uniforms(derive_keys(keys, 5), 0)
    along_positions = uniforms(derive_keys(keys[:1].expand(4000), torch.arange(4000)), 0)
    for numbers in (along_samples, along_positions):
        assert numbers.dtype == torch.float64
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert kstest(numbers.numpy(), "uniform").pvalue > 0.01
    next_attempt = uniforms(derive_keys(keys, 5), 1)
    for other in (along_positions, next_attempt):
        assert abs(np.corrcoef(along_samples, other)[0, 1]) < 0.05


@pytest.mark.parametrize("number, wanted", [(0.0, {3}), (1 - 2.0**-53, {144, 145})])
def test_draws_at_either_end_of_the_unit_interval(monkeypatch, number, wanted):
    logits = [-torch.inf] * 3 + [1.0, -80.0] + [0.3] * 140 + [-80.0, -torch.inf]
    monkeypatch.setattr(
        "umedtrain.sampling.draw.uniforms", lambda keys, _: torch.full_like(keys, number, dtype=torch.float64)
    )
    assert set(draws(logits, 1).tolist()) <= wanted


def test_request_key_depends_on_seed_and_every_id():
    keys = {request_key(*case) for case in [(1, [2, 3]), (2, [2, 3]), (1, [3, 2]), (1, [2, 3, 0]), (-1, [2, 3])]}
    assert len(keys) == 5
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert request_key(1, [2, 3]) == request_key(1, [2, 3])


@pytest.mark.parametrize("vocab_size", [5, 64, 100, 257])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.3},
        {"top_k": 3},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(vocab_size, params):
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)).mul(2).tolist()
    expected = exact_probabilities(logits, **params)
    count = 40_000
    observed = np.bincount(draws(logits, count, **params), minlength=vocab_size)
    assert observed[expected == 0].sum() == 0
    likely = expected * count >= 10
    observed_bins, expected_bins = list(observed[likely]), list(expected[likely] * count)
    rare = (expected > 0) & ~likely
    if rare.any():
        observed_bins.append(observed[rare].sum())
        expected_bins.append(expected[rare].sum() * count)
    if len(observed_bins) > 1:
        assert chisquare(observed_bins, expected_bins).pvalue > 1e-3


@pytest.mark.parametrize(
    "params, allowed",
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.5}, {1, 2}),
        ({"top_p": 0.51}, {1, 2, 4}),
        ({"top_k": 3, "top_p": 0.5}, {1, 2}),
        ({"top_k": 3, "top_p": 0.7}, {1, 2, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"top_k": 1}, {1}),
    ],
    ids=str,
)
def test_among_equals_the_lowest_ids_are_kept(params, allowed):
    logits = [-torch.inf, 0.0, 0.0, -torch.inf, 0.0, 0.0]
    assert set(draws(logits, 2000, **params).tolist()) == allowed


def test_greedy_takes_the_lowest_id_among_equals():
    assert draws([0.0, 3.0, 1.0, 3.0], 1, temperature=0.0).tolist() == [1]
    assert draws([0.0, 3.0, 1.0, 3.0], 1, temperature=1e-46).tolist() == [1]


def test_top_p_one_keeps_what_is_too_small_to_change_the_sum(monkeypatch):
    # The last number of the unit interval selects the last token, whose weight is lost in an fp32 sum.
    last = 1 - 2.0**-53
    monkeypatch.setattr(
        "umedtrain.sampling.draw.uniforms", lambda keys, _: torch.full_like(keys, last, dtype=torch.float64)
    )
    policy = Policy.of([SamplingParams(), SamplingParams(top_p=0.5)], 11, CPU)
    logits_RV = torch.tensor([[0.0] * 10 + [-25.0]] * 2)
    assert choose(logits_RV, torch.tensor([1, 2]), policy).tolist() == [10, 4]


def test_top_p_one_cuts_nothing():
    logits = [0.0] + [-12.0] * 99
    assert len(set(draws(logits, 60_000, top_p=1.0, top_k=99).tolist())) > 20


def test_rows_of_different_policies_do_not_touch_each_other():
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(60, 150, generator=generator) * 3
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, top_k=3),
        SamplingParams(temperature=0.7, top_p=0.8),
        SamplingParams(temperature=1.5, top_k=7),
        SamplingParams(temperature=0.9, top_k=60, top_p=0.5),
        SamplingParams(),
    ]
    params_R = [kinds[row % len(kinds)] for row in range(60)]
    keys_R = derive_keys(torch.full((60,), 5), torch.arange(60))
    together = choose(logits_RV, keys_R, Policy.of(params_R, 150, CPU))
    alone = [
        choose(logits_RV[row : row + 1], keys_R[row : row + 1], Policy.of([params_R[row]], 150, CPU)).item()
        for row in range(60)
    ]
    assert together.tolist() == alone
    greedy = [row for row in range(60) if params_R[row].temperature == 0]
    assert together[greedy].tolist() == logits_RV[greedy].argmax(-1).tolist()


@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}, {"temperature": 0.0}], ids=str)
@pytest.mark.timeout(20)
def test_logits_that_are_not_numbers_end(params):
    assert 0 <= draws([float("nan")] * 70, 1, **params)[0] < 70
