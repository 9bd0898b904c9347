"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) of packed streams, half-split, q and k in one pass.

    a[t, i] = position_t * frequency_i                                       formed, and rounded, in fp32
    out[t, h, i]     = x[t, h, i] * cos a[t, i] - x[t, h, i + F] * sin a[t, i]
    out[t, h, i + F] = x[t, h, i + F] * cos a[t, i] + x[t, h, i] * sin a[t, i]

Backward rotates the incoming gradients by -a: the same kernel, with the sine's sign turned.

Why the angles are not formed in the kernel: `tl.sin` and `tl.cos` are right for any fp32 angle, but only because they
carry a reduction for large ones. Compiled for sm_90 (Triton 3.7), the two of 8 values a thread cost 51 registers and 80
accesses to local memory. All layers of a step rotate by the same angles, so PyTorch makes a table once (`rope_tables`,
exact reduction, right to 1e-7 at position 131072) and each layer reads its 8 T F bytes: 4 MB beside the 168 MB of q
and k at Llama-3-8B's sizes and 8192 tokens.

Casts: arithmetic in fp32, one rounding of each output. Bytes: 2 T (H + G) K b + 8 T F; 6 FLOPs for a pair of values.
Saved for backward: the table. Nothing is summed, so the bits depend on no launch parameter.

Shape suffixes: T tokens, H query heads, G key heads, K head dimension, F = K / 2 frequencies.
"""

import math
from typing import Any

import torch

from umedtrain.kernels._dispatch import Impl, pick, use_triton
from umedtrain.kernels._op import kernel_op
from umedtrain.kernels._triton import tl, triton

Pair = tuple[torch.Tensor, torch.Tensor]
LARGEST_HEAD_DIM = 1024

# (F up to, (values of half a head times heads that are in registers at once, launch options)): 4 a thread, which leaves
# 32 registers and all of a multiprocessor's warps resident.
CONFIG = {
    "default": ((LARGEST_HEAD_DIM // 2, (512, {"num_warps": 4})),),
    "gfx942": ((LARGEST_HEAD_DIM // 2, (1024, {"num_warps": 4})),),
}


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, cos, sin, head_stride,
    HEADS: tl.constexpr, F: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """All heads of one token, `BLOCK_H` at a time."""
    f = tl.arange(0, BLOCK_F)[None, :]
    dtype = out_ptr.dtype.element_ty
    for start in range(0, HEADS, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)[:, None]
        inside = (head < HEADS) & (f < F)
        source = x_ptr + head.to(tl.int64) * head_stride + f
        target = out_ptr + head * (2 * F) + f
        left = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(source + F, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, (left * cos - right * sin).to(dtype), mask=inside)
        tl.store(target + F, (right * cos + left * sin).to(dtype), mask=inside)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, cos_stride, sin_stride,
    H: tl.constexpr, G: tl.constexpr, F: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One token: its angles are read once, for all its heads."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    cos = tl.load(cos_ptr + token * cos_stride + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * sin_stride + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    q_out_ptr += token * (2 * H * F)
    k_out_ptr += token * (2 * G * F)
    _rotate_heads(q_ptr + token * q_stride, q_out_ptr, cos, sin, q_head_stride, H, F, BLOCK_H, BLOCK_F)
    _rotate_heads(k_ptr + token * k_stride, k_out_ptr, cos, sin, k_head_stride, G, F, BLOCK_H, BLOCK_F)


def _launch(
    q_THK: torch.Tensor, k_TGK: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, inverse: bool
) -> Pair:
    q_out_THK, k_out_TGK = q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape)
    tokens, heads, head_dim = q_THK.shape
    if tokens:
        tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_THK, k_TGK, cos_TF, sin_TF)]
        strides = [stride for x in tensors for stride in x.stride()[:-1]]
        values, options = pick(CONFIG, head_dim // 2)
        block_f = triton.next_power_of_2(head_dim // 2)
        sizes = {"H": heads, "G": k_TGK.shape[1], "F": head_dim // 2}
        blocks = {"BLOCK_H": max(1, values // block_f), "BLOCK_F": block_f}
        flags = {"INVERSE": inverse}
        _rope_kernel[(tokens,)](*tensors, q_out_THK, k_out_TGK, *strides, **sizes, **flags, **blocks, **options)
    return q_out_THK, k_out_TGK


def _torch_rotate(x_THK: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor) -> torch.Tensor:
    left, right = x_THK.float().chunk(2, dim=-1)
    cos, sin = cos_TF.float()[:, None], sin_TF.float()[:, None]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x_THK.dtype)


def _fake(
    q_THK: torch.Tensor, k_TGK: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, inverse: bool, triton: bool
) -> Pair:
    return q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape)


def _context(ctx: Any, inputs: tuple, output: Pair) -> None:
    _, _, cos_TF, sin_TF, ctx.inverse, ctx.triton = inputs
    ctx.save_for_backward(cos_TF, sin_TF)


def _backward(ctx: Any, dq_THK: torch.Tensor, dk_TGK: torch.Tensor) -> tuple:
    return *_rope_op(dq_THK, dk_TGK, *ctx.saved_tensors, not ctx.inverse, ctx.triton), None, None, None, None


@kernel_op("rope", fake=_fake, setup_context=_context, backward=_backward)
def _rope_op(
    q_THK: torch.Tensor, k_TGK: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, inverse: bool, triton: bool
) -> Pair:
    if triton:
        return _launch(q_THK, k_TGK, cos_TF, sin_TF, inverse)
    sin_TF = -sin_TF if inverse else sin_TF
    return _torch_rotate(q_THK, cos_TF, sin_TF), _torch_rotate(k_TGK, cos_TF, sin_TF)


def rope(
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    *,
    impl: Impl | None = None,
) -> Pair:
    """Rotate the pairs (x[i], x[i + F]) of every head of q and k by their token's angles, in one launch.

    Differentiable in q and k, bitwise repeatable; the tables get no gradient and are all that is kept for backward.
    Reads and writes q and k once and reads 8 F bytes a token (of fp32 tables).

    Args:
        q_THK: fp32, bf16 or fp16; K even, at most 1024. Tokens and heads may be strided: slices of a fused projection.
        k_TGK: dtype of q; any number of heads.
        cos_TF: from `rope_tables`, one row for each token of the stream.
        sin_TF: shape of `cos_TF`.
        impl: "triton" or "torch" instead of what q's device and the environment say.

    Returns:
        New contiguous tensors like q and k.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    _check(q_THK, k_TGK, cos_TF, sin_TF)
    return _rope_op(q_THK, k_TGK, cos_TF, sin_TF, False, use_triton(q_THK, impl))


