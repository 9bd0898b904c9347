"""Every sample is planned once, within both budgets."""

from hypothesis import given, settings
from hypothesis import strategies as st

from umedtrain.sampling.batches import Request, plan_batches
from umedtrain.sampling.params import SamplingParams

REQUESTS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(1, 40)), max_size=12)


@settings(max_examples=200, deadline=None)
@given(shapes=REQUESTS, max_rows=st.integers(1, 60), max_cache_tokens=st.integers(50, 800))
def test_every_sample_once_and_within_the_budgets(shapes, max_rows, max_cache_tokens):
    requests = [
        Request(index, [0] * length, SamplingParams(n=n, max_tokens=limit), 0, limit)
        for index, (length, limit, n) in enumerate(shapes)
    ]
    batches = plan_batches(requests, max_rows=max_rows, max_cache_tokens=max_cache_tokens)
    planned = [
        (piece.request.index, piece.first + i) for batch in batches for piece in batch for i in range(piece.count)
    ]
    assert sorted(planned) == [(index, j) for index, (_, _, n) in enumerate(shapes) for j in range(n)]
    for batch in batches:
        assert sum(piece.count for piece in batch) <= max_rows
        longest = max(len(piece.request.ids) for piece in batch)
        own = max(piece.count for piece in batch) * max(piece.request.limit for piece in batch)
        assert len(batch) * (longest + own) <= max_cache_tokens


def test_equal_requests_fill_the_batches():
    requests = [Request(index, [0] * 5, SamplingParams(n=4, max_tokens=3), 0, 3) for index in range(16)]
    assert [len(batch) for batch in plan_batches(requests, max_rows=16, max_cache_tokens=10_000)] == [4] * 4
    assert [len(batch) for batch in plan_batches(requests, max_rows=100, max_cache_tokens=17 * 8)] == [8] * 2
