"""Dealing a step's examples out to ranks and micro-batches, by their lengths.

Nothing is padded and no example is split. Every rank gets the same number of micro-batches, because ranks
that shard a model run their forward passes together; the number is as small, and the tokens are as even, as
longest-first heuristics make them.
"""

import heapq
from collections.abc import Sequence

Bin = list[int]


def pack(lengths: Sequence[int], *, max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """Indices of examples, by rank and micro-batch: `pack(...)[rank][micro_batch]`.

    Every index appears once, no micro-batch holds more than `max_tokens` tokens, and all ranks have the same
    number of micro-batches, at least one. Micro-batches are ordered from full to empty, and those that run at
    the same time on different ranks are of similar size; empty ones, if any, come last. Within a micro-batch
    indices ascend. The result depends on the arguments only.

    Args:
        lengths: tokens of each example.
        max_tokens: tokens that one micro-batch may hold.
        num_ranks: how many ranks share the examples.

    Raises:
        ValueError: for an example longer than `max_tokens`.
    """
    if num_ranks < 1 or max_tokens < 1:
        raise ValueError(f"num_ranks and max_tokens must be at least 1, got {num_ranks} and {max_tokens}")
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise ValueError(
                f"example {index} has {length} tokens, more than a micro-batch's max_tokens = {max_tokens}"
            )
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    per_rank = max(1, -(-sum(lengths) // (max_tokens * num_ranks)))
    while True:
        num_bins = per_rank * num_ranks
        bins = _least_loaded(lengths, order, num_bins, max_tokens) or _first_fit(lengths, order, num_bins, max_tokens)
        if bins is not None:
            return _deal(lengths, bins, num_ranks)
        per_rank += 1


def _least_loaded(lengths: Sequence[int], order: Sequence[int], num_bins: int, max_tokens: int) -> list[Bin] | None:
    """Longest first into the emptiest bin: even bins. None when that does not fit."""
    bins: list[Bin] = [[] for _ in range(num_bins)]
    heap = [(0, number) for number in range(num_bins)]
    for index in order:
        load, number = heap[0]
        if load + lengths[index] > max_tokens:
            return None
        bins[number].append(index)
        heapq.heapreplace(heap, (load + lengths[index], number))
    return bins


def _first_fit(lengths: Sequence[int], order: Sequence[int], num_bins: int, max_tokens: int) -> list[Bin] | None:
    """Longest first into the first bin with room: few bins (at most 11/9 of the fewest + 6/9, Dosa 2007)."""
    bins: list[Bin] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for index in order:
        number = next((n for n, load in enumerate(loads) if load + lengths[index] <= max_tokens), None)
        if number is None:
            return None
        bins[number].append(index)
        loads[number] += lengths[index]
    return bins


def _deal(lengths: Sequence[int], bins: list[Bin], num_ranks: int) -> list[list[Bin]]:
    """Hand bins out in rounds of similar size, the fullest of a round to the rank with the fewest tokens."""
    load_of = [sum(lengths[index] for index in bin_) for bin_ in bins]
    fullest_first = sorted(range(len(bins)), key=lambda number: (-load_of[number], number))
    ranks: list[list[Bin]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for start in range(0, len(bins), num_ranks):
        emptiest_first = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        for number, rank in zip(fullest_first[start : start + num_ranks], emptiest_first, strict=True):
            ranks[rank].append(sorted(bins[number]))
            totals[rank] += load_of[number]
    return ranks
