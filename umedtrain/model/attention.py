"""Attention over a packed stream: the Triton kernel on a GPU, otherwise PyTorch's scaled_dot_product_attention.

The latter is the reference for every other back end.

Segments of similar shape are computed together, padded to the longest of them inside this file only: causality keeps
padding out of sight of every real token, so the results are those of one call per segment.

Shape suffixes: T tokens of the stream, S segments of one group, Q their longest length, C the most tokens that one of
their tokens sees, H query heads, G key-value heads, K head dimension.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from umedtrain.model.fused import kernels_for
from umedtrain.model.layout import Layout


def attention(q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGK: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Softmax attention, scaled by 1/sqrt(K), of every token over what `layout` lets it see; returns [T, H, K].

    Query head h reads key-value head h // (H / G). Works for any dtype and is differentiable.
    """
    if kernels := kernels_for(q_THK):
        return kernels.attention(q_THK, k_TGK, v_TGK, layout.derived(_kernel_plan))
    plan = layout.derived(_plan)
    # One gather for all groups: the backward pass of each fills a gradient for the whole stream.
    queries = q_THK[plan.query_rows].split([group.query_rows_SQ.numel() for group in plan.groups])
    keys = k_TGK[plan.key_rows].split([group.key_rows_SC.numel() for group in plan.groups])
    values = v_TGK[plan.key_rows].split([group.key_rows_SC.numel() for group in plan.groups])
    # On a GPU only the slowest back end takes a mask together with grouped heads.
    grouped = q_THK.device.type == "cpu"
    repeats = 1 if grouped else q_THK.shape[1] // k_TGK.shape[1]
    outputs = []
    for group, q, k, v in zip(plan.groups, queries, keys, values, strict=True):
        out_SHQK = F.scaled_dot_product_attention(
            _heads_first(q, group.size),
            _heads_first(k, group.size, repeats),
            _heads_first(v, group.size, repeats),
            attn_mask=group.mask_S1QC,
            is_causal=group.mask_S1QC is None,
            enable_gqa=grouped,
        )
        outputs.append(out_SHQK.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[plan.places_T]


def _kernel_plan(layout: Layout) -> Any:
    from umedtrain.kernels import attention_plan

    return attention_plan(layout.lengths, layout.parents, device=layout.device)


def _heads_first(rows: torch.Tensor, size: int, repeats: int = 1) -> torch.Tensor:
    """[S, heads * repeats, Q or C, K] of a group's gathered rows, [S * Q or S * C, heads, K]."""
    of_segments = rows.unflatten(0, (size, -1))
    if repeats > 1:
        of_segments = of_segments.repeat_interleave(repeats, dim=2)
    return of_segments.transpose(1, 2)


@dataclass(frozen=True)
class _Group:
    """Segments that are computed together.

    Attributes:
        query_rows_SQ: stream row of each query; a segment's last row again where it is shorter than Q.
        key_rows_SC: stream row of each key, ancestors before the segment itself; padded likewise.
        mask_S1QC: True where a query may see a key. None for segments without ancestors, which need only SDPA's own
            causal mask: whatever pads them comes after all that is real.
    """

    query_rows_SQ: torch.Tensor
    key_rows_SC: torch.Tensor
    mask_S1QC: torch.Tensor | None

    @property
    def size(self) -> int:
        """S: how many segments there are."""
        return len(self.query_rows_SQ)


@dataclass(frozen=True)
class _Plan:
    """The groups, and their rows one group after the other.

    Attributes:
        query_rows: `query_rows_SQ` of all groups.
        key_rows: `key_rows_SC` of all groups.
        places_T: for each token of the stream its place in `query_rows`.
    """

    groups: tuple[_Group, ...]
    query_rows: torch.Tensor
    key_rows: torch.Tensor
    places_T: torch.Tensor


def _plan(layout: Layout) -> _Plan:
    # Lengths within a factor of two go together, so that padding at most doubles the work.
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for segment, (length, offset) in enumerate(zip(layout.lengths, layout.offsets, strict=True)):
        members[length.bit_length(), offset.bit_length()].append(segment)
    groups, places_T, first = [], torch.empty(layout.num_tokens, dtype=torch.int64), 0
    for segments in members.values():
        group = _build_group(layout, segments)
        longest = group.query_rows_SQ.shape[1]
        for index, segment in enumerate(segments):
            start, length = layout.starts[segment], layout.lengths[segment]
            places_T[start : start + length] = torch.arange(length) + (first + index * longest)
        first += len(segments) * longest
        groups.append(group)
    query_rows = torch.cat([group.query_rows_SQ.flatten() for group in groups])
    key_rows = torch.cat([group.key_rows_SC.flatten() for group in groups])
    return _Plan(tuple(groups), query_rows, key_rows, places_T.to(layout.device))


def _build_group(layout: Layout, segments: list[int]) -> _Group:
    lengths_S = torch.tensor([layout.lengths[segment] for segment in segments])
    offsets_S = torch.tensor([layout.offsets[segment] for segment in segments])
    starts_S = torch.tensor([layout.starts[segment] for segment in segments])
    steps_Q = torch.arange(int(lengths_S.max()))
    query_rows_SQ = starts_S[:, None] + torch.minimum(steps_Q, lengths_S[:, None] - 1)
    if not offsets_S.any():
        return _Group(query_rows_SQ.to(layout.device), query_rows_SQ.to(layout.device), None)
    seen_S = offsets_S + lengths_S
    steps_C = torch.arange(int(seen_S.max()))
    key_rows_SC = torch.empty(len(segments), len(steps_C), dtype=torch.int64)
    for index, segment in enumerate(segments):
        own = (layout.starts[segment], layout.starts[segment] + layout.lengths[segment])
        rows = torch.cat([torch.arange(start, end) for start, end in (*layout.context_ranges[segment], own)])
        key_rows_SC[index] = rows[torch.minimum(steps_C, seen_S[index] - 1)]
    # Query i of a segment sees its ancestors and itself up to i. A query that only pads sees at least as much, so no
    # row of the mask is empty.
    mask_SQC = steps_C <= offsets_S[:, None, None] + steps_Q[None, :, None]
    return _Group(query_rows_SQ.to(layout.device), key_rows_SC.to(layout.device), mask_SQC[:, None].to(layout.device))
