"""Which rows of a packed stream attention reads for which: worked out once per batch on the host, used by all layers.

A stream of T tokens is cut into S segments. Inside a segment attention is causal; a segment also sees its ancestors
(parent, parent's parent, ...) whole, before itself. The kernels need that as tables:

    context ranges   what the queries of a segment see: its ancestors, oldest first, and last the segment itself
    reader ranges    whose queries see the keys of a segment: the segment itself, then its descendants. Descendants that
                     stand side by side in the stream are one range, since each of their rows sees all of these keys
    query tiles      the pieces of `TILE` rows that segments are cut into, those with the most keys to visit first:
                     programs start in this order, so no long one is left for the end
    key tiles        the same pieces, those with the most queries to visit first

A range is (first row in the stream, rows). Tiles begin at their segment's first row wherever it stands in the stream,
and no piece of work spans two documents: what a segment's output and gradient add up, and in which order, does not
depend on its neighbours.

Shape suffixes: S segments, I tiles, N ranges.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

TILE = 128
"""Rows of a tile. Kernels with smaller blocks give a tile to several programs, so a plan fits every block size."""


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The tables of one packed stream; make one with `attention_plan`. All tensors are int32 on one device.

    Attributes:
        num_tokens: rows of the stream.
        context_offsets: [S + 1]; segment s sees context_ranges[context_offsets[s]:context_offsets[s + 1]].
        context_ranges_N2: (first row, rows).
        reader_offsets: [S + 1]; segment s is seen by reader_ranges[reader_offsets[s]:reader_offsets[s + 1]].
        reader_ranges_N2: (first row, rows).
        query_tiles_I2: (segment, first row counted from the segment's first), most keys first.
        key_tiles_I2: the same tiles, most queries first.
    """

    num_tokens: int
    context_offsets: torch.Tensor
    context_ranges_N2: torch.Tensor
    reader_offsets: torch.Tensor
    reader_ranges_N2: torch.Tensor
    query_tiles_I2: torch.Tensor
    key_tiles_I2: torch.Tensor

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """The six tables, in the order in which the operators take them."""
        return (
            self.context_offsets,
            self.context_ranges_N2,
            self.reader_offsets,
            self.reader_ranges_N2,
            self.query_tiles_I2,
            self.key_tiles_I2,
        )


def attention_plan(
    lengths: Sequence[int], parents: Sequence[int | None] | None = None, *, device: torch.device | str = "cpu"
) -> AttentionPlan:
    """The plan of a stream whose segments have `lengths`, in stream order, and `parents`.

    Args:
        lengths: tokens of each segment, 0 or more; the stream has their sum.
        parents: index of each segment's parent, an earlier segment, or None for a segment that sees only itself.
            None: no segment has a parent, which is what `cu_seqlens` says elsewhere (lengths are its differences).
        device: where the attention will run.

    Raises:
        ValueError: for a negative length, a parent that is not an earlier segment, or 2^31 tokens and more.
    """
    parents = [None] * len(lengths) if parents is None else list(parents)
    lengths = [int(length) for length in lengths]
    _check(lengths, parents)
    starts = [int(start) for start in np.cumsum([0, *lengths])[:-1]]
    ancestors: list[list[int]] = []
    descendants: list[list[int]] = [[] for _ in lengths]
    for segment, parent in enumerate(parents):
        ancestors.append([] if parent is None else [*ancestors[parent], parent])
        for ancestor in ancestors[segment]:
            descendants[ancestor].append(segment)
    own = list(zip(starts, lengths, strict=True))
    context = [[*(own[a] for a in ancestors[s]), own[s]] for s in range(len(lengths))]
    readers = [[own[s], *_merged([own[d] for d in descendants[s]])] for s in range(len(lengths))]
    keys_before = [sum(rows for _, rows in ranges[:-1]) for ranges in context]
    queries_after = [sum(rows for _, rows in ranges[1:]) for ranges in readers]
    tiles_I2 = _tiles(lengths)
    segment_I, first_I = tiles_I2[:, 0], tiles_I2[:, 1]
    length_I = np.array(lengths, dtype=np.int64)[segment_I]
    keys_I = np.array(keys_before, dtype=np.int64)[segment_I] + np.minimum(first_I + TILE, length_I)
    queries_I = np.array(queries_after, dtype=np.int64)[segment_I] + length_I - first_I
    arrays = (*_rows(context), *_rows(readers), _most_first(tiles_I2, keys_I), _most_first(tiles_I2, queries_I))
    return AttentionPlan(sum(lengths), *(torch.from_numpy(a.astype(np.int32)).to(device) for a in arrays))


def _check(lengths: list[int], parents: list[int | None]) -> None:
    if len(parents) != len(lengths):
        raise ValueError(f"parents has {len(parents)} entries for {len(lengths)} segments; it must have one for each")
    for segment, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        if length < 0:
            raise ValueError(f"lengths[{segment}] is {length}; a segment must have 0 tokens or more")
        if parent is not None and not 0 <= parent < segment:
            raise ValueError(f"parents[{segment}] is {parent}; it must be None or the index of an earlier segment")
    if sum(lengths) >= 2**31:
        raise ValueError(f"lengths add up to {sum(lengths)} tokens; a stream must have fewer than 2^31")


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in stream order, with those that touch made one."""
    merged: list[tuple[int, int]] = []
    for first, rows in ranges:
        if merged and sum(merged[-1]) == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + rows)
        else:
            merged.append((first, rows))
    return merged


def _rows(ranges: list[list[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray]:
    """A list of lists as offsets [S + 1] and the ranges [N, 2] one after the other."""
    offsets = np.cumsum([0, *(len(of_segment) for of_segment in ranges)])
    return offsets, np.array([r for of_segment in ranges for r in of_segment], dtype=np.int64).reshape(-1, 2)


def _tiles(lengths: list[int]) -> np.ndarray:
    """(segment, first row) of every piece of `TILE` rows, in stream order, int64 [I, 2]."""
    counts_S = -(-np.array(lengths, dtype=np.int64) // TILE)
    segment_I = np.repeat(np.arange(len(lengths)), counts_S)
    before_I = np.repeat(np.cumsum(counts_S) - counts_S, counts_S)
    return np.stack([segment_I, (np.arange(len(segment_I)) - before_I) * TILE], axis=1)


def _most_first(tiles_I2: np.ndarray, work_I: np.ndarray) -> np.ndarray:
    return tiles_I2[np.argsort(-work_I, kind="stable")]
