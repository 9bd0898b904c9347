"""The pool of pages: counts, sharing, and what is forgotten first."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umedtrain.sampling.pages import PagePool, prefix_digests


def check(pool, held):
    """Every page is in exactly one place, and counted as often as it is held."""
    counts = Counter(page for pages in held for page in pages)
    assert dict(counts) == pool._users
    assert pool.in_use == len(counts)
    assert pool.available == pool.num_pages - len(counts)
    unused = [*pool._free, *pool._idle, *range(pool._fresh, pool.num_pages)]
    assert sorted([*counts, *unused]) == list(range(pool.num_pages))
    assert {page: digest for digest, page in pool._page_of.items()} == pool._digest_of
    assert pool._idle.keys() <= pool._digest_of.keys()
    assert not pool._digest_of.keys() & set(pool._free)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_page_is_lost_or_has_two_owners(data):
    """Texts over few pages come and go as the engine's do; a model of the pool says what must be found."""
    pool, held, texts = PagePool(data.draw(st.integers(1, 6)), 2), [], []
    contents = {}  # page -> digest of what was written there
    for _ in range(data.draw(st.integers(0, 25))):
        if held and data.draw(st.booleans()):
            index = data.draw(st.integers(0, len(held) - 1))
            pool.release(held.pop(index))
            texts.pop(index)
        elif data.draw(st.integers(0, 9)) == 0:
            pool.forget()
            contents.clear()
        else:
            ids = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=7))
            digests = prefix_digests(ids, 2)
            found = pool.find(digests)
            assert [contents[page] for page in found] == digests[: len(found)]
            taken = pool.take(-(-len(ids) // 2) - len(found))
            if taken is None:
                pool.release(found)
                check(pool, held)
                continue
            pages = found + taken
            for page in taken:
                contents.pop(page, None)
            for page, digest in list(zip(pages, digests, strict=False))[len(found) :]:
                pool.publish(page, digest)
                contents[page] = digest
            held.append(pages)
            texts.append(ids)
        check(pool, held)
    for pages in held:
        pool.release(pages)
    check(pool, [])


def publish_text(pool, ids):
    digests = prefix_digests(ids, pool.page_size)
    pages = pool.take(len(digests))
    for page, digest in zip(pages, digests, strict=True):
        pool.publish(page, digest)
    return pages


def test_the_longest_known_beginning_is_found():
    pool = PagePool(10, 2)
    long, other = publish_text(pool, [1, 2, 3, 4, 5, 6]), publish_text(pool, [1, 2, 9, 9])
    for ids, wanted in [
        ([1, 2, 3, 4, 5, 6, 7, 8], long),
        ([1, 2, 3, 4, 0, 6], long[:2]),
        ([1, 2, 9, 9, 5, 6], [long[0], other[1]]),
        ([1, 2, 3], long[:1]),
        ([2, 1, 3, 4], []),
        ([1], []),
    ]:
        # The first page of both texts is known by the one that was published first.
        assert pool.find(prefix_digests(ids, 2)) == wanted


def test_the_longest_unused_goes_first_and_a_texts_end_before_its_beginning():
    pool = PagePool(6, 2)
    first, second = publish_text(pool, [1] * 4), publish_text(pool, [2] * 8)
    pool.release(first)
    pool.release(second)
    assert pool.available == 6
    pool.release(pool.find(prefix_digests([1] * 4, 2)))  # used again: now the second text is older
    taken = pool.take(3)
    assert taken == second[:0:-1]
    assert pool.find(prefix_digests([2] * 8, 2)) == second[:1]
    assert pool.find(prefix_digests([1] * 4, 2)) == first
    assert pool.take(1) is None


def test_pages_without_known_contents_go_before_any_that_have():
    pool = PagePool(4, 2)
    known, unknown = publish_text(pool, [1, 1, 2, 2]), pool.take(1)
    pool.release(known)
    pool.release(unknown)
    assert pool.take(2) == [*unknown, 3]
    assert pool.find(prefix_digests([1, 1, 2, 2], 2)) == known


def test_nothing_is_taken_when_there_is_too_little():
    pool = PagePool(3, 2)
    assert pool.take(4) is None
    assert pool.available == 3
    assert pool.take(0) == []
    assert sorted(pool.take(3)) == [0, 1, 2]
    assert pool.take(1) is None


@pytest.mark.parametrize("change", [0, 1, 2, 7, 8])
def test_a_digest_stands_for_all_tokens_before(change):
    ids = list(range(100, 112))
    changed = [*ids[:change], 5, *ids[change + 1 :]]
    same = [a == b for a, b in zip(prefix_digests(ids, 3), prefix_digests(changed, 3), strict=True)]
    assert same == [page < change // 3 for page in range(4)]


def test_digests_are_of_full_pages_and_of_large_ids():
    assert len(prefix_digests([1] * 7, 4)) == 1
    assert prefix_digests([], 4) == []
    assert prefix_digests([2**33] * 4, 4) != prefix_digests([0] * 4, 4)
    assert prefix_digests([1] * 8, 4)[0] != prefix_digests([1] * 8, 4)[1]
