"""Attention over a packed stream: causal inside a segment, whole ancestors before it, grouped query heads.

    out[i, h] = sum_j softmax_j(scale q[i, h] . k[j, g]) v[j, g],    g = h // (H / G)

over the keys j of the query's own segment up to itself and of all its segment's ancestors. `attention_plan` says what a
segment's ancestors are; a prompt with two answers is computed, and kept, once. Files: attention_plan.py has the tables,
attention_forward.py and attention_backward.py the kernels with their numerics and bytes, attention_blocks.py what those
share, attention_torch.py the twin.

Saved for backward: q, k, v, out and the fp32 log-sum [H, T]. Nothing is added atomically, no launch parameter depends
on the contents: equal inputs give equal bits. A segment's blocks begin at its own first row, so its outputs have the
same bits wherever its document stands in the stream and whatever the other documents hold; gradients too, as long as
a document's segments stand together and in the same order.

Shape suffixes: T tokens, H query heads, G key-value heads, K head dimension, N ranges, I tiles.
"""

import math
from typing import Any

import torch

from umedtrain.kernels._dispatch import Impl, use_triton
from umedtrain.kernels._op import kernel_op
from umedtrain.kernels.attention_backward import launch_backward
from umedtrain.kernels.attention_forward import forward_outputs, launch_forward
from umedtrain.kernels.attention_plan import AttentionPlan, attention_plan
from umedtrain.kernels.attention_torch import torch_backward, torch_forward

__all__ = ["LARGEST_HEAD_DIM", "AttentionPlan", "attention", "attention_plan"]

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
LARGEST_HEAD_DIM = 256
LARGEST_FP32_HEAD_DIM = 128
"""Of fp32 in the kernels: products outside of tensor cores keep whole rows in registers, and spill beyond this."""


def _backward_fake(
    do_THK: torch.Tensor,
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    out_THK: torch.Tensor,
    lse_HT: torch.Tensor,
    context_offsets: torch.Tensor,
    context_ranges_N2: torch.Tensor,
    reader_offsets: torch.Tensor,
    reader_ranges_N2: torch.Tensor,
    query_tiles_I2: torch.Tensor,
    key_tiles_I2: torch.Tensor,
    scale: float,
    triton: bool,
) -> Triple:
    return q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape), v_TGK.new_empty(v_TGK.shape)


@kernel_op("attention_backward", fake=_backward_fake)
def _backward_op(
    do_THK: torch.Tensor,
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    out_THK: torch.Tensor,
    lse_HT: torch.Tensor,
    context_offsets: torch.Tensor,
    context_ranges_N2: torch.Tensor,
    reader_offsets: torch.Tensor,
    reader_ranges_N2: torch.Tensor,
    query_tiles_I2: torch.Tensor,
    key_tiles_I2: torch.Tensor,
    scale: float,
    triton: bool,
) -> Triple:
    context = (context_offsets, context_ranges_N2)
    if triton:
        tables = (*context, reader_offsets, reader_ranges_N2, query_tiles_I2, key_tiles_I2)
        return launch_backward(do_THK, q_THK, k_TGK, v_TGK, out_THK, lse_HT, *tables, scale)
    return torch_backward(do_THK, q_THK, k_TGK, v_TGK, out_THK, *context, scale)


def _forward_fake(
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    context_offsets: torch.Tensor,
    context_ranges_N2: torch.Tensor,
    reader_offsets: torch.Tensor,
    reader_ranges_N2: torch.Tensor,
    query_tiles_I2: torch.Tensor,
    key_tiles_I2: torch.Tensor,
    scale: float,
    triton: bool,
) -> Pair:
    return forward_outputs(q_THK, keep_lse=triton)


def _forward_context(ctx: Any, inputs: tuple, output: Pair) -> None:
    q_THK, k_TGK, v_TGK, *tables, ctx.scale, ctx.triton = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_THK, k_TGK, v_TGK, *output, *tables)


def _forward_backward(ctx: Any, do_THK: torch.Tensor | None, _: None) -> tuple:
    if do_THK is None:
        return (None,) * 11
    return *_backward_op(do_THK, *ctx.saved_tensors, ctx.scale, ctx.triton), *(None,) * 8


