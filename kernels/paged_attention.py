"""Attention of one or a few new tokens of each sequence over a key-value cache that lies in pages.

    out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . key[b, j, h // M]) value[b, j, h // M]
    over the positions j <= length_b - Q + i of sequence b

Position j of sequence b is slot j % S of page table[b, j // S]; pages may be shared between sequences in any way. The
last Q positions are the new tokens themselves, so their keys and values are in the cache already.

The context is cut into splits of a fixed number of tokens, one program for each split, key-value head and sequence
(flash decoding: Dao et al. 2023); a second kernel merges the splits in order. Neither the batch nor the width of the
page table shows in the bits of a sequence's output: where a split begins depends on nothing, and splits past a
sequence's end are not read. The M query heads of a key-value head, of all Q tokens, are the rows of one tile, filled
up to 16, so the cache is read once.

Numerics. Scores, softmax and sums are fp32; probabilities are rounded to the cache's dtype before they multiply the
values; the output is rounded once. Bytes: 2 * length * G * K elements of the cache for each sequence, plus
4 * (K + 2) * H * Q for each split written and read (1.6 % at 256 bf16 tokens a split and M = 4). No backward.

Shape suffixes: B sequences, Q new tokens of a sequence, H query heads, G key-value heads, M = H / G, K head dimension,
P pages, S slots of a page, N positions of a tile, R rows of a tile (token and query head), C splits of a tile.
"""

import math

import torch

from umedtrain.kernels._dispatch import Impl, pick, use_triton
from umedtrain.kernels._op import kernel_op
from umedtrain.kernels._triton import tl, triton

SPLIT = 256
"""Tokens of a split. One number for all architectures, so that all cut a context alike."""
PAGE_SIZES = (8, 16, 32, 64, 128, 256)

# (rows and positions of a tile, warps, stages) by rows: query heads of a key-value head times new tokens.
TILES = {
    "default": ((16, (16, 64, 8, 3)), (32, (32, 64, 4, 3)), (2**31, (64, 64, 8, 3))),
    "gfx942": ((16, (16, 32, 4, 3)), (32, (32, 32, 4, 3)), (2**31, (64, 32, 4, 2))),
}
# Without tensor cores for fp32 products every register counts.
FP32_TILES = {"default": ((2**31, (16, 16, 8, 3)),)}


