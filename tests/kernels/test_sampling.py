"""`sample`: the twin's tokens, the exact distribution, and rows that do not see each other."""

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from tests.kernels.compare import assert_bitwise_equal, misaligned, poisoned, strided_rows
from umedtrain.kernels import sampling
from umedtrain.kernels.offline.sanitizer import watch
from umedtrain.kernels.sampling import sample


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 128)


def params(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0):
    """Arguments of `sample` for `rows` rows; each value one number or one per row."""
    given = {"temperature_B": temperature, "top_k_B": top_k, "top_p_B": top_p, "min_p_B": min_p}
    given |= {"seeds_B": seed, "positions_B": position}
    types = {"top_k_B": torch.int64, "seeds_B": torch.int64, "positions_B": torch.int64, "top_p_B": torch.float64}
    return {
        name: torch.as_tensor(value, dtype=types.get(name, torch.float32)).expand(rows).clone()
        for name, value in given.items()
    }


def mixed(rows):
    """Rows with every kind of truncation, some greedy, all with different keys."""
    kinds = itertools.cycle(
        [
            (1, 0, 1.0, 0),
            (0.7, 5, 1.0, 0),
            (0, 3, 0.5, 0.1),
            (1.3, 0, 0.9, 0),
            (1, 4, 0.6, 0),
            (2, 0, 1, 0.2),
            (1, 20, 0.8, 0.3),
        ]
    )
    temperature, top_k, top_p, min_p = (list(x) for x in zip(*itertools.islice(kinds, rows), strict=True))
    seed, position = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(0, 5000, (rows,))
    return params(rows, temperature, top_k, top_p, min_p, seed, position)


def kept_by_sorting(logits_V, temperature, top_k, top_p, min_p):
    """Ids and exact probabilities of what may be drawn, from the fixed-point weights' definition in Python integers."""
    weights = [
        math.floor(2**43 * w) for w in (((logits_V.double() - logits_V.max().double()) / temperature).exp()).tolist()
    ]
    order = sorted(range(len(weights)), key=lambda v: (-weights[v], v))[: top_k or None]
    limit, mass, kept = top_p * sum(weights[v] for v in order), 0, []
    for v in order:
        if mass >= limit and top_p < 1 and kept:
            break
        mass += weights[v]
        kept.append(v)
    kept = [v for v in kept if weights[v] >= min_p * weights[order[0]] and weights[v]]
    total = sum(weights[v] for v in kept)
    return {v: weights[v] / total for v in kept}


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(1, torch.float32), (3, torch.float16), (97, torch.bfloat16), (517, torch.float32)]
)
def test_kernel_and_twin_draw_the_same_tokens(vocab, dtype):
    logits_BV = (torch.randn(14, vocab) * 3).to(dtype)
    given = mixed(14)
    with poisoned():
        ours = sample(logits_BV, **given, impl="triton")
    twin = sample(logits_BV, **given, impl="torch")
    assert_bitwise_equal(ours.tokens_B, twin.tokens_B)
    torch.testing.assert_close(ours.logprobs_B, twin.logprobs_B, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.truncated_logprobs_B, twin.truncated_logprobs_B, rtol=1e-6, atol=1e-6)
    exact_B = logits_BV.double().log_softmax(-1).gather(1, ours.tokens_B[:, None])[:, 0]
    assert (ours.logprobs_B - exact_B).abs().max() <= 1e-6 * logits_BV.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", range(1, 7))
def test_probabilities_are_those_of_a_sorted_vocabulary(kind):
    """Tokens outside of the set never come, those inside with their probabilities, which are also what is reported."""
    rows, vocab = 2500, 12
    logits_V = torch.tensor([2.0, -1.0, 0.5, 2.0, 0.5, 0.5, -3.0, 1.0, 0.0, 0.5, -float("inf"), 1.5])
    one = {name: x_B[kind] for name, x_B in mixed(7).items()}
    if one["temperature_B"] == 0:
        one["temperature_B"] = torch.tensor(0.9)
    given = {name: x.expand(rows) for name, x in one.items()}
    given["positions_B"] = torch.arange(rows)
    drawn = sample(logits_V.expand(rows, vocab), **given, impl="torch")
    exact = kept_by_sorting(
        logits_V, *(one[name].item() for name in ("temperature_B", "top_k_B", "top_p_B", "min_p_B"))
    )
    counts = torch.bincount(drawn.tokens_B, minlength=vocab)
    assert set(counts.nonzero()[:, 0].tolist()) == set(exact)
    if len(exact) > 1:
        assert chisquare([counts[v].item() for v in exact], [p * rows for p in exact.values()]).pvalue > 1e-3
    reported = dict(zip(drawn.tokens_B.tolist(), drawn.truncated_logprobs_B.tolist(), strict=True))
    for token, logprob in reported.items():
        assert abs(logprob - math.log(exact[token])) < 1e-6 * 10
    few = {name: x_B[:4] for name, x_B in given.items()}
    assert sample(logits_V.expand(4, vocab), **few, impl="triton").tokens_B.tolist() == drawn.tokens_B[:4].tolist()


