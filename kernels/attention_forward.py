"""Flash attention forward over a packed stream: the kernel and its launcher.

    s[i, j] = q[i] . k[j]                                   for the keys j that query i sees
    m[i]    = max_j c s[i, j],      c = scale log2(e)
    l[i]    = sum_j 2^(c s[i, j] - m[i])
    out[i]  = sum_j 2^(c s[i, j] - m[i]) v[j] / l[i]
    lse[i]  = m[i] + log2(l[i])                             base 2: the backward needs 2^(c s - lse) and nothing else

The sums are formed block by block with a running m (FlashAttention-2: Dao 2023, arXiv 2307.08691). One program per
(block of M query rows, query head). It goes over the keys in two loops: all whole blocks of N keys that every row sees,
with no mask; then what is left in masked blocks of E keys: the last keys of each ancestor and the diagonal. Every row
sees the first key of the first block that it gets, so no maximum is ever -inf.

Bytes: q read, out and lse written once; K and V up to the block once per program, mostly from L2: heads are the fastest
index of the grid, so the H / G query heads of a key-value head run side by side. 4 K FLOPs a visible pair and head.

Casts: products are exact and added in fp32; probabilities are rounded to v's dtype before the second product; out is
rounded once. fp32 inputs are multiplied in full fp32, never in TF32.

Tensor descriptors (TMA) read the whole blocks on sm_90 and newer. Blocks at a segment's end always go through pointers:
a descriptor would bring in the first rows of the next segment, and a NaN there spreads even at weight zero.

Shape suffixes: T tokens, H query heads, G key-value heads, K head dimension, M rows of a query block, N rows of a key
block, E rows of a masked key block, R rows of any block.
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

FORWARD = {
    "default": (
        (64, Config(128, 64, 32, 8, 3, 1)),
        (128, Config(128, 64, 32, 8, 3, 1)),
        (256, Config(64, 32, 32, 8, 2, 1)),
    ),
    "sm_90": (
        (64, Config(128, 128, 64, 8, 3, 1, True)),
        (128, Config(128, 128, 64, 8, 3, 1, True)),
        (256, Config(128, 64, 32, 8, 2, 1, True)),
    ),
    "sm_100": (
        (64, Config(128, 128, 64, 8, 3, 1, True)),
        (128, Config(128, 128, 64, 8, 2, 1, True)),
        (256, Config(64, 32, 32, 8, 2, 1, True)),
    ),
    "gfx942": (
        (64, Config(128, 64, 32, 4, 1, 1)),
        (128, Config(128, 64, 32, 8, 1, 1)),
        (256, Config(64, 32, 32, 4, 1, 1)),
    ),
    "fp32": ((64, Config(32, 32, 32, 8, 1, 1)), (128, Config(16, 16, 16, 8, 1, 1))),
}


@triton.jit
def _attend_block(
    q_MK, k_NK, v_NK, acc_MK, max_M, sum_M, scale_log2, limit_M, key_N, MASKED: tl.constexpr
):  # fmt: skip
    """Add one block of keys to the running output, maximum and sum; query i sees the keys before limit_M[i]."""
    s_MN = tl.dot(q_MK, k_NK.T, input_precision="ieee")
    if MASKED:
        s_MN = tl.where(key_N[None, :] < limit_M[:, None], s_MN, float("-inf"))
    new_max_M = tl.maximum(max_M, tl.max(s_MN, 1) * scale_log2)
    p_MN = tl.exp2(s_MN * scale_log2 - new_max_M[:, None])
    shrink_M = tl.exp2(max_M - new_max_M)
    acc_MK = tl.dot(p_MN.to(v_NK.dtype), v_NK, acc_MK * shrink_M[:, None], input_precision="ieee")
    return acc_MK, new_max_M, sum_M * shrink_M + tl.sum(p_MN, 1)


@triton.jit(do_not_specialize=["tokens"])
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, out_ptr, lse_ptr,
    offsets_ptr, ranges_ptr, tiles_ptr, scale_log2, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head,
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
    # Later rows see more keys, so a tile's last block starts first.
    m0 = tl.load(tiles_ptr + 2 * tile + 1) + (TILE // M - 1 - piece) * M
    if m0 >= length:
        return

    step_M = tl.arange(0, M)
    step_N = tl.arange(0, N)
    column_K = tl.arange(0, BLOCK_K)
    row_M = m0 + step_M
    k_offset_NK = step_N[:, None] * k_token + column_K[None, :]
    v_offset_NK = step_N[:, None] * v_token + column_K[None, :]
    k_ptr += kv_head.to(tl.int64) * k_head
    v_ptr += kv_head.to(tl.int64) * v_head
    q_ptr += (start + m0) * q_token + head.to(tl.int64) * q_head
    q_MK = load_rows(q_ptr + step_M[:, None] * q_token + column_K[None, :], row_M, length, column_K, K, BLOCK_K, True)
    max_M = tl.full((M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    acc_MK = tl.zeros((M, BLOCK_K), tl.float32)

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
            acc_MK, max_M, sum_M = _attend_block(
                q_MK, k_NK, v_NK, acc_MK, max_M, sum_M, scale_log2, row_M, step_N, False
            )

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
            acc_MK, max_M, sum_M = _attend_block(
                q_MK, k_EK, v_EK, acc_MK, max_M, sum_M, scale_log2, limit_M, n0 + step_E, True
            )

    out_MK = (acc_MK / sum_M[:, None]).to(out_ptr.dtype.element_ty)
    out_ptr += ((start + m0) * H + head) * K
    inside_MK = (row_M[:, None] < length) & (column_K[None, :] < K)
    tl.store(out_ptr + step_M[:, None] * (H * K) + column_K[None, :], out_MK, mask=inside_MK)
    lse_ptr += head.to(tl.int64) * tokens + start + m0
    tl.store(lse_ptr + step_M, max_M + tl.log2(sum_M), mask=row_M < length)


Pair = tuple[torch.Tensor, torch.Tensor]


def forward_outputs(q_THK: torch.Tensor, keep_lse: bool = True) -> Pair:
    """Empty out [T, H, K] and fp32 lse [H, T]; [H, 0] for the twin, which needs none."""
    tokens, heads, _ = q_THK.shape
    return q_THK.new_empty(q_THK.shape), q_THK.new_empty(heads, tokens if keep_lse else 0, dtype=torch.float32)


def launch_forward(
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    offsets: torch.Tensor,
    ranges_N2: torch.Tensor,
    tiles_I2: torch.Tensor,
    scale: float,
) -> Pair:
    """out and lse; the tables are the plan's context offsets, context ranges and query tiles."""
    out_THK, lse_HT = forward_outputs(q_THK)
    tokens, heads, _ = q_THK.shape
    if not tokens:
        return out_THK, lse_HT
    q_THK, k_TGK, v_TGK = map(readable, (q_THK, k_TGK, v_TGK))
    config, descriptors = configure(FORWARD, q_THK, k_TGK, v_TGK, "key_rows")
    grid = (len(tiles_I2) * (TILE // config.query_rows) * heads,)
    _attention_forward_kernel[grid](
        q_THK, k_TGK, v_TGK, *descriptors, out_THK, lse_HT, offsets, ranges_N2, tiles_I2, scale * LOG2_E, tokens,
        *token_head_strides(q_THK, k_TGK, v_TGK), H=heads, GROUP=heads // k_TGK.shape[1],
        **compile_options(config, q_THK, descriptors),
    )  # fmt: skip
    return out_THK, lse_HT
