"""Attention over a packed stream: the reference by PyTorch's scaled_dot_product_attention, segment by segment.

Shape suffixes: T tokens of the stream, Q tokens of one segment, C tokens that a segment's last token sees,
H query heads, G key-value heads, K head dimension.
"""

import torch
import torch.nn.functional as F

from umedtrain.model.layout import Layout


def attention(q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGK: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Softmax attention, scaled by 1/sqrt(K), of every token over what `layout` lets it see; returns [T, H, K].

    Query head h reads key-value head h // (H / G). Works for any dtype and is differentiable.
    """
    group = q_THK.shape[1] // k_TGK.shape[1]
    q_HTK = q_THK.transpose(0, 1)
    k_HTK = k_TGK.repeat_interleave(group, dim=1).transpose(0, 1)
    v_HTK = v_TGK.repeat_interleave(group, dim=1).transpose(0, 1)
    outputs_HQK = []
    for start, length, context in zip(layout.starts, layout.lengths, layout.context_ranges, strict=True):
        own = (start, start + length)
        k_HCK, v_HCK = _gather(k_HTK, (*context, own)), _gather(v_HTK, (*context, own))
        q_HQK = q_HTK[:, own[0] : own[1]]
        # SDPA's is_causal aligns the triangle to the top left, so a segment with ancestors needs its own mask.
        mask_QC = _bottom_right_causal(length, k_HCK.shape[1], q_THK.device) if context else None
        outputs_HQK.append(
            F.scaled_dot_product_attention(
                q_HQK[None], k_HCK[None], v_HCK[None], attn_mask=mask_QC, is_causal=mask_QC is None
            )[0]
        )
    return torch.cat(outputs_HQK, dim=1).transpose(0, 1)


def _gather(x_HTK: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    pieces = [x_HTK[:, start:end] for start, end in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _bottom_right_causal(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """True where query i of the segment may see key j: every ancestor, and the segment up to i itself."""
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return allowed.tril(diagonal=num_keys - num_queries)
