"""Sampling the next token: temperature, top-k, top-p and min-p without sorting the vocabulary.

    x_v = log2(e) / T * (logit_v - max logit)      w_v = 2^x_v      W_v = floor(2^43 w_v), an integer

Tokens stand in order of falling weight, then rising id. Of that order these are kept: the first k; of these as many
as it takes for the mass before the next to reach top_p of theirs; of these the ones with w >= min_p. What is kept is
always a prefix of the order. The token is the first by id whose cumulative W exceeds u * total, where u is a hash of
(seed, position): first among the k likeliest and those equal to the last of them; while the token found lies outside
of what is kept, the next u draws from the tokens before it. The accepted token has the wanted distribution (a refused
draw says nothing about the order of those before it), and no table of sorted tokens is needed for it.

Numerics. The exponential is a polynomial in separately rounded fp32 operations (no fused multiply-add), masses are
64-bit integers: every device gets the same bits in any order of summation, so kernel and twin draw the same token
from the same logits, thresholds are exact, and equals are equals. Tokens below 2^-43 of the likeliest have weight 0.
Log-probabilities are fp32, from the untouched logits.

Bytes. Logits are read twice, and 4 bytes per token of the vocabulary (the bits of w, padded to whole chunks) are
written once and read once by a draw that nothing cuts. A row with a top-k or top-p reads those bits, then in L2, some
15 times more for each of the two: a search over fp32 bit patterns with three pivots a pass.

Shape suffixes: B rows, V vocabulary, C chunks of the vocabulary, N tokens of a chunk.
"""

from typing import NamedTuple

import torch

from umedtrain.kernels._dispatch import Impl, use_triton
from umedtrain.kernels._op import kernel_op
from umedtrain.kernels._sampling_twin import sample_slab
from umedtrain.kernels._triton import tl, triton

CHUNK = 2048
"""Tokens per program of the first two kernels, and per step of the third one's loops."""
WARPS = {"statistics": 8, "weights": 8, "draw": 16}
MAX_VOCAB = 2**19 - 1
"""Above it a sum of weights could pass 2^62."""


class Sampled(NamedTuple):
    """What `sample` returns; see there."""

    tokens_B: torch.Tensor
    logprobs_B: torch.Tensor
    truncated_logprobs_B: torch.Tensor


