"""`paged_attention` against fp64 over gathered pages; a sequence must not feel its batch, its pages or the table."""

import importlib

import pytest
import torch

from tests.kernels.compare import assert_bitwise_equal, assert_two_references, misaligned, poisoned
from umedtrain.kernels.offline.sanitizer import watch
from umedtrain.kernels.paged_attention import paged_attention

# The package offers the function under the file's name.
module = importlib.import_module("umedtrain.kernels.paged_attention")


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch):
    monkeypatch.setattr(module, "SPLIT", 32)
    for table in ("TILES", "FP32_TILES"):
        monkeypatch.setattr(module, table, {"default": ((2**31, (16, 16, 4, 3)),)})


def problem(lengths, heads=4, kv_heads=2, head_dim=16, page=16, queries=None, dtype=torch.float32):
    """q, a cache of scattered pages with NaN in every slot that no sequence owns, table and lengths."""
    batch, width = len(lengths), max(1, -(-max(lengths, default=0) // page))
    shape = (batch, heads, head_dim) if queries is None else (batch, queries, heads, head_dim)
    q = torch.randn(shape).to(dtype)
    keys, values = torch.full((2, batch * width + 2, page, kv_heads, head_dim), float("nan"), dtype=dtype)
    table_BM = torch.randperm(len(keys))[: batch * width].view(batch, width)
    for sequence, length in enumerate(lengths):
        for position in range(length):
            place = table_BM[sequence, position // page], position % page
            keys[place], values[place] = torch.randn(2, kv_heads, head_dim).to(dtype)
        # Past the end the table may hold anything.
        table_BM[sequence, -(-length // page) :] = 2**30
    return q, keys, values, table_BM.int(), torch.tensor(lengths, dtype=torch.int32)


def reference(q, keys, values, table_BM, lengths_B, dtype, scale=None):
    """The formula, in `dtype`, with every head's own copy of keys and values."""
    q_BQHK = (q if q.ndim == 4 else q[:, None]).to(dtype)
    _, queries, heads, head_dim = q_BQHK.shape
    out = torch.zeros_like(q_BQHK)
    for sequence, length in enumerate(lengths_B.tolist()):
        pages = table_BM[sequence, : -(-length // keys.shape[1])].long()
        key, value = (
            x[pages].flatten(0, 1)[:length].to(dtype).repeat_interleave(heads // keys.shape[2], 1)
            for x in (keys, values)
        )
        for new in range(queries):
            seen = length - queries + new + 1
            if seen > 0:
                score = torch.einsum("hk,nhk->hn", q_BQHK[sequence, new], key[:seen]) * (scale or head_dim**-0.5)
                out[sequence, new] = torch.einsum("hn,nhk->hk", score.softmax(-1), value[:seen])
    return out.view(q.shape)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ({}, torch.float16),
        ({"heads": 6, "kv_heads": 2, "head_dim": 24, "page": 32}, torch.bfloat16),
        ({"heads": 3, "kv_heads": 3, "head_dim": 5, "page": 8}, torch.float32),
        ({"heads": 2, "queries": 3, "page": 64}, torch.bfloat16),
        ({"heads": 4, "queries": 5, "kv_heads": 1}, torch.float32),
    ],
)
def test_equals_the_formula(shape, dtype):
    given = problem([0, 1, 33, 77], dtype=dtype, **shape)
    exact, same_dtype = (reference(*given, x) for x in (torch.float64, dtype))
    with poisoned():
        ours = paged_attention(*given, impl="triton")
    assert_two_references(ours, exact, same_dtype)
    assert_two_references(paged_attention(*given, impl="torch"), exact, same_dtype)
    assert not ours[0].any()


def test_scale_and_extreme_scores():
    q, keys, values, table_BM, lengths_B = problem([70, 5])
    given = (q, keys * 1e4, values, table_BM, lengths_B)
    for scale in (1.0, 1e-5):
        ours = paged_attention(*given, scale=scale, impl="triton")
        assert_two_references(ours, reference(*given, torch.float64, scale), fp32_relative=1e-5 if scale < 1 else 1e-3)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("queries", [None, 3])
def test_a_sequence_does_not_see_its_batch_its_pages_or_the_table(impl, queries):
    q, keys, values, table_BM, lengths_B = problem([77, 40, 96], heads=2, queries=queries)
    together = paged_attention(q, keys, values, table_BM, lengths_B, impl=impl)
    alone = paged_attention(q[:1], keys, values, table_BM[:1, :5], lengths_B[:1], impl=impl)
    assert_bitwise_equal(alone, together[:1])
    wide_BM = torch.nn.functional.pad(table_BM, (0, 9), value=-7)
    assert_bitwise_equal(paged_attention(q, keys, values, wide_BM, lengths_B.long(), impl=impl), together)
    # The same tokens in other pages of another size.
    flat = [x[table_BM[2, :6].long()].flatten(0, 1).unflatten(0, (3, 32))[[2, 0, 1]] for x in (keys, values)]
    moved = paged_attention(q[2:], *flat, torch.tensor([[1, 2, 0]]), lengths_B[2:], impl=impl)
    assert_bitwise_equal(moved, together[2:])


def test_sequences_share_pages():
    q, keys, values, table_BM, lengths_B = problem([64, 64, 64], heads=2)
    table_BM[1:, :3] = table_BM[0, :3]
    table_BM[2] = table_BM[1]
    q[2] = q[1]
    given = (q, keys, values, table_BM, lengths_B)
    ours = paged_attention(*given, impl="triton")
    assert_two_references(ours, reference(*given, torch.float64))
    assert_bitwise_equal(ours[1], ours[2])


def test_new_tokens_at_once_equal_one_after_another():
    q, keys, values, table_BM, lengths_B = problem([50, 33], heads=2, queries=3)
    at_once = paged_attention(q, keys, values, table_BM, lengths_B, impl="triton")
    for new in range(3):
        one = paged_attention(q[:, new], keys, values, table_BM, lengths_B - 2 + new, impl="triton")
        torch.testing.assert_close(at_once[:, new], one, rtol=1e-6, atol=1e-6)


def test_tokens_before_the_first_are_zero_and_too_long_is_nan():
    q, keys, values, table_BM, _ = problem([2, 16, 16], heads=2, queries=4)
    for impl in ("triton", "torch"):
        out = paged_attention(q, keys, values, table_BM, torch.tensor([2, -3, 17]), impl=impl)
        assert not out[0, :2].any()
        assert out[0, 2:].all()
        assert not out[1].any()
        assert out[2].isnan().all()


def test_repeats_and_tiles_and_strides(monkeypatch):
    q, keys, values, table_BM, lengths_B = problem([77], heads=2)
    first = paged_attention(q, keys, values, table_BM, lengths_B, impl="triton")
    layers = torch.stack((values, keys))
    spread = q.new_zeros(1, 2, 20)
    spread[..., :16] = q
    for again in (
        (q, keys, values),
        (misaligned(q), misaligned(keys), values),
        (spread[..., :16], layers[1], layers[0]),
        (q.transpose(1, 2).contiguous().transpose(1, 2), keys.transpose(1, 2).contiguous().transpose(1, 2), values),
    ):
        assert_bitwise_equal(paged_attention(*again, table_BM, lengths_B, impl="triton"), first)
    monkeypatch.setattr(module, "FP32_TILES", {"default": ((2**31, (32, 32, 4, 3)),)})
    other = paged_attention(q, keys, values, table_BM, lengths_B, impl="triton")
    monkeypatch.setattr(module, "SPLIT", 1024)
    whole = paged_attention(q, keys, values, table_BM, lengths_B, impl="triton")
    torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole, first, rtol=1e-6, atol=1e-6)


def test_sanitizer_and_traffic():
    lengths = [0, 77, 40]
    given = problem(lengths, heads=8, dtype=torch.bfloat16)
    with watch() as watched:
        paged_attention(*given, impl="triton")
    split, merge = watched.launches
    cache = sum(lengths) * 2 * 2 * 16 * 2
    assert cache <= split.unique_loaded <= 1.1 * cache + 2000
    # The table, 4 bytes a token and program, is what is read twice.
    assert split.loaded <= split.unique_loaded + 2 * 4 * sum(lengths) + 16 * 2 * 8 * 2 * 5
    assert split.dot_flops <= 2 * 2 * 16 * 16 * 2 * (80 + 48)
    assert merge.loaded <= 1.2 * merge.unique_loaded + 200


def test_no_sequences_and_no_pages():
    for impl in ("triton", "torch"):
        q, keys, values, table_BM, lengths_B = problem([3])
        assert paged_attention(q[:0], keys, values, table_BM[:0], lengths_B[:0], impl=impl).shape == (0, 4, 16)
        out = paged_attention(q, keys[:0], values[:0], table_BM[:, :0], torch.tensor([0]), impl=impl)
        assert not out.any()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": torch.zeros(1, 4)}),
        ("q", {"q": torch.zeros(1, 4, 16, dtype=torch.float64)}),
        ("gradient", {"q": torch.zeros(1, 4, 16, requires_grad=True)}),
        ("key_pages_PSGK", {"keys": torch.zeros(3, 16, 2, 16, dtype=torch.bfloat16)}),
        ("key_pages_PSGK", {"keys": torch.zeros(3, 12, 2, 16)}),
        ("key_pages_PSGK", {"keys": torch.zeros(3, 16, 3, 16)}),
        ("key_pages_PSGK", {"keys": torch.zeros(3, 16, 2, 8)}),
        ("key_pages_PSGK", {"keys": torch.zeros(3, 16, 16, 2).mT}),
        ("value_pages_PSGK", {"values": torch.zeros(2, 16, 2, 16)}),
        ("value_pages_PSGK", {"values": torch.zeros(3, 16, 2, 16, device="meta")}),
        ("page_table_BM", {"table": torch.zeros(1, 1)}),
        ("page_table_BM", {"table": torch.zeros(2, 1, dtype=torch.int32)}),
        ("lengths_B", {"lengths": torch.zeros(1, 1, dtype=torch.int32)}),
        ("lengths_B", {"lengths": torch.zeros(1, dtype=torch.int32, device="meta")}),
    ],
)
def test_wrong_arguments_are_named(name, change):
    q, keys, values, table_BM, lengths_B = problem([40])
    given = {"q": q, "keys": keys, "values": values, "table": table_BM, "lengths": lengths_B} | change
    with pytest.raises(ValueError, match=name):
        paged_attention(*given.values())


def test_operator_and_compile():
    q, keys, values, table_BM, lengths_B = problem([20, 5], queries=2)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    given = (q, keys, values, table_BM, lengths_B)
    for use_kernel in (False, True):
        torch.library.opcheck(torch.ops.umedtrain.paged_attention.default, (*given, 0.25, use_kernel))
    for backend, impl in (("aot_eager", "triton"), ("inductor", "torch")):
        compiled = torch.compile(lambda impl=impl: paged_attention(*given, impl=impl), backend=backend, fullgraph=True)
        assert_bitwise_equal(compiled(), paged_attention(*given, impl=impl))
