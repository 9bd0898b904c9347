"""Attention over a packed stream in PyTorch, segment by segment: what runs on a CPU, and what the kernels are held to.

Forward is one scaled_dot_product_attention per segment, over the keys of its ancestors and itself. Backward forms

    p = softmax(scale q k^T)   dv = p^T dO   ds = p * (dO v^T - rowsum(dO * out))   dq = scale ds k   dk = scale ds^T q

in fp32 (float64 for float64), some query rows at a time so that scores of all heads stay within `SCORE_BYTES`. It needs
no saved log-sum, so the forward keeps none. A segment reads and writes rows of its own document only.

Shape suffixes: T tokens of the stream, L queries of a segment, C keys that it sees, B queries of one step, H query
heads, G key-value heads, R = H / G, K head dimension.
"""

import itertools

import torch
import torch.nn.functional as F

SCORE_BYTES = 64 * 2**20

Ranges = list[tuple[int, int]]


def torch_forward(
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    offsets: torch.Tensor,
    ranges_N2: torch.Tensor,
    scale: float,
    out_THK: torch.Tensor,
) -> None:
    """Fill out, like q and contiguous; `offsets` and `ranges_N2` are the plan's context tables."""
    grouped = q_THK.shape[1] != k_TGK.shape[1]
    for ranges in _segments(offsets, ranges_N2):
        start, length = ranges[-1]
        q_HLK = q_THK[start : start + length].transpose(0, 1)
        k_GCK, v_GCK = (_gather(x, ranges).transpose(0, 1) for x in (k_TGK, v_TGK))
        mask_LC = None
        if len(ranges) > 1:
            seen = k_GCK.shape[1]
            mask_LC = torch.ones(length, seen, dtype=torch.bool, device=q_THK.device).tril(seen - length)
        out_HLK = F.scaled_dot_product_attention(
            q_HLK[None], k_GCK[None], v_GCK[None], mask_LC, is_causal=mask_LC is None, scale=scale, enable_gqa=grouped
        )
        out_THK[start : start + length] = out_HLK[0].transpose(0, 1)


def torch_backward(
    do_THK: torch.Tensor,
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    out_THK: torch.Tensor,
    offsets: torch.Tensor,
    ranges_N2: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, like q, k and v and contiguous."""
    wide = torch.promote_types(q_THK.dtype, torch.float32)
    dq_THK = q_THK.new_empty(q_THK.shape)
    dk_TGK, dv_TGK = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k_TGK, v_TGK))
    for ranges in _segments(offsets, ranges_N2):
        rows = slice(ranges[-1][0], sum(ranges[-1]))
        k_GCK, v_GCK = (_gather(x, ranges).transpose(0, 1).to(wide) for x in (k_TGK, v_TGK))
        q_LHK, do_LHK, out_LHK = (x[rows].to(wide) for x in (q_THK, do_THK, out_THK))
        dq_LHK, dk_GCK, dv_GCK = _segment_backward(q_LHK, do_LHK, out_LHK, k_GCK, v_GCK, scale)
        dq_THK[rows] = dq_LHK.to(q_THK.dtype)
        first = 0
        for start, length in ranges:
            dk_TGK[start : start + length] += dk_GCK[:, first : first + length].transpose(0, 1)
            dv_TGK[start : start + length] += dv_GCK[:, first : first + length].transpose(0, 1)
            first += length
    return dq_THK, dk_TGK.to(k_TGK.dtype), dv_TGK.to(v_TGK.dtype)


def _segment_backward(
    q_LHK: torch.Tensor,
    do_LHK: torch.Tensor,
    out_LHK: torch.Tensor,
    k_GCK: torch.Tensor,
    v_GCK: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    length, heads, _ = q_LHK.shape
    kv_heads, seen, _ = k_GCK.shape
    d_LH = (do_LHK * out_LHK).sum(-1)
    dq_LHK, dk_GCK, dv_GCK = torch.empty_like(q_LHK), torch.zeros_like(k_GCK), torch.zeros_like(v_GCK)
    step = max(1, SCORE_BYTES // (heads * seen * q_LHK.element_size()))
    for first in range(0, length, step):
        rows = slice(first, min(first + step, length))
        keys = seen - length + rows.stop
        # The R query heads of a key-value head stand below each other, so that no key is copied for them.
        q_GXK, do_GXK = (_by_kv_head(x_LHK[rows], kv_heads) for x_LHK in (q_LHK, do_LHK))
        d_GX1 = _by_kv_head(d_LH[rows, :, None], kv_heads)
        s_GXC = scale * q_GXK @ k_GCK[:, :keys].transpose(1, 2)
        hidden_BC = torch.ones(rows.stop - first, keys, dtype=torch.bool, device=q_LHK.device).triu(
            seen - length + first + 1
        )
        s_GXC.view(kv_heads, -1, *hidden_BC.shape).masked_fill_(hidden_BC, float("-inf"))
        p_GXC = s_GXC.softmax(-1)
        dv_GCK[:, :keys] += p_GXC.transpose(1, 2) @ do_GXK
        ds_GXC = p_GXC * (do_GXK @ v_GCK[:, :keys].transpose(1, 2) - d_GX1)
        dk_GCK[:, :keys] += scale * ds_GXC.transpose(1, 2) @ q_GXK
        dq_GXK = scale * ds_GXC @ k_GCK[:, :keys]
        dq_LHK[rows] = dq_GXK.view(heads, -1, q_LHK.shape[-1]).transpose(0, 1)
    return dq_LHK, dk_GCK, dv_GCK


def _by_kv_head(x_BHK: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[G, R * B, K]: the rows of a key-value head's query heads, one head after the other."""
    return x_BHK.transpose(0, 1).reshape(kv_heads, -1, x_BHK.shape[-1])


def _segments(offsets: torch.Tensor, ranges_N2: torch.Tensor) -> list[Ranges]:
    """The context ranges of each segment that has tokens."""
    bounds, ranges = offsets.tolist(), [tuple(r) for r in ranges_N2.tolist()]
    segments = [ranges[first:last] for first, last in itertools.pairwise(bounds)]
    return [of_segment for of_segment in segments if of_segment[-1][1]]


def _gather(x_TGK: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """The rows of `ranges`, one range after the other."""
    pieces = [x_TGK[start : start + length] for start, length in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
