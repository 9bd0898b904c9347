"""Attention over a packed stream by PyTorch's scaled_dot_product_attention: the reference for every other back end.

Segments of similar shape are computed together, padded to the longest of them inside this file only: causality keeps
padding out of sight of every real token, so the results are those of one call per segment.

Shape suffixes: T tokens of the stream, S segments of one group, Q their longest length, C the most tokens that one of
their tokens sees, H query heads, G key-value heads, K head dimension.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from umedtrain.model.layout import Layout


def attention(q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGK: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Softmax attention, scaled by 1/sqrt(K), of every token over what `layout` lets it see; returns [T, H, K].

    Query head h reads key-value head h // (H / G). Works for any dtype and is differentiable.
    """
    heads_per_group = q_THK.shape[1] // k_TGK.shape[1]
    plan = layout.derived(_plan)
    outputs = []
    for group in plan.groups:
        q_SHQK = q_THK[group.query_rows_SQ].transpose(1, 2)
        k_SHCK = k_TGK[group.key_rows_SC].repeat_interleave(heads_per_group, dim=2).transpose(1, 2)
        v_SHCK = v_TGK[group.key_rows_SC].repeat_interleave(heads_per_group, dim=2).transpose(1, 2)
        mask = group.mask_S1QC
        out_SHQK = F.scaled_dot_product_attention(q_SHQK, k_SHCK, v_SHCK, attn_mask=mask, is_causal=mask is None)
        outputs.append(out_SHQK.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[plan.places_T]


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


@dataclass(frozen=True)
class _Plan:
    """The groups, and for each token of the stream its place among all groups' padded queries, one after the other."""

    groups: tuple[_Group, ...]
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
    return _Plan(tuple(groups), places_T.to(layout.device))


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