@kernel_op("attention", fake=_forward_fake, setup_context=_forward_context, backward=_forward_backward)
def _forward_op(
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    context_offsets: torch.Tensor,
    context_ranges_N2: torch.Tensor,
    reader_offsets: torch.Tensor,
    reader_ranges_N2: torch.Tensor,
    query_tiles_I2: torch.Tensor,
    key_tiles_I2: torch.Tensor,
    scale: float,
    triton: bool,
) -> Pair:
    if triton:
        return launch_forward(q_THK, k_TGK, v_TGK, context_offsets, context_ranges_N2, query_tiles_I2, scale)
    out_THK, lse_HT = forward_outputs(q_THK, keep_lse=False)
    torch_forward(q_THK, k_TGK, v_TGK, context_offsets, context_ranges_N2, scale, out_THK)
    return out_THK, lse_HT


def attention(
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Softmax attention of every token over what `plan` lets it see; differentiable in q, k and v.

    Args:
        q_THK: fp32, bf16 or fp16, T = plan.num_tokens, K at most 256 (64 and 128 are what the kernels are tuned for).
            Tokens and heads may be strided: slices of one fused projection are read where they are.
        k_TGK: dtype of q; H is a multiple of G, and query head h reads key-value head h // (H / G).
        v_TGK: shape and dtype of k.
        plan: from `attention_plan`, on q's device.
        scale: what scores are multiplied by, positive; None means 1 / sqrt(K).
        impl: "triton" or "torch" instead of what q's device and the environment say. The twin also takes float64, and
            fp32 with K above 128 in any case, which no GPU's registers hold.

    Returns:
        [T, H, K] in q's dtype, contiguous.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    triton = use_triton(q_THK, impl)
    _check(q_THK, k_TGK, v_TGK, plan, triton)
    triton = triton and (q_THK.dtype != torch.float32 or q_THK.shape[-1] <= LARGEST_FP32_HEAD_DIM)
    if scale is None:
        scale = q_THK.shape[-1] ** -0.5
    elif not 0.0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be positive and finite, or None for 1 / sqrt(K)")
    return _forward_op(q_THK, k_TGK, v_TGK, *plan.tables, scale, triton)[0]


def _check(q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGK: torch.Tensor, plan: AttentionPlan, triton: bool) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, *(() if triton else (torch.float64,)))
    if q_THK.ndim != 3 or q_THK.dtype not in dtypes or not 1 <= q_THK.shape[-1] <= LARGEST_HEAD_DIM:
        expected = f"fp32, bf16 or fp16 [T, H, K] with K from 1 to {LARGEST_HEAD_DIM}"
        raise ValueError(f"q_THK is {_describe(q_THK)}; it must be {expected}")
    tokens, heads, head_dim = q_THK.shape
    if tokens != plan.num_tokens:
        raise ValueError(f"q_THK has {tokens} tokens; it must have the plan's {plan.num_tokens}")
    if plan.query_tiles_I2.device != q_THK.device:
        raise ValueError(f"plan is on {plan.query_tiles_I2.device}; it must be on q_THK's device, {q_THK.device}")
    like_q = (tokens, head_dim, q_THK.dtype, q_THK.device)
    for name, x_TGK in (("k_TGK", k_TGK), ("v_TGK", v_TGK)):
        if x_TGK.ndim != 3 or (x_TGK.shape[0], x_TGK.shape[2], x_TGK.dtype, x_TGK.device) != like_q:
            raise ValueError(
                f"{name} is {_describe(x_TGK)}; it must be like q_THK, {_describe(q_THK)}, but for the heads"
            )
    if v_TGK.shape != k_TGK.shape:
        raise ValueError(f"v_TGK has {v_TGK.shape[1]} heads; it must have k_TGK's {k_TGK.shape[1]}")
    if not k_TGK.shape[1] or not heads or heads % k_TGK.shape[1]:
        raise ValueError(f"k_TGK has {k_TGK.shape[1]} heads; q_THK's {heads} must be a multiple of that")


def _describe(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