def test_draws_of_an_untruncated_row_follow_the_softmax():
    logits_V, rows = torch.randn(300), 40_000
    given = params(rows, temperature=1.5, seed=3) | {"positions_B": torch.arange(rows)}
    counts = torch.bincount(sample(logits_V.expand(rows, 300), **given, impl="torch").tokens_B, minlength=300)
    assert chisquare(counts, (logits_V.double() / 1.5).softmax(-1) * rows).pvalue > 1e-3


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_equally_likely_tokens_are_kept_by_lowest_id(impl):
    rows = 12
    logits_BV = torch.zeros(rows, 300)
    logits_BV[:, 150:] = -20.0
    given = params(rows, top_k=[3] * 6 + [0] * 6, top_p=[1.0] * 6 + [0.02] * 6) | {"positions_B": torch.arange(rows)}
    drawn = sample(logits_BV, **given, impl=impl)
    assert set(drawn.tokens_B.tolist()) == {0, 1, 2}
    assert torch.allclose(drawn.truncated_logprobs_B, torch.tensor(1 / 3).log())
    # Exactly half of the mass is reached by half of the tokens: the next one is out.
    given = params(rows, top_p=0.5) | {"positions_B": torch.arange(rows)}
    assert sample(torch.zeros(rows, 2), **given, impl=impl).tokens_B.tolist() == [0] * rows


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_greedy_takes_the_lowest_id_and_is_certain(impl):
    logits_BV = torch.full((4, 300), -2.0)
    logits_BV[:, [200, 140, 290]] = 3.0
    drawn = sample(logits_BV, **params(4, temperature=[0.0, -1.0, float("nan"), 0.0]), impl=impl)
    assert drawn.tokens_B.tolist() == [140] * 4
    assert drawn.truncated_logprobs_B.tolist() == [0.0] * 4
    assert sample(logits_BV, **params(4, temperature=[1e-3, 1e-30, 1e-45, 1e-10]), impl=impl).tokens_B.lt(300).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_row_does_not_see_its_batch(impl):
    logits_BV, given = torch.randn(6, 200), mixed(6)
    together = sample(logits_BV, **given, impl=impl)
    for row in (1, 4):
        alone = sample(logits_BV[row : row + 1], **{n: x_B[row : row + 1] for n, x_B in given.items()}, impl=impl)
        for ours, theirs in zip(alone, together, strict=True):
            assert_bitwise_equal(ours, theirs[row : row + 1])


def test_repeats_and_chunks_and_strides_and_offsets_do_not_change_tokens(monkeypatch):
    logits_BV, given = torch.randn(5, 259), mixed(5)
    first = sample(logits_BV, **given, impl="triton")
    for again in (logits_BV, misaligned(logits_BV), strided_rows(logits_BV), logits_BV.t().contiguous().t()):
        for ours, theirs in zip(sample(again, **given, impl="triton"), first, strict=True):
            assert_bitwise_equal(ours, theirs)
    monkeypatch.setattr(sampling, "CHUNK", 1024)
    other = sample(logits_BV, **given, impl="triton")
    assert_bitwise_equal(other.tokens_B, first.tokens_B)
    torch.testing.assert_close(other.logprobs_B, first.logprobs_B, rtol=1e-6, atol=1e-6)
    # Multiples of 2^-10 stay what they are beside 1e4.
    rounded_BV = (logits_BV * 1024).round() / 1024
    near, far = (sample(rounded_BV + offset, **given, impl="triton") for offset in (0.0, 1e4))
    for ours, theirs in zip(near, far, strict=True):
        assert_bitwise_equal(ours, theirs)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_logits_that_are_no_numbers_show_in_the_logprob(impl):
    logits_BV = torch.zeros(5, 130)
    logits_BV[0, 7], logits_BV[1, 7], logits_BV[2], logits_BV[3] = (
        float("nan"),
        float("inf"),
        -float("inf"),
        float("nan"),
    )
    logits_BV[4, 1:] = -float("inf")
    for given in (params(5), params(5, top_k=3, top_p=0.5, min_p=0.1), params(5, temperature=0.0)):
        drawn = sample(logits_BV, **given, impl=impl)
        assert ((drawn.tokens_B >= 0) & (drawn.tokens_B < 130)).all()
        assert drawn.logprobs_B.isnan().tolist() == [True] * 4 + [False]
        assert drawn.tokens_B[4] == 0
        assert drawn.logprobs_B[4] == 0


