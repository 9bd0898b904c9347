"""Attention against dense attention in float64, over types, shapes, strides and blocks."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.attention_reference import TREE, dense, random_inputs, run, run_packed, small_blocks, visible
from tests.kernels.compare import DTYPES, assert_bitwise_equal, assert_two_references, misaligned, poisoned
from umedtrain.kernels import attention_torch
from umedtrain.kernels._dispatch import ARCHITECTURES, assume_architecture
from umedtrain.kernels.attention import attention, attention_plan
from umedtrain.kernels.offline.sanitizer import watch

IMPLS = ("torch", "triton")
NAMES = ("out", "dq", "dk", "dv")
TOKENS = sum(length for length, _ in TREE)
MASK = visible(*zip(*TREE, strict=True))


def assert_right(ours, inputs, mask, scale=None, fp32_relative=2e-6):
    """`ours` is out, dq, dk, dv. fp32: sums of up to T products of K terms each, so a little more than one rounding."""
    exact = run(lambda q, k, v: dense(q, k, v, mask, scale), *(x.double() for x in inputs))
    same = run(lambda q, k, v: dense(q, k, v, mask, scale), *inputs)
    for name, mine, reference, torchs in zip(NAMES, ours, exact, same, strict=True):
        assert_two_references(mine, reference, torchs, fp32_relative=fp32_relative, name=name)


@pytest.mark.parametrize("descriptors", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
def test_tree_of_segments(dtype, descriptors):
    inputs = random_inputs(TOKENS, dtype=dtype)
    with small_blocks(descriptors=descriptors), poisoned():
        assert_right(run_packed(TREE, inputs, "triton"), inputs, MASK)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tree_of_segments_in_torch(dtype):
    inputs = random_inputs(TOKENS, heads=4, kv_heads=2, dtype=dtype)
    with poisoned():
        ours = run_packed(TREE, inputs, "torch")
    assert_right(ours, inputs, MASK)
    with mock.patch.object(attention_torch, "SCORE_BYTES", 5000):
        for name, first, second in zip(NAMES, ours, run_packed(TREE, inputs, "torch"), strict=True):
            torch.testing.assert_close(first, second, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_of_every_architecture(architecture):
    """The checked-in configurations: a prompt longer than any block and an answer on the far side of a tile's edge."""
    segments = ((130, None), (40, 0))
    inputs = random_inputs(170, head_dim=64, dtype=torch.bfloat16)
    with assume_architecture(architecture):
        assert_right(run_packed(segments, inputs, "triton"), inputs, visible(*zip(*segments, strict=True)))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), ((4, 2, 24), (3, 1, 1), (2, 2, 128), (8, 1, 40), (1, 1, 256))
)
def test_heads_and_head_dimensions(heads, kv_heads, head_dim):
    segments = ((9, None), (8, 0))
    inputs = random_inputs(17, heads, kv_heads, head_dim)
    with small_blocks(16), poisoned():
        assert_right(run_packed(segments, inputs, "triton"), inputs, visible(*zip(*segments, strict=True)))


@st.composite
def trees(draw, most_tokens):
    lengths = draw(st.lists(st.integers(0, most_tokens), min_size=1, max_size=6))
    parents = [draw(st.none() | st.integers(0, i - 1)) if i else None for i in range(len(lengths))]
    return tuple(zip(lengths, parents, strict=True))


