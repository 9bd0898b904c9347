"""Which tokens of a packed stream may see which.

A batch is one flat stream of T tokens cut into segments. Inside a segment attention is causal; a segment with a
parent also sees the whole parent (and, through it, the parent's own ancestors) before itself. A prompt with two
answers is three segments, the answers both children of the prompt, and the prompt is computed once.

Shape suffixes: T tokens of the stream.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch

Derived = TypeVar("Derived")


class Layout:
    """Segments of a packed stream and their parents.

    Build one with `Layout.packed` (no parents) or `Layout.tree`. Layouts are immutable; tensors derived from one
    are made on first use, on `device`.

    Attributes:
        lengths: tokens in each segment, in stream order; every length is at least 1.
        parents: index of each segment's parent, or None; a parent stands earlier in the stream.
        starts: position in the stream of each segment's first token.
        offsets: RoPE position of each segment's first token: the number of tokens that its ancestors hold.
    """

    def __init__(
        self, lengths: Sequence[int], parents: Sequence[int | None], *, device: torch.device | str = "cpu"
    ) -> None:
        self.lengths = tuple(int(length) for length in lengths)
        self.parents = tuple(parents)
        self.device = torch.device(device)
        self._derived: dict[Callable, Any] = {}
        if not self.lengths:
            raise ValueError("a layout needs at least one segment")
        starts, offsets, start = [], [], 0
        for segment, (length, parent) in enumerate(zip(self.lengths, self.parents, strict=True)):
            if length < 1:
                raise ValueError(f"segment {segment} has length {length}; every segment needs at least one token")
            if parent is not None and not 0 <= parent < segment:
                raise ValueError(f"segment {segment} has parent {parent}; a parent must be an earlier segment")
            starts.append(start)
            offsets.append(0 if parent is None else offsets[parent] + self.lengths[parent])
            start += length
        self.starts, self.offsets, self.num_tokens = tuple(starts), tuple(offsets), start

    @classmethod
    def packed(cls, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> "Layout":
        """Independent segments of the given lengths, one after the other."""
        return cls(lengths, [None] * len(lengths), device=device)

    @classmethod
    def tree(cls, segments: Sequence[tuple[int, int | None]], *, device: torch.device | str = "cpu") -> "Layout":
        """Segments given as (length, index of the parent segment or None)."""
        return cls([length for length, _ in segments], [parent for _, parent in segments], device=device)

    @property
    def num_segments(self) -> int:
        return len(self.lengths)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """The segments that are nobody's parent, in stream order."""
        with_children = set(self.parents)
        return tuple(segment for segment in range(self.num_segments) if segment not in with_children)

    @cached_property
    def context_ranges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each segment, the stream ranges [start, end) of its ancestors, oldest first."""
        ranges: list[tuple[tuple[int, int], ...]] = []
        for parent in self.parents:
            own = () if parent is None else ((self.starts[parent], self.starts[parent] + self.lengths[parent]),)
            ranges.append(() if parent is None else ranges[parent] + own)
        return tuple(ranges)

    @cached_property
    def positions_T(self) -> torch.Tensor:
        """RoPE position of every token, int64."""
        pieces = [torch.arange(o, o + n) for o, n in zip(self.offsets, self.lengths, strict=True)]
        return torch.cat(pieces).to(self.device)

    @cached_property
    def segment_of_T(self) -> torch.Tensor:
        """Index of the segment that every token belongs to, int64."""
        return torch.repeat_interleave(torch.tensor(self.lengths)).to(self.device)

    @cached_property
    def last_rows(self) -> tuple[int, ...]:
        """Stream position of each segment's last token."""
        return tuple(start + length - 1 for start, length in zip(self.starts, self.lengths, strict=True))

    def derived(self, compute: Callable[["Layout"], Derived]) -> Derived:
        """`compute(self)`, kept: what an attention back end works out of a layout serves all layers."""
        if compute not in self._derived:
            self._derived[compute] = compute(self)
        return self._derived[compute]

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout with its tensors on another device."""
        return self if torch.device(device) == self.device else Layout(self.lengths, self.parents, device=device)

    def __repr__(self) -> str:
        return f"Layout(lengths={self.lengths}, parents={self.parents})"