@triton.jit
def _statistics_kernel(
    logits_ptr, max_ptr, argmax_ptr, sum_ptr, row_stride, vocab, chunks, CHUNK: tl.constexpr
):  # fmt: skip
    """Maximum, its lowest id, and the sum of exponentials below it, of one chunk of one row."""
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // chunks, program % chunks
    token_N = chunk * CHUNK + tl.arange(0, CHUNK)
    inside_N = token_N < vocab
    logits_N = tl.load(logits_ptr + row * row_stride + token_N, mask=inside_N, other=float("-inf")).to(tl.float32)
    peak = tl.max(logits_N, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(max_ptr + program, peak)
    tl.store(argmax_ptr + program, tl.min(tl.where(logits_N == peak, token_N, vocab - 1), 0))
    tl.store(sum_ptr + program, tl.sum(tl.exp2((logits_N - shift) * 1.4426950408889634), 0))


@triton.jit
def _weights_kernel(
    logits_ptr, temperature_ptr, max_ptr, keys_ptr, mass_ptr, row_stride, vocab, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Bits of every weight of a chunk, and the chunk's mass. Launched without fused multiply-add."""
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // chunks, program % chunks
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        chunk_C = tl.arange(0, CHUNKS)
        peak = tl.max(tl.load(max_ptr + row * chunks + chunk_C, mask=chunk_C < chunks, other=float("-inf")), 0)
        token_N = chunk * CHUNK + tl.arange(0, CHUNK)
        logits_N = tl.load(logits_ptr + row * row_stride + token_N, mask=token_N < vocab, other=float("-inf"))
        # Not infinite at the smallest temperatures, for 0 * inf is NaN.
        scale = tl.minimum(tl.div_rn(1.4426950408889634, temperature), 3.0e38)
        x_N = (logits_N.to(tl.float32) - peak) * scale
        # NaN, like anything too small, compares false.
        counts_N = x_N >= -43.0
        x_N = tl.where(counts_N, x_N, 0.0)
        whole_N = tl.floor(x_N + 0.5)
        f_N = x_N - whole_N
        p_N = f_N * 0.00015353361959569156 + 0.0013398873852565885
        p_N = p_N * f_N + 0.00961843691766262
        p_N = p_N * f_N + 0.055503323674201965
        p_N = p_N * f_N + 0.24022647738456726
        p_N = p_N * f_N + 0.6931471824645996
        p_N = p_N * f_N + 1.0
        key_N = tl.where(counts_N, p_N.to(tl.int32, bitcast=True) + (whole_N.to(tl.int32) << 23), 0)
        tl.store(keys_ptr + row * chunks * CHUNK + token_N, key_N)
        tl.store(mass_ptr + program, tl.sum(_fixed_point(key_N), 0))


@triton.jit
def _fixed_point(key):
    """floor(2^43 w) as int64, for the bits of a w in [0, 1]; 0 for 0."""
    mantissa = ((key & 0x7FFFFF) | 0x800000).to(tl.int64) << 20
    return mantissa >> tl.minimum(127 - (key >> 23), 63).to(tl.int64)


@triton.jit
def _derived_key(key, index):
    """Output number `index` of the SplitMix64 generator that starts at `key`."""
    z = key + (index + 1) * -7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def _share(total, fraction):
    """floor(total * fraction / 2^62) of int64 in [0, 2^62), the fraction up to 2^62, without 128-bit integers."""
    total_high, total_low = total >> 31, total & 0x7FFFFFFF
    high, low = fraction >> 31, fraction & 0x7FFFFFFF
    return total_high * high + ((total_high * low + total_low * high + ((total_low * low) >> 31)) >> 31)


@triton.jit
def _threshold(keys_ptr, padded, limit, low, above_low, COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """The smallest key above `low` with less than `limit` of mass, or tokens, above it; at `low` there is not less.

    Returns the key, what is above it, and what is at it.
    """
    high = low * 0 + 0x3F800000
    above_high = above_low * 0
    while high - low > 1:
        width = high - low
        pivot_1 = low + tl.maximum(width // 4, 1)
        pivot_2 = low + tl.maximum(width // 2, 1)
        pivot_3 = tl.minimum(high - width // 4, high - 1)
        sums_1 = tl.zeros((CHUNK,), tl.int32 if COUNT else tl.int64)
        sums_2, sums_3 = sums_1, sums_1
        for start in range(0, padded, CHUNK):
            key_N = tl.load(keys_ptr + start + tl.arange(0, CHUNK))
            measure_N = tl.full((CHUNK,), 1, tl.int32) if COUNT else _fixed_point(key_N)
            sums_1 += tl.where(key_N > pivot_1, measure_N, 0)
            sums_2 += tl.where(key_N > pivot_2, measure_N, 0)
            sums_3 += tl.where(key_N > pivot_3, measure_N, 0)
        above_1, above_2, above_3 = tl.sum(sums_1, 0), tl.sum(sums_2, 0), tl.sum(sums_3, 0)
        # The pivots ascend, so what is above them falls.
        if above_1 < limit:
            high, above_high = pivot_1, above_1.to(tl.int64)
        elif above_2 < limit:
            low, above_low = pivot_1, above_1.to(tl.int64)
            high, above_high = pivot_2, above_2.to(tl.int64)
        elif above_3 < limit:
            low, above_low = pivot_2, above_2.to(tl.int64)
            high, above_high = pivot_3, above_3.to(tl.int64)
        else:
            low, above_low = pivot_3, above_3.to(tl.int64)
    return high, above_high, above_low - above_high


@triton.jit
def _mass_above(keys_ptr, padded, key, CHUNK: tl.constexpr):
    sums_N = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, padded, CHUNK):
        key_N = tl.load(keys_ptr + start + tl.arange(0, CHUNK))
        sums_N += tl.where(key_N > key, _fixed_point(key_N), 0)
    return tl.sum(sums_N, 0)


@triton.jit
def _measure(key_N, token_N, key, before, TIES: tl.constexpr):
    """Per token, int64: 1 at `key`, for TIES; else the weight, if above `key`, or at it with an id below `before`."""
    if TIES:
        return (key_N == key).to(tl.int64)
    return tl.where((key_N > key) | ((key_N == key) & (token_N < before)), _fixed_point(key_N), 0)


@triton.jit
def _chunk_sums(keys_ptr, padded, key, before, TIES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The measure of every chunk, int64 [C]."""
    sums_C = tl.zeros((CHUNKS,), tl.int64)
    for start in range(0, padded, CHUNK):
        token_N = start + tl.arange(0, CHUNK)
        measure = tl.sum(_measure(tl.load(keys_ptr + token_N), token_N, key, before, TIES), 0)
        sums_C = tl.where(tl.arange(0, CHUNKS) == start // CHUNK, measure, sums_C)
    return sums_C


@triton.jit
def _first_past(
    keys_ptr, sums_C, target, last, key, before, TIES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """The first id at which the cumulative measure exceeds `target`; at most `last`."""
    chunk = tl.sum((tl.cumsum(sums_C, 0) <= target).to(tl.int64), 0)
    chunk = tl.minimum(chunk, last // CHUNK)
    rest = target - tl.sum(tl.where(tl.arange(0, CHUNKS) < chunk, sums_C, 0), 0)
    token_N = chunk * CHUNK + tl.arange(0, CHUNK)
    measure_N = _measure(tl.load(keys_ptr + token_N), token_N, key, before, TIES)
    return tl.min(tl.where(tl.cumsum(measure_N, 0) > rest, token_N, last), 0)


@triton.jit
def _draw_kernel(
    logits_ptr, keys_ptr, mass_ptr, max_ptr, argmax_ptr, sum_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    token_ptr, logprob_ptr, truncated_ptr, row_stride, vocab, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk_C = tl.arange(0, CHUNKS)
    inside_C = chunk_C < chunks
    max_C = tl.load(max_ptr + row * chunks + chunk_C, mask=inside_C, other=float("-inf"))
    peak = tl.max(max_C, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    sum_C = tl.load(sum_ptr + row * chunks + chunk_C, mask=inside_C, other=0.0)
    log_sum = tl.log(tl.sum(sum_C * tl.exp2((max_C - shift) * 1.4426950408889634), 0))

    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        keys_ptr += row * chunks * CHUNK
        padded = chunks * CHUNK
        sums_C = tl.load(mass_ptr + row * chunks + chunk_C, mask=inside_C, other=0)
        total = tl.sum(sums_C, 0)
        # Tokens above `draw_key` are drawn from; those above `key`, or at it with an id below `before`, are kept.
        draw_key, drawn = tl.full((), -1, tl.int32), total
        key = draw_key
        zero = total * 0
        before, kept_ties, ties = zero + vocab, zero, zero
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        if (top_k > 0) & (top_k < vocab):
            key, above, ties = _threshold(keys_ptr, padded, top_k, draw_key, zero + padded, True, CHUNK)
            kept_ties = top_k - above
            weight = _fixed_point(key)
            above = _mass_above(keys_ptr, padded, key, CHUNK)
            draw_key, drawn = key - 1, above + ties * weight
            total = above + kept_ties * weight
        if (top_p < 1) & (total > 0):
            # Multiplying by a power of two is exact, so this rounds down, and equal masses stay equal.
            fraction = (tl.maximum(top_p, 0.0) * 2147483648.0).to(tl.int64) << 31
            limit = tl.maximum(_share(total, fraction), 1)
            key, above, ties = _threshold(keys_ptr, padded, limit, draw_key, drawn, False, CHUNK)
            weight = _fixed_point(key)
            kept_ties, ties = (limit - above + weight - 1) // weight, ties // weight
            total = above + kept_ties * weight
        if kept_ties < ties:
            sums_at_key_C = _chunk_sums(keys_ptr, padded, key, 0, True, CHUNK, CHUNKS)
            before = 1 + _first_past(keys_ptr, sums_at_key_C, kept_ties - 1, vocab - 1, key, 0, True, CHUNK, CHUNKS)
        if min_p > 0:
            floor_key = tl.minimum(min_p, 1.0).to(tl.int32, bitcast=True) - 1
            draw_key = tl.maximum(draw_key, floor_key)
            if floor_key >= key:
                key, before = floor_key, zero
                total = _mass_above(keys_ptr, padded, key, CHUNK)
        if draw_key >= 0:
            sums_C = _chunk_sums(keys_ptr, padded, draw_key, 0, False, CHUNK, CHUNKS)

        stream = _derived_key(tl.load(seed_ptr + row), tl.load(position_ptr + row).to(tl.int64))
        attempt, draw_before, token = zero, zero, zero - 1
        while token < 0:
            uniform = (_derived_key(stream, attempt) >> 2) & 0x3FFFFFFFFFFFFFFF
            mass = tl.sum(sums_C, 0)
            candidate = _first_past(
                keys_ptr, sums_C, _share(mass, uniform), vocab - 1, draw_key, draw_before, False, CHUNK, CHUNKS
            )  # fmt: skip
            candidate_key = tl.load(keys_ptr + candidate)
            # A mass of 0 means logits that are not numbers: any token will do, its log-probability is NaN.
            is_kept = (candidate_key > key) | ((candidate_key == key) & (candidate < before)) | (mass == 0)
            if is_kept:
                token = candidate
            else:
                draw_key = candidate_key
                draw_before = candidate
                sums_C = _chunk_sums(keys_ptr, padded, draw_key, draw_before, False, CHUNK, CHUNKS)
                attempt += 1
        logit = tl.load(logits_ptr + row * row_stride + token).to(tl.float32)
        log_total = tl.log(total.to(tl.float32) * 1.1368683772161603e-13)
        truncated = tl.div_rn(logit - peak, temperature) - log_total
    else:
        argmax_C = tl.load(argmax_ptr + row * chunks + chunk_C, mask=inside_C, other=0)
        token = tl.min(tl.where(inside_C & (max_C == peak), argmax_C, vocab - 1), 0).to(tl.int64)
        logit = tl.load(logits_ptr + row * row_stride + token).to(tl.float32)
        truncated = tl.full((), 0.0, tl.float32)
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, logit - peak - log_sum)
    tl.store(truncated_ptr + row, truncated)


def _fake(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    min_p_B: torch.Tensor,
    seeds_B: torch.Tensor,
    positions_B: torch.Tensor,
    use_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens_B = seeds_B.new_empty(len(seeds_B))
    logprobs_B, truncated_B = (torch.empty_like(tokens_B, dtype=torch.float32) for _ in range(2))
    return tokens_B, logprobs_B, truncated_B


@kernel_op("sample", fake=_fake)
def _sample(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    min_p_B: torch.Tensor,
    seeds_B: torch.Tensor,
    positions_B: torch.Tensor,
    use_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, vocab = logits_BV.shape
    params = [x_B.contiguous() for x_B in (temperature_B, top_k_B, top_p_B, min_p_B, seeds_B, positions_B)]
    if not use_kernel:
        slab = max(1, min(64, (1 << 20) // vocab))
        args = [x.split(slab) for x in (logits_BV, *params)]
        parts = [sample_slab(*slabs) for slabs in zip(*args, strict=True)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    chunks = triton.cdiv(vocab, CHUNK)
    device = logits_BV.device
    max_BC = torch.empty(rows, chunks, device=device)
    sum_BC = torch.empty_like(max_BC)
    argmax_BC = torch.empty_like(max_BC, dtype=torch.int32)
    mass_BC = torch.empty_like(max_BC, dtype=torch.int64)
    keys_BV = torch.empty(rows, chunks * CHUNK, dtype=torch.int32, device=device)
    token_B = torch.empty(rows, dtype=torch.int64, device=device)
    logprob_B, truncated_B = torch.empty(rows, device=device), torch.empty(rows, device=device)
    if not rows:
        return token_B, logprob_B, truncated_B
    sizes = (logits_BV.stride(0), vocab, chunks)
    blocks = {"CHUNK": CHUNK, "CHUNKS": triton.next_power_of_2(chunks)}
    _statistics_kernel[(rows * chunks,)](
        logits_BV, max_BC, argmax_BC, sum_BC, *sizes, CHUNK=CHUNK, num_warps=WARPS["statistics"]
    )
    _weights_kernel[(rows * chunks,)](
        logits_BV, params[0], max_BC, keys_BV, mass_BC, *sizes, **blocks,
        num_warps=WARPS["weights"], enable_fp_fusion=False,
    )  # fmt: skip
    _draw_kernel[(rows,)](
        logits_BV, keys_BV, mass_BC, max_BC, argmax_BC, sum_BC, *params, token_B, logprob_B, truncated_B, *sizes,
        **blocks, num_warps=WARPS["draw"],
    )  # fmt: skip
    return token_B, logprob_B, truncated_B


def sample(
    logits_BV: torch.Tensor,
    *,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    min_p_B: torch.Tensor,
    seeds_B: torch.Tensor,
    positions_B: torch.Tensor,
    impl: Impl | None = None,
) -> Sampled:
    """One token per row, from softmax(logits / temperature) cut by top-k, then top-p, then min-p.

    A row's token depends on its logits, parameters, seed and position only. Values of the parameters are not
    checked, for that would wait for the device; the ranges below cover all of them.

    Args:
        logits_BV: fp32, bf16 or fp16, up to 524287 columns.
        temperature_B: fp32; 0 (or less, or NaN) takes the likeliest token, the lowest id among equals.
        top_k_B: int64 or int32; below 1 or from V on, all tokens are kept.
        top_p_B: fp32 or fp64; the smallest set of tokens with this share of the mass that top-k leaves, at least one;
            from 1 on, all. Used to 31 bits, rounded down.
        min_p_B: fp32; tokens are kept whose probability is at least this share of the likeliest one's; 0 for all.
        seeds_B: int64, a well mixed key per sample.
        positions_B: int64 or int32, the token's number in its sample.
        impl: see `umedtrain.kernels._dispatch`.

    Returns:
        tokens int64 [B]; fp32 [B] natural-log probabilities of the tokens under softmax(logits), and under the
        distribution that the token was drawn from (0 for a greedy row). Rows with logits that are NaN or +inf, or
        that are all -inf, get a valid token and NaN as the first of the two.

    Raises:
        ValueError: for wrong shapes, dtypes or devices, and logits that require a gradient.
    """
    if logits_BV.ndim != 2 or logits_BV.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits_BV must be fp32, bf16 or fp16 [B, V], got {logits_BV.dtype} {list(logits_BV.shape)}")
    if not 1 <= logits_BV.shape[1] <= MAX_VOCAB:
        raise ValueError(f"logits_BV must have 1 to {MAX_VOCAB} columns, got {logits_BV.shape[1]}")
    if torch.is_grad_enabled() and logits_BV.requires_grad:
        raise ValueError("logits_BV must not require a gradient, for sampling has none; call it under torch.no_grad()")
    integer = (torch.int64, torch.int32)
    wanted = {
        "temperature_B": (temperature_B, (torch.float32,)),
        "top_k_B": (top_k_B, integer),
        "top_p_B": (top_p_B, (torch.float32, torch.float64)),
        "min_p_B": (min_p_B, (torch.float32,)),
        "seeds_B": (seeds_B, (torch.int64,)),
        "positions_B": (positions_B, integer),
    }
    for name, (x_B, dtypes) in wanted.items():
        if x_B.shape != logits_BV.shape[:1] or x_B.dtype not in dtypes or x_B.device != logits_BV.device:
            raise ValueError(
                f"{name} must be {' or '.join(map(str, dtypes))} [{len(logits_BV)}] on {logits_BV.device}, "
                f"got {x_B.dtype} {list(x_B.shape)} on {x_B.device}"
            )
    params = (temperature_B, top_k_B, top_p_B, min_p_B, seeds_B, positions_B)
    return Sampled(*_sample(logits_BV, *params, use_triton(logits_BV, impl)))
