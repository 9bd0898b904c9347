"""Which pages of the key-value cache are in use, by how many sequences, and which hold a known beginning of a text.

A page holds the keys and values of `page_size` consecutive tokens, and these depend on all tokens before it. A full
page is known by a digest of everything up to its end, so any later text with the same beginning can share it. A page
that nobody uses any more keeps its contents until room is needed; then the one unused for longest goes.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

Digest = bytes


class PagePool:
    """Reference counts of pages 0..num_pages-1."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._users: dict[int, int] = {}
        self._fresh = 0  # pages from here on have never been used
        self._free: list[int] = []
        self._page_of: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known contents, no user; longest unused first

    @property
    def available(self) -> int:
        """Pages that can be taken now, if need be by forgetting what idle ones hold."""
        return self.num_pages - len(self._users)

    @property
    def in_use(self) -> int:
        """Pages that some sequence holds."""
        return len(self._users)

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one user each; None if there are not so many."""
        if count > self.available:
            return None
        pages = [self._take_one() for _ in range(count)]
        self._users.update(dict.fromkeys(pages, 1))
        return pages

    def _take_one(self) -> int:
        if self._free:
            return self._free.pop()
        if self._fresh < self.num_pages:
            self._fresh += 1
            return self._fresh - 1
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Count one more user of each page."""
        for page in pages:
            self._users[page] = self._users.get(page, 0) + 1
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Count one user less of each page of a sequence, which are given from its beginning on."""
        # Last pages first: those are of use to the fewest other texts, and so the first to go.
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            del self._users[page]
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, digest: Digest) -> None:
        """Make a full page findable, unless another one with the same contents already is."""
        if page not in self._digest_of and digest not in self._page_of:
            self._digest_of[page], self._page_of[digest] = digest, page

    def find(self, digests: Sequence[Digest]) -> list[int]:
        """Pages of the longest known beginning, of which the caller becomes a user."""
        pages = []
        for digest in digests:
            if digest not in self._page_of:
                break
            pages.append(self._page_of[digest])
        self.share(pages)
        return pages

    def forget(self) -> None:
        """Make nothing findable: the contents of all pages have become worthless."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._digest_of.clear()


def prefix_digests(ids: Sequence[int], page_size: int) -> list[Digest]:
    """For each full page of a text, a digest of its tokens and all before them."""
    digests, last = [], b""
    data = np.asarray(ids, dtype="<i8").tobytes()
    for start in range(0, len(ids) // page_size * page_size, page_size):
        last = hashlib.blake2b(last + data[8 * start : 8 * (start + page_size)], digest_size=16).digest()
        digests.append(last)
    return digests
