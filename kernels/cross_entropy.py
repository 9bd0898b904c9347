"""Cross-entropy of given logits, one loss a row.

    loss[n]          = logsumexp_v z[n, v] - z[n, target[n]]                     (0 where target[n] == ignore_index)
    d loss[n] / d z  = exp(z[n, v] - logsumexp[n]) - [v == target[n]]            (0 there)

Forward: one program a row keeps a running maximum and sum of exponentials for each lane and reduces them once, after
its last column, so that the loop holds loads and arithmetic only, no shuffle and no barrier. Of the two exponentials
of an online softmax one is always exp(0): exp(-|z - maximum|) serves as the new term or as the rescaling of the old
sum, one exp2 an element. Backward: elementwise, from the saved maximum and log-sum.

Bytes: the logits once in forward; once read and once written in backward (bf16, 8192 x 128256: 2.1 + 4.2 GB). 8 and 6
operations an element. Saved: the logits themselves, and two fp32 numbers a row: the row's maximum m and
log sum exp(z - m), kept apart because their sum has lost the digits of exp(z - logsumexp) where logits lie near 1e4.

Numerics: every logit is widened to fp32 first; the difference to the maximum is taken before the multiplication with
log2(e), which is exact where it matters. The gradient is formed in fp32 (probability - onehot, times the incoming
gradient) and rounded once, to the logits' dtype. No atomics, a fixed grid: results repeat bit for bit.

The kernels' inner loops and the gradient kernel also serve `linear_loss`, which gives them its own buffer of logits.

Shape suffixes: N or R rows, V vocabulary, C columns of a slice of it, K numbers of a row.
"""

from typing import Any

import torch

from umedtrain.kernels._dispatch import Impl, pick, use_triton
from umedtrain.kernels._op import kernel_op
from umedtrain.kernels._triton import tl, triton

FORWARD = {"default": ((1024, (2048, 4)), (2**31, (4096, 8))), "sm_100": ((2**31, (2048, 4)),)}
"""(bytes of logits that a program reads at a time, warps) of the statistics by columns."""
BACKWARD = {"default": ((1024, (2048, 4)), (2**31, (8192, 8)))}
"""(bytes of logits of a program, warps) of the gradient by columns."""

_LOWEST = -3.0e38  # below any logit, yet finite: subtracting it from itself or from -inf gives no NaN
_FLAT = -200.0  # exp of this is 0 in fp32: log-probabilities below it are cut where 0 * -inf would be NaN
_GROUP = 2**18  # elements that the twin treats at a time: bounds its fp32 temporaries, which then stay in cache


