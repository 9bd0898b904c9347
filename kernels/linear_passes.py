"""The passes over blocks of logits that `linear_loss` is made of: statistics, gradients, or both at once.

Every pass makes a block of logits with a GEMM, in a buffer that all blocks share, and runs kernels on it in place.

A row's statistics are taken over tiles of `TILE` columns counted from the first column of the vocabulary, then merged
over tiles in order: how the logits were cut into blocks does not show in the result. One program takes one tile of one
row, with the loop of `cross_entropy`: a running maximum and sum for each lane, one reduction at the end.

Bytes: each block is written once by its GEMM and read once for the statistics; for gradients it is read and written
once more, and read by two GEMMs.

Shape suffixes: N rows with a target, R rows of a block, D hidden size, V vocabulary, C columns of a block, T tiles,
K statistics.
"""

import torch

from umedtrain.kernels._dispatch import pick
from umedtrain.kernels._triton import tl, triton
from umedtrain.kernels.cross_entropy import FORWARD, logit_gradients, softmax_statistics, statistics_twin
from umedtrain.kernels.linear_chunks import TILE, accumulate, project, tiled_blocks, whole_rows


@triton.jit
def _partials_kernel(
    logits_ptr, targets_ptr, wanted_ptr, partials_ptr,
    row_stride, columns, first_column, tiles, first_tile, all_tiles, plane,
    TILE: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one row. Whichever holds the target copies its logit."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    width = tl.minimum(columns - tile * TILE, TILE).to(tl.int32)
    logits_ptr += row * row_stride + tile * TILE
    peak, total, mixed = softmax_statistics(logits_ptr, width, WITH_ENTROPY, BLOCK)
    partials_ptr += row * all_tiles + first_tile + tile
    tl.store(partials_ptr, peak)
    tl.store(partials_ptr + plane, total)
    if WITH_ENTROPY:
        tl.store(partials_ptr + 2 * plane, mixed)
    position = tl.load(targets_ptr + row).to(tl.int64) - first_column - tile * TILE
    if (position >= 0) & (position < width):
        tl.store(wanted_ptr + row, tl.load(logits_ptr + position).to(tl.float32))


class RowStatistics:
    """Softmax statistics of R rows: filled block by block with `add`, tile by tile inside, and merged by `merge`."""

    def __init__(self, like: torch.Tensor, rows: int, vocab: int, *, with_entropy: bool, with_triton: bool) -> None:
        self.with_entropy, self.with_triton = with_entropy, with_triton
        # Maximum, sum and mixed sum of each tile; the target's logit.
        self.partials_KRT = like.new_empty((2 + with_entropy, rows, -(-vocab // TILE)), dtype=torch.float32)
        self.wanted_R = like.new_empty(rows, dtype=torch.float32)

    def add(self, logits_RC: torch.Tensor, targets_R: torch.Tensor, first_column: int, *, keep: bool) -> None:
        """Read a block of logits, once; `first_column` is a multiple of `TILE`. They may be lost unless `keep`."""
        if self.with_triton:
            self._add_with_triton(logits_RC, targets_R, first_column)
        else:
            self._add_with_torch(logits_RC, targets_R, first_column, keep)

    def _add_with_triton(self, logits_RC: torch.Tensor, targets_R: torch.Tensor, first_column: int) -> None:
        rows, columns = logits_RC.shape
        tiles, (_, _, all_tiles) = triton.cdiv(columns, TILE), self.partials_KRT.shape
        read_bytes, warps = pick(FORWARD, min(columns, TILE))
        block = read_bytes // logits_RC.element_size()
        pointers = (logits_RC, targets_R, self.wanted_R, self.partials_KRT)
        numbers = (logits_RC.stride(0), columns, first_column, tiles, first_column // TILE, all_tiles, rows * all_tiles)
        _partials_kernel[(rows * tiles,)](*pointers, *numbers, TILE, self.with_entropy, block, num_warps=warps)

    def _add_with_torch(self, logits_RC: torch.Tensor, targets_R: torch.Tensor, first_column: int, keep: bool) -> None:
        columns = logits_RC.shape[1]
        position_R = targets_R.long() - first_column
        inside_R = position_R.clamp(0, columns - 1)
        logit_R = logits_RC.gather(1, inside_R[:, None])[:, 0].float()
        self.wanted_R = torch.where(position_R == inside_R, logit_R, self.wanted_R)
        for start in range(0, columns, TILE):
            tile_RC = logits_RC[:, start : start + TILE]
            partials_KR = statistics_twin(tile_RC, self.with_entropy, overwrite=not keep)
            self.partials_KRT[:, :, (first_column + start) // TILE] = partials_KR

    def merge(self) -> torch.Tensor:
        """fp32 [5, R]: log-probability of the target, logsumexp, entropy (or zeros), maximum, log-sum."""
        peaks_RT, totals_RT, *mixed = self.partials_KRT
        peak_R = peaks_RT.amax(1)
        fall_RT = peaks_RT - peak_R[:, None]
        scale_RT = fall_RT.exp()
        total_R = (totals_RT * scale_RT).sum(1)
        logsum_R = total_R.log()
        # The difference to the maximum first: both are near each other, their sum with the log-sum may be near 1e4.
        logp_R = (self.wanted_R - peak_R) - logsum_R
        entropy_R = torch.zeros_like(logp_R)
        if self.with_entropy:
            entropy_R = logsum_R - ((mixed[0] + fall_RT * totals_RT) * scale_RT).sum(1) / total_R
        return torch.stack((logp_R, peak_R + logsum_R, entropy_R, peak_R, logsum_R))


def statistics(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    chunk_bytes: int,
    with_entropy: bool,
    with_triton: bool,
) -> torch.Tensor:
    """fp32 [5, N] as of `RowStatistics.merge`, for rows that all have a target."""
    vocab = weight_VD.shape[0]
    plan = tiled_blocks(len(hidden_ND), vocab, chunk_bytes, hidden_ND.element_size())
    buffer = hidden_ND.new_empty(plan.rows * plan.columns)
    merged = []
    for rows in plan.row_slices:
        hidden_RD, targets_R = hidden_ND[rows], targets_N[rows]
        of_block = RowStatistics(hidden_RD, len(hidden_RD), vocab, with_entropy=with_entropy, with_triton=with_triton)
        for columns in plan.column_slices:
            logits_RC = project(hidden_RD, weight_VD, columns, buffer)
            of_block.add(logits_RC, targets_R, columns.start, keep=False)
        merged.append(of_block.merge())
    if not merged:
        return hidden_ND.new_empty((5, 0), dtype=torch.float32)
    return merged[0] if len(merged) == 1 else torch.cat(merged, 1)


def gradients(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    terms_KN: torch.Tensor,
    *,
    chunk_bytes: int,
    want_hidden: bool,
    want_weight: bool,
    with_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden states and weight, from logits made again, for rows that all have a target.

    What is not wanted has no elements. What one GEMM sums is rounded as it is stored; sums over blocks are fp32.

    Args:
        hidden_ND: as the weight and the targets, what `statistics` had.
        weight_VD: see above.
        targets_N: see above.
        terms_KN: as of `cross_entropy.logit_gradients`.
        chunk_bytes: size of the buffer of logits.
        want_hidden: whether the first result is wanted.
        want_weight: whether the second is.
        with_triton: the kernels, or their twins.
    """
    plan = tiled_blocks(len(hidden_ND), weight_VD.shape[0], chunk_bytes, hidden_ND.element_size())
    buffer = hidden_ND.new_empty(plan.rows * plan.columns)
    dtype = weight_VD.dtype
    sums = torch.promote_types(dtype, torch.float32)
    hidden_gradient_ND = _gradient_of(hidden_ND, dtype, wanted=want_hidden)
    weight_gradient_VD = _gradient_of(weight_VD, sums if len(plan.row_slices) > 1 else dtype, wanted=want_weight)
    for rows in plan.row_slices:
        hidden_RD, targets_R, terms_KR = hidden_ND[rows], targets_N[rows], terms_KN[:, rows]
        sum_RD = hidden_gradient_ND[rows]
        apart = want_hidden and sums != dtype and len(plan.column_slices) > 1
        if apart:
            sum_RD = torch.empty_like(sum_RD, dtype=sums)
        for columns in plan.column_slices:
            logits_RC = project(hidden_RD, weight_VD, columns, buffer)
            logit_gradients(
                logits_RC, logits_RC, targets_R, terms_KR, first_column=columns.start, with_triton=with_triton
            )
            if want_hidden:
                accumulate(sum_RD, logits_RC, weight_VD[columns], first=columns.start == 0)
            if want_weight:
                accumulate(weight_gradient_VD[columns], logits_RC.T, hidden_RD, first=rows.start == 0)
        if apart:
            hidden_gradient_ND[rows] = sum_RD
    if len(hidden_ND) == 0:
        weight_gradient_VD.zero_()
    return hidden_gradient_ND, weight_gradient_VD.to(dtype)


def loss_and_gradients(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    chunk_bytes: int,
    want_hidden: bool,
    want_weight: bool,
    with_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 log-probabilities, and the gradients of sum(-weights * logprobs) for hidden states and weight.

    All rows have a target. What is not wanted has no elements. The weight's gradient is the fp32 sum, not yet rounded.
    """
    vocab = weight_VD.shape[0]
    plan = whole_rows(len(hidden_ND), vocab, chunk_bytes, hidden_ND.element_size())
    buffer = hidden_ND.new_empty(plan.rows * plan.columns)
    logp_N = torch.empty_like(weights_N)
    hidden_gradient_ND = _gradient_of(hidden_ND, hidden_ND.dtype, wanted=want_hidden)
    weight_gradient_VD = _gradient_of(
        weight_VD, torch.promote_types(weight_VD.dtype, torch.float32), wanted=want_weight
    )
    for rows in plan.row_slices:
        hidden_RD, targets_R, weights_R = hidden_ND[rows], targets_N[rows], weights_N[rows]
        logits_RV = project(hidden_RD, weight_VD, slice(0, vocab), buffer)
        of_block = RowStatistics(hidden_RD, len(hidden_RD), vocab, with_entropy=False, with_triton=with_triton)
        of_block.add(logits_RV, targets_R, 0, keep=want_hidden or want_weight)
        logp_N[rows], _, _, peak_R, logsum_R = of_block.merge()
        if not (want_hidden or want_weight):
            continue
        terms_KR = torch.stack((peak_R, logsum_R, -weights_R, weights_R))
        logit_gradients(logits_RV, logits_RV, targets_R, terms_KR, with_triton=with_triton)
        if want_hidden:
            torch.mm(logits_RV, weight_VD, out=hidden_gradient_ND[rows])
        if want_weight:
            accumulate(weight_gradient_VD, logits_RV.T, hidden_RD, first=rows.start == 0)
    if len(hidden_ND) == 0:
        weight_gradient_VD.zero_()
    return logp_N, hidden_gradient_ND, weight_gradient_VD


def _gradient_of(values: torch.Tensor, dtype: torch.dtype, *, wanted: bool) -> torch.Tensor:
    return values.new_empty(values.shape if wanted else 0, dtype=dtype)
