"""Who is computed when: nothing is lost, leaked or starved, whatever comes, goes, or runs out."""

import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sampling.hash_model import CONFIG, PAGE, hash_engine
from umedtrain.sampling.params import SamplingParams
from umedtrain.sampling.requests import Request, check_request

BASES = ([1] * 20, [2, 3] * 9, [*[1] * 8, *[4] * 9])


def request(ids, **params) -> Request:
    return check_request(ids, SamplingParams(seed=0, **params), None, CONFIG)


def pages_of(*requests):
    """The smallest cache that each of some requests fits alone."""
    return max(-(-(len(r.ids) + r.limit) // PAGE) for r in requests)


def finish(engine, most=None):
    """Run until nothing is left; every round must bring somebody forward."""
    rounds = 0
    while engine.busy:
        engine.step(most)
        rounds += 1
        assert rounds < 5000, "nothing moves any more"
    assert engine.pool.in_use == 0
    assert engine.pool.available == engine.pool.num_pages


def answers_alone(monkeypatch, asked):
    """What a request gives in an engine of its own."""
    engine = hash_engine(monkeypatch, 400)
    sequences = engine.submit(asked)
    finish(engine)
    return results(sequences)


def results(sequences):
    return [(s.answer, s.logprobs, s.draw_logprobs, s.prompt_logprobs) for s in sequences]


def check(engine):
    scheduler, pool = engine.scheduler, engine.pool
    assert len(scheduler.running) <= scheduler.max_rows
    held = Counter(page for s in scheduler.running for page in s.pages)
    assert dict(held) == pool._users
    for sequence in scheduler.running:
        assert not sequence.finished
        assert sequence.computed <= len(sequence.tokens)
        assert len(sequence.pages) >= -(-sequence.computed // PAGE)
    assert all(not s.pages and not s.computed for s in scheduler.waiting)
    assert len({id(s) for s in (*scheduler.running, *scheduler.waiting)}) == (
        len(scheduler.running) + len(scheduler.waiting)
    )


asked = st.builds(
    lambda base, cut, tail, max_tokens, n, scored: request(
        [*base[:cut], *tail], max_tokens=max_tokens, n=n, prompt_logprobs=scored
    ),
    st.sampled_from(BASES),
    st.integers(0, 20),
    st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=4),
    st.integers(1, 12),
    st.sampled_from([1, 1, 1, 2, 5]),
    st.sampled_from([False, False, True]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(asked, min_size=1, max_size=8),
    spare=st.sampled_from([0, 0, 1, 3, 30]),
    max_rows=st.sampled_from([1, 2, 3, 8]),
    chunk_tokens=st.sampled_from([1, 3, 7, 2048]),
    data=st.data(),
)
def test_everything_finishes_with_the_tokens_that_it_gets_alone(
    monkeypatch, requests, spare, max_rows, chunk_tokens, data
):
    """Requests come, are cancelled and run in any order, down to the smallest cache that each of them fits alone."""
    engine = hash_engine(
        monkeypatch, pages_of(*requests) + spare, max_rows=max_rows, chunk_tokens=chunk_tokens, eos_ids=(5, 6, 7)
    )
    submitted, cancelled, left = [], set(), list(requests)
    while left:
        kind = data.draw(st.sampled_from(["submit", "submit", "step", "step", "step", "cancel"]))
        if kind == "submit":
            one = left.pop()
            engine.check_fits(one)
            submitted.append((one, engine.submit(one)))
        elif kind == "step":
            engine.step(data.draw(st.sampled_from([None, 1, 2])))
        elif submitted:
            _, sequences = submitted[data.draw(st.integers(0, len(submitted) - 1))]
            some = data.draw(st.sampled_from([sequences, sequences[:1], sequences[1:]]))
            engine.cancel(some)
            cancelled.update(some)
        check(engine)
    finish(engine)
    alone = hash_engine(monkeypatch, 400, eos_ids=(5, 6, 7))
    for one, sequences in submitted:
        wanted = alone.submit(one)
        finish(alone)
        for got, want in zip(sequences, wanted, strict=True):
            if got in cancelled:
                continue
            assert got.finished
            assert results([got])[0][:3] == results([want])[0][:3]
            if got.sample == 0:
                assert got.prompt_logprobs == want.prompt_logprobs


def test_every_request_at_once_in_the_smallest_cache(monkeypatch):
    """Every page is fought for: preempted again and again, and still the same tokens."""
    requests = [request([*base, tail], max_tokens=20, n=3) for base in BASES for tail in (8, 9)]
    wanted = [answers_alone(monkeypatch, one) for one in requests]
    for spare in (0, 1, 5):
        engine = hash_engine(monkeypatch, pages_of(*requests) + spare)
        sequences = [engine.submit(one) for one in requests]
        finish(engine)
        assert [results(each) for each in sequences] == wanted
    assert engine.scheduler.preemptions > 0


@pytest.mark.parametrize("chunk_tokens", [2048, 5])
@pytest.mark.parametrize("length", [15, 16, 17])
def test_samples_compute_their_prompt_once(monkeypatch, length, chunk_tokens):
    engine = hash_engine(monkeypatch, 200, chunk_tokens=chunk_tokens)
    engine.submit(request(list(range(length)), max_tokens=1, n=8))
    finish(engine)
    assert sum(engine.decoder.streamed) == length


def test_samples_beyond_the_rows_compute_only_the_last_page(monkeypatch):
    engine = hash_engine(monkeypatch, 200, max_rows=2)
    engine.submit(request(list(range(14)), max_tokens=1, n=6))
    finish(engine)
    # Two start from the first one's pages; four come later, to three pages that are known and two tokens that are not.
    assert sum(engine.decoder.streamed) == 14 + 4 * 2


def test_a_later_request_computes_only_what_no_earlier_one_had(monkeypatch):
    engine = hash_engine(monkeypatch, 200)
    for ids, computed in [
        ([1] * 16 + [2], 17),
        ([1] * 16 + [3] * 4, 4),
        ([1] * 16 + [3] * 3, 3),
        ([1] * 16, 4),  # the last token's page is computed anew: its hidden state is wanted
        ([1] * 7 + [9], 4),
        ([9] + [1] * 7, 8),
    ]:
        engine.decoder.streamed.clear()
        engine.submit(request(ids, max_tokens=1))
        finish(engine)
        assert sum(engine.decoder.streamed) == computed, ids


@pytest.mark.parametrize("chunk_tokens", [2048, 16, 3])
def test_what_prompts_have_in_common_is_computed_once_though_they_come_together(monkeypatch, chunk_tokens):
    common = [1, 2, 3, 4] * 8
    requests = [request([*common, tail, 7], max_tokens=1) for tail in range(10)]
    wanted = [answers_alone(monkeypatch, one) for one in requests]
    engine = hash_engine(monkeypatch, 200, chunk_tokens=chunk_tokens, max_rows=16)
    sequences = [engine.submit(one) for one in requests]
    finish(engine)
    assert [results(each) for each in sequences] == wanted
    assert sum(engine.decoder.streamed) == 32 + 10 * 2


def test_the_one_that_others_wait_for_may_go(monkeypatch):
    """Cancelled while it computes what they have in common: the next one takes over."""
    common = [1, 2, 3, 4] * 8
    engine = hash_engine(monkeypatch, 200, chunk_tokens=5)
    first, second, third = (engine.submit(request([*common, tail], max_tokens=2, n=2)) for tail in range(3))
    engine.step()
    engine.cancel(first)
    engine.step()
    engine.cancel(second[:1])
    finish(engine)
    assert all(s.finished for s in (second[1], *third))
    assert not any(s.finished for s in (*first, second[0]))


def test_whoever_waits_longest_runs_next(monkeypatch):
    """Small requests that keep coming do not hold up a large one for ever."""
    engine = hash_engine(monkeypatch, 14, max_rows=8)
    running = [engine.submit(request([i] * 4, max_tokens=20))[0] for i in range(3)]
    engine.step(1)
    large = engine.submit(request([9] * 40, max_tokens=10))[0]
    for round_number in range(200):
        engine.submit(request([round_number % 20, 1], max_tokens=3))
        engine.step(1)
        if large.finished:
            break
    assert large.finished
    assert all(s.finished for s in running)
    finish(engine)


def test_a_request_larger_than_the_cache_is_refused_and_the_largest_is_not(monkeypatch):
    engine = hash_engine(monkeypatch, 5)
    with pytest.raises(ValueError, match="needs a cache for 12 tokens and 9 new ones"):
        engine.submit(request([1] * 12, max_tokens=9))
    assert not engine.busy
    sequence = engine.submit(request([1] * 12, max_tokens=8))[0]
    finish(engine)
    assert sequence.generated == 8


def test_cancelling_twice_or_after_the_end_does_nothing(monkeypatch):
    engine = hash_engine(monkeypatch, 50)
    first, second = (engine.submit(request([i] * 9, max_tokens=5, n=3)) for i in (1, 2))
    engine.step(1)
    engine.cancel(first[1:])
    engine.cancel(first[1:])
    finish(engine)
    engine.cancel(first + second)
    assert all(s.finished for s in (first[0], *second))
    assert engine.pool.in_use == 0


def test_thousands_of_requests_cost_no_more_each_than_a_few(monkeypatch):
    """Time of the scheduler alone; a list searched for each sequence would take minutes."""
    engine = hash_engine(monkeypatch, 60_000, max_rows=500)
    scheduler = engine.scheduler
    started = time.process_time()
    total = 0
    for index in range(4000):
        total += len(scheduler.add(request([index % 31, index // 31 % 31, 1], max_tokens=1, n=4)))
    while scheduler.running or scheduler.waiting:
        for chunk in scheduler.plan():
            sequence = chunk.sequence
            sequence.computed += chunk.count
            scheduler.publish(sequence)
            for one in [sequence, *(fork for fork, *_ in scheduler.fork(sequence))]:
                one.finished = True
                scheduler.remove(one)
                total -= 1
    assert total == 0
    assert time.process_time() - started < 8
