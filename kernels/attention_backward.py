"""Flash attention backward over a packed stream: two passes without atomics, so equal inputs give equal bits.

With s, c, lse as in the forward, dO the gradient of out, for every key j that query i sees:

    p[i, j]  = 2^(c s[i, j] - lse[i])
    D[i]     = sum_k dO[i, k] out[i, k]
    ds[i, j] = p[i, j] (dO[i] . v[j] - D[i])
    dq[i] = scale sum_j ds[i, j] k[j]        dk[j] = scale sum_i ds[i, j] q[i]        dv[j] = sum_i p[i, j] dO[i]

First pass: one program per (block of query rows, query head) visits the keys that its rows see, as the forward does,
and writes dq and D, which costs no further read of dO. Second pass: one program per (block of key rows, key-value head)
visits the queries that see its keys, of all H / G query heads that share the head: those of the segment itself from the
block on, and those of all descendants; it reads K and V, and writes dk and dv, once. Both passes form the scores: 7
products, not the 5 of a backward that adds dq with atomics, in an order that changes from run to run. In either, whole
blocks come first and masked blocks of E rows after, as in the forward.

Bytes: first pass q, out, dO, lse read and dq, D written once, K and V per program; second pass K, V read and dk, dv
written once, q, dO, lse, D per program, mostly from L2. 14 K FLOPs a visible (query, key) pair and query head.

Casts: products are exact, added in fp32; p and ds are rounded to the inputs' dtype before they are multiplied; dq, dk
and dv are rounded once. fp32 inputs are multiplied in full fp32, never in TF32.

Registers: dk and dv of 128 keys take 128 a thread on sm_90; what the compiler would hoist out of those loops as well
made it spill (`disable_licm`).

Shape suffixes: T tokens, H query heads, G key-value heads, K head dimension, M rows of a query block, N rows of a key
block, E rows of a masked block.
"""

import torch

from umedtrain.kernels._triton import tl, triton
from umedtrain.kernels.attention_blocks import (
    LOG2_E,
    Config,
    compile_options,
    configure,
    load_rows,
    readable,
    token_head_strides,
)
from umedtrain.kernels.attention_plan import TILE

DQ = {
    "default": (
        (64, Config(128, 64, 32, 8, 2, 1)),
        (128, Config(128, 32, 32, 8, 2, 2)),
        (256, Config(32, 32, 32, 8, 1, 1)),
    ),
    "sm_90": (
        (64, Config(128, 128, 64, 8, 2, 1, True)),
        (128, Config(128, 64, 32, 8, 2, 1, True)),
        (256, Config(32, 32, 32, 8, 2, 1, True)),
    ),
    "sm_100": (
        (64, Config(128, 64, 64, 8, 2, 1, True)),
        (128, Config(128, 64, 64, 8, 2, 1, True)),
        (256, Config(32, 32, 32, 8, 1, 1)),
    ),
    "gfx942": (
        (64, Config(64, 64, 32, 4, 1, 1)),
        (128, Config(64, 64, 32, 4, 1, 1)),
        (256, Config(32, 32, 32, 4, 1, 1)),
    ),
    "fp32": ((64, Config(32, 32, 32, 8, 1, 1)), (128, Config(16, 16, 16, 8, 1, 1))),
}
DKDV = {
    "default": (
        (64, Config(64, 64, 32, 8, 2, 1)),
        (128, Config(64, 64, 32, 8, 2, 1)),
        (256, Config(32, 32, 32, 8, 1, 1)),
    ),
    "sm_90": (
        (64, Config(64, 128, 64, 8, 2, 1, True)),
        (128, Config(64, 128, 32, 8, 2, 1, True)),
        (256, Config(32, 64, 32, 8, 2, 1, True)),
    ),
    "sm_100": (
        (64, Config(64, 128, 64, 8, 2, 1, True)),
        (128, Config(64, 128, 32, 8, 2, 1, True)),
        (256, Config(64, 32, 32, 8, 2, 1, True)),
    ),
    "gfx942": (
        (64, Config(64, 64, 32, 4, 1, 1)),
        (128, Config(32, 64, 32, 4, 1, 1)),
        (256, Config(16, 32, 16, 4, 1, 1)),
    ),
    "fp32": ((64, Config(32, 32, 32, 8, 1, 1)), (128, Config(16, 16, 16, 8, 1, 1))),
}


