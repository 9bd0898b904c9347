"""The plan's tables, and what they promise: documents do not touch each other, not even in the last bit."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.attention_reference import random_inputs, run_packed, small_blocks, visible
from tests.kernels.compare import assert_bitwise_equal
from umedtrain.kernels.attention import attention_plan
from umedtrain.kernels.attention_plan import TILE

IMPLS = ("torch", "triton")
NAMES = ("out", "dq", "dk", "dv")
DOCUMENT = ((21, None), (18, 0), (5, 0))
OTHER = ((19, None), (3, 0))


def packed(*documents):
    """The segments of all documents, one document after the other."""
    segments = []
    for document in documents:
        first = len(segments)
        segments += [(length, None if parent is None else parent + first) for length, parent in document]
    return tuple(segments)


def tokens(document):
    return sum(length for length, _ in document)


def slices(offsets, ranges):
    bounds, pairs = offsets.tolist(), ranges.tolist()
    return [pairs[first:last] for first, last in itertools.pairwise(bounds)]


@st.composite
def trees(draw):
    lengths = draw(st.lists(st.integers(0, 300), max_size=8))
    return lengths, [draw(st.none() | st.integers(0, i - 1)) if i else None for i in range(len(lengths))]


@given(trees())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_plan_says_what_the_mask_says(tree):
    lengths, parents = tree
    plan = attention_plan(lengths, parents)
    mask_TT = visible(lengths, parents)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    assert plan.num_tokens == sum(lengths)
    contexts = slices(plan.context_offsets, plan.context_ranges_N2)
    readers = slices(plan.reader_offsets, plan.reader_ranges_N2)
    for s, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert contexts[s][-1] == readers[s][0] == [start, length]
        if not length:
            continue
        seen = sorted(row for first, rows in contexts[s] for row in range(first, first + rows))
        assert seen == mask_TT[start + length - 1].nonzero()[:, 0].tolist()
        seeing = sorted(row for first, rows in readers[s] for row in range(first, first + rows))
        assert seeing == mask_TT[:, start].nonzero()[:, 0].tolist()
    cuts = [(s, first) for s, length in enumerate(lengths) for first in range(0, length, TILE)]
    for tiles_I2 in (plan.query_tiles_I2, plan.key_tiles_I2):
        assert sorted(map(tuple, tiles_I2.tolist())) == cuts
        assert tiles_I2.dtype == torch.int32
    work = [
        int(mask_TT[starts[s] + min(first + TILE, lengths[s]) - 1].sum()) for s, first in plan.query_tiles_I2.tolist()
    ]
    assert work == sorted(work, reverse=True)
    work = [int(mask_TT[:, starts[s] + first].sum()) for s, first in plan.key_tiles_I2.tolist()]
    assert work == sorted(work, reverse=True)


def test_neighbouring_descendants_are_one_range():
    plan = attention_plan([10, 4, 6, 3, 5], [None, 0, 1, None, 0])
    assert slices(plan.reader_offsets, plan.reader_ranges_N2)[0] == [[0, 10], [10, 10], [23, 5]]


def test_lengths_alone_make_independent_segments():
    first, second = attention_plan([3, 0, 5]), attention_plan((3, 0, 5), [None] * 3)
    assert all(torch.equal(a, b) for a, b in zip(first.tables, second.tables, strict=True))


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    (
        ([3, -1], None, r"lengths\[1\] is -1; a segment must have 0 tokens or more"),
        ([3, 4], [None], "parents has 1 entries for 2 segments"),
        ([3, 4], [None, 1], r"parents\[1\] is 1; it must be None or the index of an earlier segment"),
        ([3, 4], [None, -1], r"parents\[1\] is -1"),
        ([2**31], None, "2147483648 tokens; a stream must have fewer"),
    ),
)
def test_a_wrong_layout_is_refused(lengths, parents, message):
    with pytest.raises(ValueError, match=message):
        attention_plan(lengths, parents)


@pytest.mark.parametrize("descriptors", (True, False))
@pytest.mark.parametrize("value", (float("nan"), 1e4))
def test_other_documents_leave_no_trace(value, descriptors):
    """Documents before and after are poisoned, gradients and all. Blocks of 16 reach over every edge between them."""
    segments = packed(OTHER, DOCUMENT, OTHER)
    mine = slice(tokens(OTHER), tokens(OTHER) + tokens(DOCUMENT))
    inputs = random_inputs(tokens(segments), dtype=torch.bfloat16)
    poison = [torch.full_like(x, value) for x in inputs]
    for x, clean in zip(poison, inputs, strict=True):
        x[mine] = clean[mine]
    for impl in IMPLS if descriptors else ("triton",):
        with small_blocks(descriptors=descriptors):
            clean, poisoned = run_packed(segments, inputs, impl), run_packed(segments, poison, impl)
        for name, first, second in zip(NAMES, clean, poisoned, strict=True):
            assert_bitwise_equal(first[mine], second[mine], f"{impl} {name}")
            assert first[mine].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_answer_leaves_no_trace_in_its_siblings(impl):
    inputs = random_inputs(tokens(DOCUMENT))
    answer = slice(21, 39)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[answer] = 3.0
    with small_blocks():
        first, second = run_packed(DOCUMENT, inputs, impl), run_packed(DOCUMENT, changed, impl)
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert_bitwise_equal(a[39:], b[39:], name)
    # The prompt's outputs and dq do not see its answers; its dk and dv add them up.
    for name, a, b in zip(NAMES[:2], first, second, strict=False):
        assert_bitwise_equal(a[:21], b[:21], name)


def test_packed_equals_separate_bit_for_bit():
    segments = packed(OTHER, DOCUMENT, OTHER)
    inputs = random_inputs(tokens(segments), dtype=torch.bfloat16)
    mine = slice(tokens(OTHER), tokens(OTHER) + tokens(DOCUMENT))
    with small_blocks():
        together = run_packed(segments, inputs, "triton")
        alone = run_packed(DOCUMENT, [x[mine].clone() for x in inputs], "triton")
    for name, a, b in zip(NAMES, together, alone, strict=True):
        assert_bitwise_equal(a[mine], b, name)


def test_equal_answers_get_equal_bits():
    """First or second child: the place in the stream does not matter."""
    q, k, v, do = random_inputs(21 + 18)
    answers = [torch.cat((x, x[21:])) for x in (q, k, v, do)]
    with small_blocks():
        results = run_packed(((21, None), (18, 0), (18, 0)), answers, "triton")
    for name, x in zip(NAMES, results, strict=True):
        assert_bitwise_equal(x[21:39], x[39:], name)


@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_bit_for_bit(impl):
    inputs = random_inputs(tokens(DOCUMENT), heads=4, kv_heads=2)
    with small_blocks():
        first = run_packed(DOCUMENT, inputs, impl)
        for name, a, b in zip(NAMES, first, run_packed(DOCUMENT, inputs, impl), strict=True):
            assert_bitwise_equal(a, b, name)