def rope_tables(frequencies_F: torch.Tensor, positions_T: torch.Tensor) -> Pair:
    """Cosines and sines, fp32 [T, F], of position * frequency, the product being rounded to fp32.

    That rounding is part of the convention of Llama's implementations: at position 131072 the angle itself is only
    known to 2^-8, and a "more exact" one would rotate by other angles than the model was trained with.

    Args:
        frequencies_F: fp32, from `rope_frequencies`.
        positions_T: integers, in [0, 2^24), where fp32 holds them exactly.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    if frequencies_F.ndim != 1 or frequencies_F.dtype != torch.float32:
        raise ValueError(f"frequencies_F is {_describe(frequencies_F)}; it must be float32 [F]")
    if positions_T.ndim != 1 or positions_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions_T is {_describe(positions_T)}; it must be int32 or int64 [T]")
    angles_TF = positions_T[:, None].float() * frequencies_F
    return angles_TF.cos(), angles_TF.sin()


def rope_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position: int = 8192,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Angle per token of each pair, fp32 [head_dim / 2]: theta^(-2 i / head_dim), for Llama 3.1 and 3.2 scaled.

    Their rule (Llama Team 2024, arXiv 2407.21783, and its reference code): a pair that makes fewer than
    `low_freq_factor` turns over `original_max_position` tokens is slowed down by `factor`, one that makes more than
    `high_freq_factor` is kept, and in between the two frequencies are blended linearly in the number of turns.

    Args:
        head_dim: even.
        theta: the base; 500000 in Llama 3.
        factor: 8 in Llama 3.1, 32 in Llama 3.2; None means no scaling, and the next three are not used.
        low_freq_factor: turns.
        high_freq_factor: turns, more than `low_freq_factor`.
        original_max_position: tokens.
        device: of the result.

    Raises:
        ValueError: for an odd `head_dim` or factors that make no sense.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even and positive")
    if not theta > 0:
        raise ValueError(f"theta is {theta}; it must be positive")
    exponents_F = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequencies_F = 1.0 / theta**exponents_F
    if factor is None:
        return frequencies_F
    if not factor > 0:
        raise ValueError(f"factor is {factor}; it must be positive, or None for no scaling")
    if not high_freq_factor > low_freq_factor:
        raise ValueError(f"high_freq_factor is {high_freq_factor}; it must exceed low_freq_factor, {low_freq_factor}")
    turns_F = original_max_position / (2 * math.pi / frequencies_F)
    keep_F = ((turns_F - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return (1.0 - keep_F) * frequencies_F / factor + keep_F * frequencies_F


def _check(q_THK: torch.Tensor, k_TGK: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor) -> None:
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if q_THK.ndim != 3 or q_THK.dtype not in floats:
        raise ValueError(f"q_THK is {_describe(q_THK)}; it must be fp32, bf16 or fp16 [T, H, K]")
    tokens, _, head_dim = q_THK.shape
    if not 2 <= head_dim <= LARGEST_HEAD_DIM or head_dim % 2:
        raise ValueError(f"q_THK is {_describe(q_THK)}; K must be even and at most {LARGEST_HEAD_DIM}")
    expected = (tokens, head_dim, q_THK.dtype, q_THK.device)
    if k_TGK.ndim != 3 or (k_TGK.shape[0], k_TGK.shape[2], k_TGK.dtype, k_TGK.device) != expected:
        raise ValueError(f"k_TGK is {_describe(k_TGK)}; it must be like q_THK, {_describe(q_THK)}, but for the heads")
    for name, table_TF in (("cos_TF", cos_TF), ("sin_TF", sin_TF)):
        fits = table_TF.shape == (tokens, head_dim // 2) and table_TF.dtype in floats
        if not fits or table_TF.device != q_THK.device:
            wanted = f"fp32 [{tokens}, {head_dim // 2}] on {q_THK.device}, from rope_tables"
            raise ValueError(f"{name} is {_describe(table_TF)}; it must be {wanted}")


def _describe(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