@triton.jit
def _query_block(
    q_MK, do_MK, k_NK, v_NK, dq_MK, lse_M, d_M, scale_log2, limit_M, key_N, MASKED: tl.constexpr
):  # fmt: skip
    """Add what one block of keys gives to dq; query i sees the keys before limit_M[i]."""
    s_MN = tl.dot(q_MK, k_NK.T, input_precision="ieee")
    p_MN = tl.exp2(s_MN * scale_log2 - lse_M[:, None])
    dp_MN = tl.dot(do_MK, v_NK.T, input_precision="ieee")
    ds_MN = p_MN * (dp_MN - d_M[:, None])
    if MASKED:
        ds_MN = tl.where(key_N[None, :] < limit_M[:, None], ds_MN, 0.0)
    return tl.dot(ds_MN.to(k_NK.dtype), k_NK, dq_MK, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, out_ptr, do_ptr, lse_ptr, dq_ptr, d_ptr,
    offsets_ptr, ranges_ptr, tiles_ptr, scale, scale_log2, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program % H
    kv_head = head // GROUP
    tile = (program // H // (TILE // M)).to(tl.int64)
    piece = program // H % (TILE // M)
    segment = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1) - 1
    start = tl.load(ranges_ptr + 2 * last.to(tl.int64)).to(tl.int64)
    length = tl.load(ranges_ptr + 2 * last.to(tl.int64) + 1)
    m0 = tl.load(tiles_ptr + 2 * tile + 1) + (TILE // M - 1 - piece) * M
    if m0 >= length:
        return

    step_M = tl.arange(0, M)
    column_K = tl.arange(0, BLOCK_K)
    row_M = m0 + step_M
    q_ptr += (start + m0) * q_token + head.to(tl.int64) * q_head
    do_ptr += (start + m0) * do_token + head.to(tl.int64) * do_head
    out_ptr += ((start + m0) * H + head) * K
    dq_ptr += ((start + m0) * H + head) * K
    lse_ptr += head.to(tl.int64) * tokens + start + m0
    d_ptr += head.to(tl.int64) * tokens + start + m0
    packed_MK = step_M[:, None] * (H * K) + column_K[None, :]
    out_MK = load_rows(out_ptr + packed_MK, row_M, length, column_K, K, BLOCK_K, True)
    do_MK = load_rows(
        do_ptr + step_M[:, None] * do_token + column_K[None, :], row_M, length, column_K, K, BLOCK_K, True
    )
    d_M = tl.sum(out_MK.to(tl.float32) * do_MK.to(tl.float32), 1)
    tl.store(d_ptr + step_M, d_M, mask=row_M < length)
    q_MK = load_rows(q_ptr + step_M[:, None] * q_token + column_K[None, :], row_M, length, column_K, K, BLOCK_K, True)
    lse_M = tl.load(lse_ptr + step_M, mask=row_M < length, other=float("inf"))
    dq_MK = tl.zeros((M, BLOCK_K), tl.float32)

    step_N = tl.arange(0, N)
    k_ptr += kv_head.to(tl.int64) * k_head
    v_ptr += kv_head.to(tl.int64) * v_head
    k_offset_NK = step_N[:, None] * k_token + column_K[None, :]
    v_offset_NK = step_N[:, None] * v_token + column_K[None, :]
    for index in range(first, last + 1):
        base = tl.load(ranges_ptr + 2 * tl.cast(index, tl.int64))
        rows = tl.load(ranges_ptr + 2 * tl.cast(index, tl.int64) + 1)
        whole = tl.where(index == last, m0, rows) & -N
        for n0 in range(0, whole, N):
            if DESCRIPTORS:
                k_NK = k_descriptor.load([base + n0, kv_head * k_head])
                v_NK = v_descriptor.load([base + n0, kv_head * v_head])
            else:
                at = (base + n0).to(tl.int64)
                k_NK = load_rows(k_ptr + at * k_token + k_offset_NK, step_N, N, column_K, K, BLOCK_K, False)
                v_NK = load_rows(v_ptr + at * v_token + v_offset_NK, step_N, N, column_K, K, BLOCK_K, False)
            dq_MK = _query_block(q_MK, do_MK, k_NK, v_NK, dq_MK, lse_M, d_M, scale_log2, row_M, step_N, False)

    step_E = tl.arange(0, E)
    k_offset_EK = step_E[:, None] * k_token + column_K[None, :]
    v_offset_EK = step_E[:, None] * v_token + column_K[None, :]
    for index in range(first, last + 1):
        base = tl.load(ranges_ptr + 2 * tl.cast(index, tl.int64))
        rows = tl.load(ranges_ptr + 2 * tl.cast(index, tl.int64) + 1)
        own = index == last
        whole = tl.where(own, m0, rows) & -N
        end = tl.where(own, tl.minimum(m0 + M, rows), rows)
        limit_M = tl.where(own, tl.minimum(row_M + 1, rows), rows)
        for n0 in tl.range(whole, end, E, num_stages=EDGE_STAGES):
            at = (base + n0).to(tl.int64)
            k_EK = load_rows(k_ptr + at * k_token + k_offset_EK, step_E, rows - n0, column_K, K, BLOCK_K, True)
            v_EK = load_rows(v_ptr + at * v_token + v_offset_EK, step_E, rows - n0, column_K, K, BLOCK_K, True)
            dq_MK = _query_block(q_MK, do_MK, k_EK, v_EK, dq_MK, lse_M, d_M, scale_log2, limit_M, n0 + step_E, True)

    inside_MK = (row_M[:, None] < length) & (column_K[None, :] < K)
    tl.store(dq_ptr + packed_MK, (dq_MK * scale).to(dq_ptr.dtype.element_ty), mask=inside_MK)


@triton.jit
def _key_block(
    k_NK, v_NK, q_MK, do_MK, dk_NK, dv_NK, lse_M, d_M, scale_log2, since_N, query_M,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add what one block of queries gives to dk and dv; key j is seen by the queries from since_N[j] on."""
    s_NM = tl.dot(k_NK, q_MK.T, input_precision="ieee")
    p_NM = tl.exp2(s_NM * scale_log2 - lse_M[None, :])
    if MASKED:
        p_NM = tl.where(query_M[None, :] >= since_N[:, None], p_NM, 0.0)
    dv_NK = tl.dot(p_NM.to(do_MK.dtype), do_MK, dv_NK, input_precision="ieee")
    dp_NM = tl.dot(v_NK, do_MK.T, input_precision="ieee")
    ds_NM = p_NM * (dp_NM - d_M[None, :])
    dk_NK = tl.dot(ds_NM.to(q_MK.dtype), q_MK, dk_NK, input_precision="ieee")
    return dk_NK, dv_NK


@triton.jit(do_not_specialize=["tokens"])
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, q_descriptor, do_descriptor, lse_ptr, d_ptr, dk_ptr, dv_ptr,
    offsets_ptr, ranges_ptr, tiles_ptr, scale, scale_log2, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head,
    G: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    kv_head = program % G
    tile = (program // G // (TILE // N)).to(tl.int64)
    piece = program // G % (TILE // N)
    segment = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(offsets_ptr + segment)
    end = tl.load(offsets_ptr + segment + 1)
    start = tl.load(ranges_ptr + 2 * first.to(tl.int64)).to(tl.int64)
    length = tl.load(ranges_ptr + 2 * first.to(tl.int64) + 1)
    n0 = tl.load(tiles_ptr + 2 * tile + 1) + piece * N
    if n0 >= length:
        return

    step_N = tl.arange(0, N)
    column_K = tl.arange(0, BLOCK_K)
    key_N = n0 + step_N
    k_ptr += (start + n0) * k_token + kv_head.to(tl.int64) * k_head
    v_ptr += (start + n0) * v_token + kv_head.to(tl.int64) * v_head
    k_NK = load_rows(k_ptr + step_N[:, None] * k_token + column_K[None, :], key_N, length, column_K, K, BLOCK_K, True)
    v_NK = load_rows(v_ptr + step_N[:, None] * v_token + column_K[None, :], key_N, length, column_K, K, BLOCK_K, True)
    dk_NK = tl.zeros((N, BLOCK_K), tl.float32)
    dv_NK = tl.zeros((N, BLOCK_K), tl.float32)

    step_M = tl.arange(0, M)
    q_offset_MK = step_M[:, None] * q_token + column_K[None, :]
    do_offset_MK = step_M[:, None] * do_token + column_K[None, :]
    for work in range(first * GROUP, end * GROUP):
        index = work // GROUP
        head = kv_head * GROUP + work % GROUP
        base = tl.load(ranges_ptr + 2 * tl.cast(index, tl.int64))
        rows = tl.load(ranges_ptr + 2 * tl.cast(index, tl.int64) + 1)
        after = tl.where(index == first, n0 + N, 0)
        whole = after + (tl.maximum(rows - after, 0) & -M)
        lse_head_ptr = lse_ptr + head.to(tl.int64) * tokens
        d_head_ptr = d_ptr + head.to(tl.int64) * tokens
        q_head_ptr = q_ptr + head.to(tl.int64) * q_head
        do_head_ptr = do_ptr + head.to(tl.int64) * do_head
        for m0 in tl.range(after, whole, M, disable_licm=True):
            at = (base + m0).to(tl.int64)
            if DESCRIPTORS:
                q_MK = q_descriptor.load([base + m0, head * q_head])
                do_MK = do_descriptor.load([base + m0, head * do_head])
            else:
                q_MK = load_rows(q_head_ptr + at * q_token + q_offset_MK, step_M, M, column_K, K, BLOCK_K, False)
                do_MK = load_rows(do_head_ptr + at * do_token + do_offset_MK, step_M, M, column_K, K, BLOCK_K, False)
            lse_M = tl.load(lse_head_ptr + at + step_M)
            d_M = tl.load(d_head_ptr + at + step_M)
            dk_NK, dv_NK = _key_block(
                k_NK, v_NK, q_MK, do_MK, dk_NK, dv_NK, lse_M, d_M, scale_log2, key_N, step_M, False
            )

    step_E = tl.arange(0, E)
    q_offset_EK = step_E[:, None] * q_token + column_K[None, :]
    do_offset_EK = step_E[:, None] * do_token + column_K[None, :]
    for work in range(first * GROUP, end * GROUP):
        index = work // GROUP
        head = kv_head * GROUP + work % GROUP
        base = tl.load(ranges_ptr + 2 * tl.cast(index, tl.int64))
        rows = tl.load(ranges_ptr + 2 * tl.cast(index, tl.int64) + 1)
        own = index == first
        after = tl.where(own, n0 + N, 0)
        whole = after + (tl.maximum(rows - after, 0) & -M)
        # First the rows on the diagonal, rounded up to whole blocks (E is a power of two), then those left at the end.
        diagonal = tl.where(own, (tl.minimum(N, rows - n0) + E - 1) & -E, 0)
        since_N = tl.where(own, key_N, 0)
        lse_head_ptr = lse_ptr + head.to(tl.int64) * tokens
        d_head_ptr = d_ptr + head.to(tl.int64) * tokens
        q_head_ptr = q_ptr + head.to(tl.int64) * q_head
        do_head_ptr = do_ptr + head.to(tl.int64) * do_head
        masked = diagonal + tl.maximum(rows - whole, 0)
        for row in tl.range(0, masked, E, num_stages=EDGE_STAGES, disable_licm=True):
            m0 = tl.where(row < diagonal, n0 + row, whole + row - diagonal)
            at = (base + m0).to(tl.int64)
            q_EK = load_rows(q_head_ptr + at * q_token + q_offset_EK, step_E, rows - m0, column_K, K, BLOCK_K, True)
            do_EK = load_rows(do_head_ptr + at * do_token + do_offset_EK, step_E, rows - m0, column_K, K, BLOCK_K, True)
            inside_E = step_E < rows - m0
            lse_E = tl.load(lse_head_ptr + at + step_E, mask=inside_E, other=0.0)
            d_E = tl.load(d_head_ptr + at + step_E, mask=inside_E, other=0.0)
            query_E = tl.where(inside_E, m0 + step_E, -1)
            dk_NK, dv_NK = _key_block(
                k_NK, v_NK, q_EK, do_EK, dk_NK, dv_NK, lse_E, d_E, scale_log2, since_N, query_E, True
            )

    inside_NK = (key_N[:, None] < length) & (column_K[None, :] < K)
    packed_NK = ((start + n0) * G + kv_head) * K + step_N[:, None] * (G * K) + column_K[None, :]
    tl.store(dk_ptr + packed_NK, (dk_NK * scale).to(dk_ptr.dtype.element_ty), mask=inside_NK)
    tl.store(dv_ptr + packed_NK, dv_NK.to(dv_ptr.dtype.element_ty), mask=inside_NK)


def launch_backward(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, contiguous; the tables are the plan's."""
    dq_THK, dk_TGK, dv_TGK = (x.new_empty(x.shape) for x in (q_THK, k_TGK, v_TGK))
    tokens, heads, _ = q_THK.shape
    if not tokens:
        return dq_THK, dk_TGK, dv_TGK
    q_THK, k_TGK, v_TGK, do_THK = map(readable, (q_THK, k_TGK, v_TGK, do_THK))
    d_HT = torch.empty_like(lse_HT)
    kv_heads = k_TGK.shape[1]
    scales = (scale, scale * LOG2_E, tokens, *token_head_strides(q_THK, k_TGK, v_TGK, do_THK))

    config, descriptors = configure(DQ, q_THK, k_TGK, v_TGK, "key_rows")
    grid = (len(query_tiles_I2) * (TILE // config.query_rows) * heads,)
    _attention_dq_kernel[grid](
        q_THK, k_TGK, v_TGK, *descriptors, out_THK, do_THK, lse_HT, dq_THK, d_HT,
        context_offsets, context_ranges_N2, query_tiles_I2, *scales,
        H=heads, GROUP=heads // kv_heads, **compile_options(config, q_THK, descriptors),
    )  # fmt: skip

    config, descriptors = configure(DKDV, q_THK, q_THK, do_THK, "query_rows")
    grid = (len(key_tiles_I2) * (TILE // config.key_rows) * kv_heads,)
    _attention_dkdv_kernel[grid](
        q_THK, k_TGK, v_TGK, do_THK, *descriptors, lse_HT, d_HT, dk_TGK, dv_TGK,
        reader_offsets, reader_ranges_N2, key_tiles_I2, *scales,
        G=kv_heads, GROUP=heads // kv_heads, **compile_options(config, q_THK, descriptors),
    )  # fmt: skip
    return dq_THK, dk_TGK, dv_TGK