@triton.jit
def softmax_statistics(logits_ptr, columns, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """Of `columns` logits z: maximum m, sum of exp(z - m), and sum of (z - m) exp(z - m) (0 unless WITH_ENTROPY)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    lane = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        logit = tl.load(logits_ptr + start + lane, mask=lane < columns - start, other=float("-inf")).to(tl.float32)
        rise = logit - peak
        term = tl.exp2(-tl.abs(rise) * LOG2E)
        if WITH_ENTROPY:
            mixed = tl.where(rise > 0, (mixed - total * rise) * term, mixed + term * tl.maximum(rise, -200.0))
        total = tl.where(rise > 0, total * term + 1.0, total + term)
        peak = tl.maximum(peak, logit)
    top = tl.max(peak, 0)
    fall = peak - top
    scale = tl.exp2(fall * LOG2E)
    return top, tl.sum(total * scale, 0), tl.sum((mixed + fall * total) * scale, 0)


@triton.jit
def _loss_kernel(
    logits_ptr, targets_ptr, loss_ptr, peak_ptr, logsum_ptr, row_stride, vocab, ignore_index, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(peak_ptr + row, 0.0)
        tl.store(logsum_ptr + row, 0.0)
    else:
        logits_ptr += row * row_stride
        peak, total, _ = softmax_statistics(logits_ptr, vocab, False, BLOCK)
        known = (target >= 0) & (target < vocab)
        wanted = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        # An unknown target makes all that is derived from the row NaN, its gradient too.
        logsum = tl.where(known, tl.log(total), float("nan"))
        tl.store(loss_ptr + row, logsum - (wanted - peak))
        tl.store(peak_ptr + row, peak)
        tl.store(logsum_ptr + row, logsum)


@triton.jit
def _gradient_kernel(
    logits_ptr, gradient_ptr, targets_ptr, terms_ptr,
    logits_stride, gradient_stride, terms_stride, first_column, columns, tiles, ignore_index,
    WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one row; `gradient` may be the memory of `logits`. See `logit_gradients`."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < (columns - start).to(tl.int32)
    target = tl.load(targets_ptr + row).to(tl.int64)
    gradient_ptr += row * gradient_stride + start
    dtype = gradient_ptr.dtype.element_ty
    if target == ignore_index:
        tl.store(gradient_ptr + lane, tl.zeros((BLOCK,), dtype), mask=inside)
    else:
        terms_ptr += row
        logit = tl.load(logits_ptr + row * logits_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
        logp = (logit - tl.load(terms_ptr)) - tl.load(terms_ptr + terms_stride)
        direct = tl.load(terms_ptr + 2 * terms_stride)
        factor = tl.load(terms_ptr + 3 * terms_stride)
        if WITH_ENTROPY:
            tilt = tl.load(terms_ptr + 4 * terms_stride)
            entropy = tl.load(terms_ptr + 5 * terms_stride)
            factor -= tilt * (tl.maximum(logp, -200.0) + entropy)
        onehot = tl.where(lane == (target - first_column - start).to(tl.int32), direct, 0.0)
        tl.store(gradient_ptr + lane, (tl.exp2(logp * LOG2E) * factor + onehot).to(dtype), mask=inside)


def logit_gradients(
    logits_RC: torch.Tensor,
    out_RC: torch.Tensor,
    targets_R: torch.Tensor,
    terms_KR: torch.Tensor,
    *,
    first_column: int = 0,
    ignore_index: int | None = None,
    with_triton: bool,
) -> None:
    """Write onehot * direct + p * (soft - tilt * (log p + entropy)) to `out_RC`, which may be `logits_RC` itself.

    With g the gradients that reach the log-probability, the logsumexp and the entropy of a row: direct = g_logprob,
    soft = g_logsumexp - g_logprob, tilt = g_entropy.

    Args:
        logits_RC: columns `first_column` and following of the logits, unit column stride.
        out_RC: where the gradient goes, in its own dtype; rounded once from fp32.
        targets_R: target columns, counted from the vocabulary's first.
        terms_KR: fp32, unit row stride: maximum, log-sum, direct, soft, and if there is a tilt that and the entropy.
        first_column: of the slice.
        ignore_index: target of rows that get zeros; None if every row has a target.
        with_triton: the kernel, or its twin.
    """
    rows, columns = logits_RC.shape
    if not with_triton:
        _gradients_twin(logits_RC, out_RC, targets_R, terms_KR, first_column, ignore_index)
    elif rows:
        program_bytes, warps = pick(BACKWARD, columns)
        block = program_bytes // logits_RC.element_size()
        tiles = triton.cdiv(columns, block)
        strides = (logits_RC.stride(0), out_RC.stride(0), terms_KR.stride(0))
        numbers = (first_column, columns, tiles, -1 if ignore_index is None else ignore_index)
        _gradient_kernel[(rows * tiles,)](
            logits_RC, out_RC, targets_R, terms_KR, *strides, *numbers, len(terms_KR) == 6, block, num_warps=warps
        )


def _gradients_twin(
    logits_RC: torch.Tensor,
    out_RC: torch.Tensor,
    targets_R: torch.Tensor,
    terms_KR: torch.Tensor,
    first_column: int,
    ignore_index: int | None,
) -> None:
    position_R = targets_R.long() - first_column
    inside_R = position_R.clamp(0, logits_RC.shape[1] - 1)
    onehot_R = torch.where(position_R == inside_R, terms_KR[2], 0.0)
    ignored_R = None
    if ignore_index is not None and bool((targets_R == ignore_index).any()):
        ignored_R = targets_R == ignore_index
    for rows in row_groups(logits_RC):
        peak, logsum, _, factor, *tilted = terms_KR[:, rows, None]
        # In place of the output where that is fp32; a fresh tensor otherwise.
        room = out_RC[rows] if out_RC.dtype == torch.float32 else None
        gradient = torch.sub(logits_RC[rows].float(), peak, out=room).sub_(logsum)
        if tilted:
            factor = factor - tilted[0] * (gradient.clamp(min=_FLAT) + tilted[1])
        gradient.exp_().mul_(factor).scatter_add_(1, inside_R[rows, None], onehot_R[rows, None])
        if ignored_R is not None:
            gradient.masked_fill_(ignored_R[rows, None], 0.0)
        if room is None:
            out_RC[rows] = gradient


def statistics_twin(logits_RC: torch.Tensor, with_entropy: bool = False, overwrite: bool = False) -> torch.Tensor:
    """What the kernels' `softmax_statistics` gives, for every row: fp32 [2, R], or [3, R] with the mixed sum.

    With `overwrite`, fp32 logits are worked on in place, which spares a temporary.
    """
    pieces = []
    for rows in row_groups(logits_RC):
        fp32 = logits_RC[rows].float()
        peak_R = fp32.amax(1).clamp_(min=_LOWEST)
        own = overwrite or logits_RC.dtype != torch.float32
        fall = torch.sub(fp32, peak_R[:, None], out=fp32 if own else None)
        mixed = [(fall.exp() * fall.clamp(min=_FLAT)).sum(1)] if with_entropy else []
        pieces.append(torch.stack((peak_R, fall.exp_().sum(1), *mixed)))
    if not pieces:
        return logits_RC.new_empty((2 + with_entropy, 0), dtype=torch.float32)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def row_groups(logits_RC: torch.Tensor) -> list[slice]:
    """Slices of rows that together are all; one slice's fp32 copy fits a CPU's cache."""
    rows, columns = logits_RC.shape
    step = max(1, _GROUP // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def check_targets(targets_N: torch.Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError for a target on the CPU that is neither a column nor `ignore_index`."""
    outside_N = (targets_N != ignore_index) & ((targets_N < 0) | (targets_N >= vocab))
    if outside_N.any():
        row = int(outside_N.nonzero()[0])
        raise ValueError(f"targets_N[{row}] is {int(targets_N[row])}, outside the vocabulary of {vocab}")


def _forward_fake(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, ignore_index: int, with_triton: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(logits_NV.new_empty(logits_NV.shape[0], dtype=torch.float32) for _ in range(3))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits_NV, targets_N, ctx.ignore_index, ctx.with_triton = inputs
    _, peak_N, logsum_N = output
    ctx.save_for_backward(logits_NV, targets_N, peak_N, logsum_N)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, gradient_N: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, None, None, None]:
    if gradient_N is None or not ctx.needs_input_grad[0]:
        return None, None, None, None
    logits_gradient_NV = _backward(gradient_N, *ctx.saved_tensors, ctx.ignore_index, ctx.with_triton)
    return logits_gradient_NV, None, None, None


@kernel_op("cross_entropy", fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
def _forward(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, ignore_index: int, with_triton: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, vocab = logits_NV.shape
    if targets_N.device.type == "cpu":
        check_targets(targets_N, vocab, ignore_index)
    if not with_triton:
        return _forward_twin(logits_NV, targets_N, ignore_index)
    logits_NV, targets_N = _unit_columns(logits_NV), targets_N.contiguous()
    loss_N, peak_N, logsum_N = (logits_NV.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if rows:
        read_bytes, warps = pick(FORWARD, vocab)
        block = read_bytes // logits_NV.element_size()
        outputs = (loss_N, peak_N, logsum_N)
        _loss_kernel[(rows,)](
            logits_NV, targets_N, *outputs, logits_NV.stride(0), vocab, ignore_index, block, num_warps=warps
        )
    return loss_N, peak_N, logsum_N


def _forward_twin(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    vocab = logits_NV.shape[1]
    peak_N, total_N = statistics_twin(logits_NV)
    ignored_N = targets_N == ignore_index
    unknown_N = ~ignored_N & ((targets_N < 0) | (targets_N >= vocab))
    wanted_N = logits_NV.gather(1, targets_N.long().clamp(0, vocab - 1)[:, None])[:, 0].float()
    logsum_N = total_N.log().masked_fill_(unknown_N, float("nan"))
    return (logsum_N - (wanted_N - peak_N)).masked_fill_(ignored_N, 0.0), peak_N.clone(), logsum_N


def _backward_fake(gradient_N: torch.Tensor, logits_NV: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits_NV.new_empty(logits_NV.shape)


@kernel_op("cross_entropy_backward", fake=_backward_fake)
def _backward(
    gradient_N: torch.Tensor,
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    peak_N: torch.Tensor,
    logsum_N: torch.Tensor,
    ignore_index: int,
    with_triton: bool,
) -> torch.Tensor:
    out_NV = logits_NV.new_empty(logits_NV.shape)
    logit_gradients(
        _unit_columns(logits_NV),
        out_NV,
        targets_N.contiguous(),
        torch.stack((peak_N, logsum_N, -gradient_N, gradient_N)),
        ignore_index=ignore_index,
        with_triton=with_triton,
    )
    return out_NV


def _unit_columns(logits_NV: torch.Tensor) -> torch.Tensor:
    return logits_NV if logits_NV.stride(1) == 1 or logits_NV.shape[1] == 1 else logits_NV.contiguous()


def cross_entropy(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, *, ignore_index: int = -100, impl: Impl | None = None
) -> torch.Tensor:
    """logsumexp(logits[n]) - logits[n, targets[n]] for every row, fp32 [N]; 0 where the target is `ignore_index`.

    The logits are never written to: their gradient is a new tensor of their dtype, weighted by the gradient that
    reaches each row's loss. Logits may be as large as the dtype allows, and -inf (not all of a row).

    Args:
        logits_NV: bf16, fp16 or fp32; rows may have any stride. Read once here and once in backward.
        targets_N: int64 or int32 columns, or `ignore_index`.
        ignore_index: target of rows whose loss and gradient are 0; their logits are not read.
        impl: see `umedtrain.kernels`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, and for a target on the CPU that is no column. On a
            GPU such a row's loss and gradient are NaN: to look at the targets would make the host wait.
    """
    if logits_NV.ndim != 2 or logits_NV.shape[1] == 0 or not logits_NV.is_floating_point():
        raise ValueError(
            f"logits_NV is {logits_NV.dtype} {tuple(logits_NV.shape)}; it must be floating point [N, V] with V > 0"
        )
    check_target_tensor(targets_N, logits_NV, "logits_NV")
    loss_N, _, _ = _forward(logits_NV, targets_N, ignore_index, use_triton(logits_NV, impl))
    return loss_N


def check_target_tensor(targets_N: torch.Tensor, rows: torch.Tensor, name: str) -> None:
    """Raise ValueError unless `targets_N` holds one integer for each row of the tensor called `name`."""
    if targets_N.shape != rows.shape[:1]:
        raise ValueError(f"targets_N has shape {tuple(targets_N.shape)}, wanted {tuple(rows.shape[:1])}, as {name}")
    if targets_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets_N is {targets_N.dtype}; it must be int64 or int32")
    if targets_N.device != rows.device:
        raise ValueError(f"targets_N is on {targets_N.device}; it must be on {rows.device}, as {name}")
