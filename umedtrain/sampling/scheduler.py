"""Who is computed next: admission by free pages, chunks of prompts, preemption. Knows nothing of tensors."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from umedtrain.sampling.pages import Digest, PagePool, prefix_digests
from umedtrain.sampling.requests import Request
from umedtrain.sampling.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The next `count` tokens of a sequence that are to be computed."""

    sequence: Sequence
    count: int


class Scheduler:
    """Sequences that wait and sequences that run.

    Running sequences hold the pages of all their computed tokens. When pages run out, the one admitted last gives all
    of its own back and waits again, at the front; what it has drawn stays drawn, and is computed again later. Whoever
    needs a page of a prompt that a running sequence is about to compute lets others pass until it is there.

    Args:
        pool: the cache's pages.
        max_rows: sequences that run at once.
        chunk_tokens: tokens of prompts in one pass.
    """

    def __init__(self, pool: PagePool, *, max_rows: int, chunk_tokens: int) -> None:
        self.pool, self.max_rows, self.chunk_tokens = pool, max_rows, chunk_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # in the order of their admission
        self._followers: dict[Request, list[Sequence]] = {}  # samples that wait for their first one's prompt
        self._authors: dict[Digest, Sequence] = {}  # running sequences that will publish a page
        self.preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that are not running."""
        return len(self.waiting) + sum(map(len, self._followers.values()))

    def add(self, request: Request) -> list[Sequence]:
        """Queue all samples of a request: the first one, which computes the prompt for the others."""
        digests = prefix_digests(request.ids, self.pool.page_size)
        first, *others = [Sequence(request, sample, digests) for sample in range(request.params.samples)]
        self.waiting.append(first)
        if others:
            self._followers[request] = others
        return [first, *others]

    def sequences_of(self, request: Request) -> list[Sequence]:
        """Those that have not finished."""
        others = self._followers.get(request, [])
        return [*(s for s in (*self.running, *self.waiting) if s.request is request), *others]

    def remove(self, sequence: Sequence) -> None:
        """Forget a running sequence that has finished, and take back its pages."""
        del self.running[sequence]
        self._give_back(sequence)
        if sequence.sample == 0:
            # Only where it has drawn nothing: a prompt that was merely scored.
            self.waiting.extendleft(reversed(self._followers.pop(sequence.request, [])))

    def discard(self, sequences: Collection[Sequence]) -> None:
        """Forget sequences, wherever they are, and take back their pages."""
        gone = set(sequences)
        for sequence in [s for s in self.running if s in gone]:
            del self.running[sequence]
            self._give_back(sequence)
        freed = {s.request for s in gone if s.sample == 0} & self._followers.keys()
        self.waiting.extendleft(s for request in freed for s in reversed(self._followers.pop(request)))
        self.waiting = deque(s for s in self.waiting if s not in gone)
        for request in {s.request for s in gone} & self._followers.keys():
            self._followers[request] = [s for s in self._followers[request] if s not in gone]

    def plan(self) -> list[Chunk]:
        """The next pass: one token of each sequence that decodes, then pieces of prompts. Pages are taken for it."""
        self._admit()
        chunks = [Chunk(s, 1) for s in list(self.running) if not s.in_prompt and self.make_room(s, 1)]
        chunks = [chunk for chunk in chunks if chunk.sequence in self.running]
        left = self.chunk_tokens
        for sequence in list(self.running):
            if left and sequence in self.running and sequence.in_prompt:
                count = min(left, sequence.pending)
                if self.make_room(sequence, count):
                    chunks.append(Chunk(sequence, count))
                    left -= count
        return [chunk for chunk in chunks if chunk.sequence in self.running]

    def make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Give a running sequence pages for its next tokens; False if it had to give up its own instead."""
        missing = -(-(sequence.computed + tokens) // self.pool.page_size) - len(sequence.pages)
        while missing > self.pool.available:
            victim = next(reversed(self.running))
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.pages += self.pool.take(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self._give_back(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        for digest in sequence.digests[sequence.published :]:
            if self._authors.get(digest) is sequence:
                del self._authors[digest]
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.published = [], 0, 0

    def _admit(self) -> None:
        """Let waiting sequences run, in order, while there are rows and pages for their prompts."""
        passed_over = []
        while self.waiting and len(self.running) < self.max_rows:
            sequence = self.waiting.popleft()
            if sequence.awaits in self._authors:
                passed_over.append(sequence)
            elif self._begin(sequence):
                self.running[sequence] = None
            else:
                passed_over.append(sequence)
                if sequence.awaits is None:
                    break
        self.waiting.extendleft(reversed(passed_over))

    def _begin(self, sequence: Sequence) -> bool:
        """Find the known beginning of its text; False if more of it will be known soon, or the rest does not fit."""
        size = self.pool.page_size
        # At least one token has to be computed: its hidden state is what the next one is drawn from.
        scored = sequence.request.params.prompt_logprobs and sequence.sample == 0
        reusable = sequence.digests[: 0 if scored else (len(sequence.tokens) - 1) // size]
        pages = self.pool.find(reusable)
        unknown = reusable[len(pages)] if len(pages) < len(reusable) else None
        sequence.awaits = unknown if unknown in self._authors else None
        if sequence.awaits is not None:
            self.pool.release(pages)
            return False
        needed = -(-(len(sequence.tokens) + 1) // size) - len(pages)
        # A page for each running row keeps a new sequence from being thrown out at once.
        if self.running and needed + len(self.running) > self.pool.available:
            self.pool.release(pages)
            return False
        sequence.pages, sequence.computed = pages, len(pages) * size
        sequence.published = len(pages)
        for digest in sequence.digests[len(pages) :]:
            self._authors.setdefault(digest, sequence)
        return True

    def publish(self, sequence: Sequence) -> None:
        """Make the prompt's pages that are complete by now findable."""
        complete = min(sequence.computed // self.pool.page_size, len(sequence.digests))
        for index in range(sequence.published, complete):
            digest = sequence.digests[index]
            self.pool.publish(sequence.pages[index], digest)
            if self._authors.get(digest) is sequence:
                del self._authors[digest]
        sequence.published = max(sequence.published, complete)

    def fork(self, leader: Sequence) -> list[tuple[Sequence, int | None, int | None]]:
        """The other samples of a prompt that has just been computed start from its pages, as far as there is room.

        Those for whom there is none wait at the front. Whole pages are shared; for a last one that is not full,
        (sequence, source page, own page) asks for a copy.
        """
        forks = []
        whole, rest = divmod(len(leader.request.ids), self.pool.page_size)
        others = deque(self._followers.pop(leader.request, ()))
        while others and len(self.running) < self.max_rows and len(self.running) + 2 <= self.pool.available:
            sequence = others.popleft()
            sequence.pages = leader.pages[:whole]
            self.pool.share(sequence.pages)
            own = self.pool.take(1)[0] if rest else None
            if rest:
                sequence.pages = [*sequence.pages, own]
            sequence.computed, sequence.published = len(leader.request.ids), whole
            self.running[sequence] = None
            forks.append((sequence, leader.pages[whole] if rest else None, own))
        self.waiting.extendleft(reversed(others))
        return forks