def test_parameters_beyond_their_range_keep_all_or_one():
    logits_BV, given = torch.randn(2, 50), params(2, seed=[1, 2])
    everything = sample(logits_BV, **given, impl="torch")
    loose = {
        "top_k_B": torch.tensor([-1, 50]),
        "top_p_B": torch.tensor([1.5, math.nan]),
        "min_p_B": torch.tensor([-1.0, math.nan]),
    }
    tight = {"top_p_B": torch.tensor([0.0, -1.0]), "min_p_B": torch.tensor([0.0, 7.0])}
    for impl in ("torch", "triton"):
        for ours, theirs in zip(sample(logits_BV, **given | loose, impl=impl), everything, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert_bitwise_equal(sample(logits_BV, **given | tight, impl=impl).tokens_B, logits_BV.argmax(-1))


def test_sanitizer_and_traffic():
    rows, vocab = 3, 1000
    logits_BV = torch.randn(rows, vocab)
    with watch() as watched:
        sample(logits_BV, **params(rows), impl="triton")
    statistics, weights, draw = watched.launches
    assert statistics.loaded == statistics.unique_loaded == 4 * rows * vocab
    assert weights.loaded < 1.2 * (4 * rows * vocab) + 1000
    assert draw.loaded < 4 * rows * (vocab / 4)
    with watch() as watched:
        sample(logits_BV, **params(rows, top_k=40, top_p=0.9), impl="triton")
    # 15 passes for each search, and the few around them, over 4 bytes a token.
    assert watched.launches[2].loaded < 36 * 4 * rows * 1024


def test_no_rows():
    for impl in ("triton", "torch"):
        drawn = sample(torch.empty(0, 5), **params(0), impl=impl)
        assert [x.shape for x in drawn] == [(0,)] * 3
        assert [x.dtype for x in drawn] == [torch.int64, torch.float32, torch.float32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_BV": torch.zeros(2, 3, 4)}, "logits_BV"),
        ({"logits_BV": torch.zeros(2, 5, dtype=torch.float64)}, "logits_BV"),
        ({"logits_BV": torch.zeros(2, 0)}, "logits_BV"),
        ({"logits_BV": torch.zeros(2, 5, requires_grad=True)}, "gradient"),
        ({"logits_BV": torch.empty(2, 2**19, device="meta")}, "524287"),
        ({"temperature_B": torch.ones(3)}, "temperature_B"),
        ({"top_k_B": torch.ones(2)}, "top_k_B"),
        ({"top_p_B": torch.ones(2, dtype=torch.bfloat16)}, "top_p_B"),
        ({"min_p_B": torch.ones(2, device="meta")}, "min_p_B"),
        ({"seeds_B": torch.ones(2, dtype=torch.int32)}, "seeds_B"),
        ({"positions_B": torch.ones(2, 1, dtype=torch.int64)}, "positions_B"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        sample(**{"logits_BV": torch.zeros(2, 5)} | params(2) | change)


def test_operator_and_compile():
    logits_BV, given = torch.randn(3, 20), mixed(3)
    for use_kernel in (False, True):
        torch.library.opcheck(torch.ops.umedtrain.sample.default, (logits_BV, *given.values(), use_kernel))
    for backend, impl in (("aot_eager", "triton"), ("inductor", "torch")):
        compiled = torch.compile(
            lambda impl=impl: sample(logits_BV, **given, impl=impl), backend=backend, fullgraph=True
        )
        assert_bitwise_equal(compiled().tokens_B, sample(logits_BV, **given, impl="torch").tokens_B)