@given(trees(12), st.sampled_from(((1, 1), (6, 2))))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_trees_in_torch(segments, heads):
    inputs = random_inputs(sum(length for length, _ in segments), *heads, head_dim=3, dtype=torch.float64)
    exact = run(lambda q, k, v: dense(q, k, v, visible(*zip(*segments, strict=True))), *inputs)
    for mine, reference in zip(run_packed(segments, inputs, "torch"), exact, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@given(trees(40))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_random_trees(segments):
    inputs = random_inputs(sum(length for length, _ in segments))
    with small_blocks():
        assert_right(run_packed(segments, inputs, "triton"), inputs, visible(*zip(*segments, strict=True)))


def test_block_sizes_agree():
    inputs = random_inputs(TOKENS)
    with small_blocks():
        first = run_packed(TREE, inputs, "triton")
    for name, mine, other in zip(NAMES, first, run_packed(TREE, inputs, "triton"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("impl", IMPLS)
def test_slices_of_a_fused_projection(impl):
    """q, k and v as they leave one matrix product; the gradient of a sum is one number, expanded."""
    heads, kv_heads, head_dim = 2, 1, 16
    fused = torch.randn(50, heads + 2 * kv_heads, head_dim).bfloat16().requires_grad_()
    segments = ((30, None), (20, 0))
    plan = attention_plan(*zip(*segments, strict=True))
    with small_blocks():
        out = attention(*fused.split((heads, kv_heads, kv_heads), 1), plan, impl=impl)
        (grad,) = torch.autograd.grad(out.sum(), fused)
        parts = [x.detach().contiguous() for x in fused.split((heads, kv_heads, kv_heads), 1)]
        expected, *grads = run_packed(segments, (*parts, torch.ones_like(out)), impl)
    assert_bitwise_equal(out, expected)
    assert_bitwise_equal(grad, torch.cat(grads, 1))


def test_strides_and_alignment():
    """Heads outside tokens, storage off 16-byte boundaries, values of a head apart: what descriptors cannot read.

    With the same blocks, for sums over other blocks round otherwise.
    """
    q, k, v, do = random_inputs(40, kv_heads=2, dtype=torch.float16)
    with small_blocks():
        expected = run_packed(((40, None),), (q, k, v, do), "triton")

    def heads_first(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def apart(x):
        return torch.stack((x, torch.full_like(x, float("nan"))), -1)[..., 0]

    for change in (heads_first, misaligned, apart):
        with small_blocks():
            changed = run_packed(((40, None),), [change(x) for x in (q, k, v, do)], "triton")
        for name, mine, reference in zip(NAMES, changed, expected, strict=True):
            assert_bitwise_equal(mine, reference, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_that_sees_itself_only_copies_its_value(impl):
    q, k, v, do = random_inputs(3, dtype=torch.bfloat16)
    out, dq, dk, dv = run_packed(((1, None),) * 3, (q, k, v, do), impl)
    assert_bitwise_equal(out, v.expand_as(out))
    assert_bitwise_equal(dv, do.float().sum(1, keepdim=True).bfloat16())
    # p is 1 and D is dO . v, so ds is what is left of two equal sums.
    for grad in (dq, dk):
        assert grad.abs().max() < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_of_ten_thousand(impl):
    q, k, v, do = random_inputs(40)
    inputs = (q * 100, k * 100, v, do)
    with small_blocks():
        ours = run_packed(((24, None), (16, 0)), inputs, impl)
    # A score of 1e4 is known to 1e-3, its probability to as much, and the gradient is a difference of those.
    assert_right(ours, inputs, visible((24, 16), (None, 0)), fp32_relative=1e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_scale(impl):
    inputs = random_inputs(20)
    assert_right(run_packed(((20, None),), inputs, impl, 0.7), inputs, visible((20,), (None,)), 0.7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("segments", ((), ((0, None), (0, 0))))
def test_no_tokens(impl, segments):
    out, *grads = run_packed(segments, random_inputs(0), impl)
    assert out.shape == (0, 2, 16)
    assert [grad.shape for grad in grads] == [(0, 2, 16), (0, 1, 16), (0, 1, 16)]


def test_gradients_of_the_twin_are_those_of_its_output():
    plan = attention_plan([3, 2, 2], [None, 0, None])
    inputs = [x.requires_grad_() for x in random_inputs(7, head_dim=3, dtype=torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, plan), inputs)


def test_memory_accesses_and_traffic():
    """No race, no access out of bounds; every row is read exactly as often as the blocks say, and written once."""
    heads, head_dim = 2, 16
    inputs = random_inputs(160, heads, 1, head_dim)
    with small_blocks(query_rows=32, key_rows=16, edge_rows=16), watch() as watched:
        run_packed(((96, None), (64, 0)), inputs, "triton")
    forward, dq, dkdv = watched.launches
    names = ["_attention_forward_kernel", "_attention_dq_kernel", "_attention_dkdv_kernel"]
    assert [launch.name for launch in watched.launches] == names
    row, statistics = 4 * head_dim, 4 * heads * 160
    q_bytes, k_bytes = 160 * heads * row, 160 * row
    # Keys that blocks of 32 queries visit: the prompt's 32, 64, 96; the answer's 96 more than its own 32, 64.
    keys = 32 + 64 + 96 + (96 + 32) + (96 + 64)
    # Queries that blocks of 16 keys visit: the prompt's 96, 80, ... 16 and each time the answer's 64; the answer's own.
    queries = sum(range(16, 97, 16)) + 6 * 64 + sum(range(16, 65, 16))
    assert forward.dot_flops == 2 * (2 * heads * head_dim * 32 * keys)
    assert dq.dot_flops == 3 * (2 * heads * head_dim * 32 * keys)
    assert dkdv.dot_flops == 4 * (2 * heads * head_dim * 16 * queries)
    expected = (
        q_bytes + 2 * heads * keys * row,
        3 * q_bytes + statistics + 2 * heads * keys * row,
        2 * k_bytes + heads * queries * (2 * row + 8),
    )
    for launch, loaded in zip(watched.launches, expected, strict=True):
        # What is more than q, k, v, out, dO, lse and D are a few numbers of the plan for each program and range.
        assert loaded <= launch.loaded <= loaded + 100 * launch.programs, launch.name
        assert launch.loaded <= 6 * launch.unique_loaded, launch.name
    assert [launch.stored for launch in watched.launches] == [q_bytes + statistics, q_bytes + statistics, 2 * k_bytes]
    assert all(launch.stored == launch.unique_stored for launch in watched.launches)