@triton.jit
def _split_kernel(
    q_ptr, key_ptr, value_ptr, table_ptr, length_ptr, part_ptr, max_ptr, sum_ptr, scale, queries, capacity,
    q_stride_b, q_stride_q, q_stride_h, key_stride_p, key_stride_s, key_stride_g,
    value_stride_p, value_stride_s, value_stride_g, table_stride, tiles,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Unnormalised output, maximum score and sum of exponentials (base 2) of a split, for a tile of rows."""
    program = tl.program_id(0).to(tl.int64)
    sequence, tile = program // tiles, program % tiles
    kv_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(length_ptr + sequence).to(tl.int32)
    row_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    query_R = row_R // GROUP
    seen_R = (length - queries + 1 + query_R).to(tl.int32)
    stop = tl.minimum(tl.minimum(tl.max(seen_R, 0), length), tl.minimum((split + 1) * SPLIT, capacity))
    if split * SPLIT < stop:
        column_K = tl.arange(0, BLOCK_K)
        inside_RK = (query_R < queries)[:, None] & (column_K < HEAD_DIM)[None, :]
        head_R = kv_head * GROUP + row_R % GROUP
        q_RK = tl.load(
            q_ptr + sequence * q_stride_b + (query_R * q_stride_q + head_R * q_stride_h)[:, None] + column_K[None, :],
            mask=inside_RK,
            other=0.0,
        )
        max_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        sum_R = tl.zeros((BLOCK_R,), tl.float32)
        out_RK = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for start in range(split * SPLIT, stop, BLOCK_N):
            position_N = start + tl.arange(0, BLOCK_N)
            page_N = tl.load(table_ptr + sequence * table_stride + position_N // PAGE, mask=position_N < stop, other=0)
            page_N, slot_N = page_N.to(tl.int64), (position_N % PAGE).to(tl.int64)
            inside_NK = (position_N < stop)[:, None] & (column_K < HEAD_DIM)[None, :]
            key_N = page_N * key_stride_p + slot_N * key_stride_s + kv_head * key_stride_g
            key_NK = tl.load(key_ptr + key_N[:, None] + column_K[None, :], mask=inside_NK, other=0.0)
            score_RN = tl.dot(q_RK, key_NK.T, input_precision="ieee") * scale
            score_RN = tl.where(position_N[None, :] < tl.minimum(seen_R, stop)[:, None], score_RN, float("-inf"))
            new_max_R = tl.maximum(max_R, tl.max(score_RN, 1))
            # Of two infinite maxima the difference would be NaN.
            shift_R = tl.where(new_max_R == float("-inf"), 0.0, new_max_R)
            weight_RN = tl.exp2(score_RN - shift_R[:, None])
            keep_R = tl.exp2(max_R - shift_R)
            sum_R = sum_R * keep_R + tl.sum(weight_RN, 1)
            value_N = page_N * value_stride_p + slot_N * value_stride_s + kv_head * value_stride_g
            value_NK = tl.load(value_ptr + value_N[:, None] + column_K[None, :], mask=inside_NK, other=0.0)
            out_RK = tl.dot(
                weight_RN.to(value_NK.dtype), value_NK, out_RK * keep_R[:, None], input_precision="ieee"
            )  # fmt: skip
            max_R = new_max_R
        cell_R = ((sequence * queries + query_R) * HEADS + head_R) * tl.num_programs(2) + split
        tl.store(part_ptr + cell_R[:, None] * HEAD_DIM + column_K[None, :], out_RK, mask=inside_RK)
        tl.store(max_ptr + cell_R, max_R, mask=query_R < queries)
        tl.store(sum_ptr + cell_R, sum_R, mask=query_R < queries)


@triton.jit
def _merge_kernel(
    part_ptr, max_ptr, sum_ptr, length_ptr, out_ptr, queries, capacity, splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of the output from its splits, in order."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr + row // (queries * HEADS)).to(tl.int32)
    seen = length - queries + 1 + (row // HEADS % queries).to(tl.int32)
    count = tl.cdiv(tl.minimum(tl.maximum(seen, 0), capacity), SPLIT)
    column_K = tl.arange(0, BLOCK_K)
    out_K = tl.zeros((BLOCK_K,), tl.float32)
    running_max, running_sum = float("-inf"), 0.0
    for start in range(0, count, BLOCK_C):
        split_C = start + tl.arange(0, BLOCK_C)
        cell_C = row * splits + split_C
        inside_C = split_C < count
        max_C = tl.load(max_ptr + cell_C, mask=inside_C, other=float("-inf"))
        new_max = tl.maximum(running_max, tl.max(max_C, 0))
        weight_C, keep = tl.exp2(max_C - new_max), tl.exp2(running_max - new_max)
        running_sum = running_sum * keep + tl.sum(
            tl.load(sum_ptr + cell_C, mask=inside_C, other=0.0) * weight_C, 0
        )  # fmt: skip
        inside_CK = inside_C[:, None] & (column_K < HEAD_DIM)[None, :]
        part_CK = tl.load(part_ptr + cell_C[:, None] * HEAD_DIM + column_K[None, :], mask=inside_CK, other=0.0)
        out_K = out_K * keep + tl.sum(part_CK * weight_C[:, None], 0)
        running_max = new_max
    out_K = out_K / tl.where(count > 0, running_sum, 1.0)
    out_K = tl.where(length > capacity, float("nan"), out_K)
    tl.store(out_ptr + row * HEAD_DIM + column_K, out_K.to(out_ptr.dtype.element_ty), mask=column_K < HEAD_DIM)


def _twin(
    q_BQHK: torch.Tensor,
    key_pages_PSGK: torch.Tensor,
    value_pages_PSGK: torch.Tensor,
    page_table_BM: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The same in PyTorch, one sequence after another, in fp32."""
    (_, queries, heads, head_dim), kv_heads = q_BQHK.shape, key_pages_PSGK.shape[2]
    page, capacity = key_pages_PSGK.shape[1], page_table_BM.shape[1] * key_pages_PSGK.shape[1]
    out_BQHK = torch.zeros_like(q_BQHK, memory_format=torch.contiguous_format)
    for sequence, length in enumerate(lengths_B.tolist()):
        if length > capacity:
            out_BQHK[sequence] = float("nan")
            continue
        if length <= 0:
            continue
        pages = page_table_BM[sequence, : -(-length // page)].long()
        key_GNK = key_pages_PSGK[pages].flatten(0, 1)[:length].transpose(0, 1).float()
        value_GNK = value_pages_PSGK[pages].flatten(0, 1)[:length].transpose(0, 1).float()
        q_GRK = q_BQHK[sequence].unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2).float() * scale
        score_GRN = q_GRK @ key_GNK.transpose(1, 2)
        if queries > 1:
            new_R = torch.arange(queries, device=q_GRK.device).repeat_interleave(heads // kv_heads)
            position_N = torch.arange(length, device=q_GRK.device)
            score_GRN.masked_fill_(position_N > (length - queries + new_R)[:, None], float("-inf"))
        # Tokens before the sequence's first, which see nothing, are NaN here.
        out_GRK = (score_GRN.softmax(-1) @ value_GNK).unflatten(1, (queries, -1))
        first = max(0, queries - length)
        out_BQHK[sequence, first:] = out_GRK.transpose(0, 1)[first:].reshape(-1, heads, head_dim).to(q_BQHK.dtype)
    return out_BQHK


def _fake(
    q_BQHK: torch.Tensor,
    key_pages_PSGK: torch.Tensor,
    value_pages_PSGK: torch.Tensor,
    page_table_BM: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
    use_kernel: bool,
) -> torch.Tensor:
    return q_BQHK.new_empty(q_BQHK.shape)


@kernel_op("paged_attention", fake=_fake)
def _paged_attention(
    q_BQHK: torch.Tensor,
    key_pages_PSGK: torch.Tensor,
    value_pages_PSGK: torch.Tensor,
    page_table_BM: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
    use_kernel: bool,
) -> torch.Tensor:
    if not use_kernel:
        return _twin(q_BQHK, key_pages_PSGK, value_pages_PSGK, page_table_BM, lengths_B, scale)
    (batch, queries, heads, head_dim), kv_heads = q_BQHK.shape, key_pages_PSGK.shape[2]
    if q_BQHK.stride(-1) != 1:
        q_BQHK = q_BQHK.contiguous()
    if page_table_BM.stride(-1) != 1:
        page_table_BM = page_table_BM.contiguous()
    lengths_B = lengths_B.contiguous()
    capacity = page_table_BM.shape[1] * key_pages_PSGK.shape[1]
    out_BQHK = q_BQHK.new_empty(q_BQHK.shape)
    if not out_BQHK.numel():
        return out_BQHK
    splits = max(1, triton.cdiv(capacity, SPLIT))
    device = q_BQHK.device
    part = torch.empty(batch, queries, heads, splits, head_dim, dtype=torch.float32, device=device)
    largest, total = torch.empty(2, batch, queries, heads, splits, dtype=torch.float32, device=device)
    table = FP32_TILES if q_BQHK.dtype == torch.float32 else TILES
    rows, block_n, warps, stages = pick(table, heads // kv_heads * queries)
    tiles = triton.cdiv(heads // kv_heads * queries, rows)
    block_k = max(16, triton.next_power_of_2(head_dim))
    _split_kernel[(batch * tiles, kv_heads, splits)](
        q_BQHK, key_pages_PSGK, value_pages_PSGK, page_table_BM, lengths_B, part, largest, total,
        scale * math.log2(math.e), queries, capacity, *q_BQHK.stride()[:3], *key_pages_PSGK.stride()[:3],
        *value_pages_PSGK.stride()[:3], page_table_BM.stride(0), tiles,
        HEADS=heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim, PAGE=key_pages_PSGK.shape[1], SPLIT=SPLIT,
        BLOCK_R=rows, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _merge_kernel[(batch * queries * heads,)](
        part, largest, total, lengths_B, out_BQHK, queries, capacity, splits,
        HEADS=heads, HEAD_DIM=head_dim, SPLIT=SPLIT, BLOCK_C=16, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    return out_BQHK


def paged_attention(
    q: torch.Tensor,
    key_pages_PSGK: torch.Tensor,
    value_pages_PSGK: torch.Tensor,
    page_table_BM: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Attention of the last token, or the last Q tokens, of each sequence over its pages of the cache.

    Args:
        q: [B, H, K], or [B, Q, H, K] for the last Q tokens of each sequence, of which each sees itself and what is
            before it. fp32, bf16 or fp16. Room for partial results is B * Q * H * capacity / 256 * K * 4 bytes: few
            tokens (a draft to verify), or pieces of a prompt.
        key_pages_PSGK, value_pages_PSGK: the cache, of q's dtype, with the new tokens in it. Any strides with the
            last dimension contiguous. Slots past a sequence's end may hold anything.
        page_table_BM: int32 or int64 page numbers in 0..P-1; entries past a sequence's end may hold anything.
            Its width bounds the work, so cut it to the longest sequence; that does not change the result.
        lengths_B: int32 or int64 tokens of each sequence, the new ones included. 0 gives an output of zero, as do
            those of Q tokens that lie before a sequence's first. More than the table has room for gives NaN.
        scale: of the scores; 1 / sqrt(K) if None.
        impl: see `umedtrain.kernels._dispatch`.

    Returns:
        Of q's shape and dtype. A sequence's bits do not depend on the others, on the order or sharing of pages, on
        the page size or on the table's width; they may differ between Q tokens at once and one after another.

    Raises:
        ValueError: for wrong shapes, dtypes, devices or strides, and inputs that require a gradient.
    """
    if q.ndim not in (3, 4) or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"q must be fp32, bf16 or fp16 [B, H, K] or [B, Q, H, K], got {q.dtype} {list(q.shape)}")
    _check_cache(q, key_pages_PSGK, "key_pages_PSGK")
    _check_cache(q, value_pages_PSGK, "value_pages_PSGK")
    if key_pages_PSGK.shape != value_pages_PSGK.shape:
        raise ValueError(
            f"value_pages_PSGK must have the shape of key_pages_PSGK, {list(key_pages_PSGK.shape)}, "
            f"got {list(value_pages_PSGK.shape)}"
        )
    for name, x, dims in (("page_table_BM", page_table_BM, 2), ("lengths_B", lengths_B, 1)):
        if x.ndim != dims or x.shape[0] != q.shape[0] or x.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} must be int32 or int64 with {dims} dimensions, the first of {q.shape[0]}, "
                f"got {x.dtype} {list(x.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, got {x.device}")
    if torch.is_grad_enabled() and (q.requires_grad or key_pages_PSGK.requires_grad or value_pages_PSGK.requires_grad):
        raise ValueError("q and the cache must not require a gradient, for decoding has none; use torch.no_grad()")
    q_BQHK = q[:, None] if q.ndim == 3 else q
    out_BQHK = _paged_attention(
        q_BQHK,
        key_pages_PSGK,
        value_pages_PSGK,
        page_table_BM,
        lengths_B,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        use_triton(q, impl),
    )
    return out_BQHK.view(q.shape)


def _check_cache(q: torch.Tensor, pages_PSGK: torch.Tensor, name: str) -> None:
    if pages_PSGK.ndim != 4 or pages_PSGK.dtype != q.dtype or pages_PSGK.device != q.device:
        raise ValueError(
            f"{name} must be [P, S, G, K] of q's dtype {q.dtype} on {q.device}, "
            f"got {pages_PSGK.dtype} {list(pages_PSGK.shape)} on {pages_PSGK.device}"
        )
    _, page, kv_heads, head_dim = pages_PSGK.shape
    if page not in PAGE_SIZES:
        raise ValueError(f"{name} must have pages of {', '.join(map(str, PAGE_SIZES))} slots, got {page}")
    if head_dim != q.shape[-1] or not 1 <= head_dim <= 256:
        raise ValueError(f"{name} must have heads of {q.shape[-1]} columns, as q, up to 256, got {head_dim}")
    if not kv_heads or q.shape[-2] % kv_heads:
        raise ValueError(f"{name} must have a divisor of q's {q.shape[-2]} heads, got {kv_heads}")
    if pages_PSGK.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {pages_PSGK.stride()}")
