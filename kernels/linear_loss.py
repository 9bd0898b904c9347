"""From hidden states and the head's weight to losses, without ever holding [N, V] logits.

    z[n] = weight @ hidden[n]            logprob[n] = z[n, target[n]] - logsumexp z[n]
    entropy[n] = logsumexp z[n] - sum_v p[n, v] z[n, v],     p = softmax z

With g the gradients that reach the three outputs, the logits' gradient is

    dz[n, v] = g_logprob [v == target] + p (g_logsumexp - g_logprob - g_entropy (log p + entropy))
    d hidden = dz @ weight,     d weight = dz^T @ hidden

Rows whose target is -100 are taken out before anything is multiplied. The others pass through one buffer of
`chunk_bytes` in blocks (`linear_chunks`, `linear_passes`): a GEMM in the inputs' dtype makes logits, a kernel reads
them once for the statistics, and in backward another turns them, in the buffer, into gradients that two GEMMs read.

`linear_logprobs` makes the logits again in backward: 4 GEMMs, each of which reads the weight once while its rows fit
(8192 rows of Llama-3-8B: 4 GB of weight traffic instead of the 134 to 202 GB of chunks of 256 rows); the weight's
gradient is then one GEMM's sum, rounded as it is stored. `linear_cross_entropy` makes the gradients at once, 3 GEMMs;
its blocks span the vocabulary, so the weight is read and its fp32 gradient added to once for each (23 GB).

Order of casts: logits are rounded to the inputs' dtype by the GEMM; all softmax arithmetic is fp32; dz is rounded to
the inputs' dtype; every GEMM sums in fp32; sums over blocks are fp32 (`linear_chunks.accumulate` says where a product
is rounded on its way there) and rounded once, to the parameter's dtype.

Determinism: no atomics and a fixed order everywhere, so a call repeats bit for bit on the same device. A row's results
come from its own logits in an order that depends on the vocabulary alone: they are the same bits with other rows
beside it if the GEMM gives the same logits, which BLAS libraries do for the same number of rows, not for any number.

Shape suffixes: N rows, M rows with a target, R rows of a block, D hidden size, V vocabulary, C columns of a block.
"""

from typing import Any, NamedTuple

import torch

from umedtrain.kernels._dispatch import Impl, use_triton
from umedtrain.kernels._op import kernel_op
from umedtrain.kernels.cross_entropy import check_target_tensor, check_targets
from umedtrain.kernels.linear_chunks import CHUNK_BYTES
from umedtrain.kernels.linear_passes import gradients, loss_and_gradients, statistics

IGNORED = -100
"""The target that means: no target here."""

_SCALED = 2**22  # elements that are scaled at a time, a bound on the fp32 temporary


class LinearLogprobs(NamedTuple):
    """What `linear_logprobs` returns, fp32 [N] each, 0 in rows without a target."""

    logprobs_N: torch.Tensor
    logsumexp_N: torch.Tensor
    entropy_N: torch.Tensor | None


# --- rows with a target


def _wanted_first(targets_N: torch.Tensor, vocab: int) -> tuple[torch.Tensor, int]:
    """Row numbers, those with a target first and otherwise in order, and how many have one.

    The number sizes everything that follows, so a GPU's host waits for it here, and for nothing else.
    """
    ignored_N = targets_N == IGNORED
    outside_N = ~ignored_N & ((targets_N < 0) | (targets_N >= vocab))
    ignored, outside = torch.stack((ignored_N.sum(), outside_N.sum())).tolist()
    if outside:
        check_targets(targets_N, vocab, IGNORED)
    return ignored_N.to(torch.uint8).argsort(stable=True), len(targets_N) - ignored  # not every GPU sorts bool


def _taken(values: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
    """`values[rows_M]`, contiguous; no copy if those are all rows, which are then in order."""
    return values.contiguous() if len(rows_M) == len(values) else values[rows_M]


def _spread(values: torch.Tensor, rows_M: torch.Tensor, total: int, dim: int = 0) -> torch.Tensor:
    """Values of M rows at those rows of `total` along `dim`, zeros elsewhere; they themselves if those are all."""
    if len(rows_M) == total:
        return values
    shape = list(values.shape)
    shape[dim] = total
    return values.new_zeros(shape).index_copy_(dim, rows_M, values)


# --- linear_logprobs


def _logprobs_fake(hidden_ND: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = hidden_ND.shape[0]
    return (
        hidden_ND.new_empty((5, rows), dtype=torch.float32),
        hidden_ND.new_empty(rows, dtype=torch.int64),
        torch.empty((), dtype=torch.int64),
    )


def _logprobs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden_ND, weight_VD, targets_N, ctx.chunk_bytes, ctx.with_entropy, ctx.with_triton = inputs
    ctx.save_for_backward(hidden_ND, weight_VD, targets_N, *output)
    ctx.set_materialize_grads(False)


def _logprobs_autograd(ctx: Any, gradient_5N: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    if gradient_5N is None or not any(wanted):
        return (None,) * 6
    made = _logprobs_backward(
        gradient_5N, *ctx.saved_tensors, ctx.chunk_bytes, ctx.with_entropy, *wanted, ctx.with_triton
    )
    return *(gradient if want else None for gradient, want in zip(made, wanted, strict=True)), None, None, None, None


@kernel_op("linear_logprobs", fake=_logprobs_fake, setup_context=_logprobs_setup, backward=_logprobs_autograd)
def _logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    chunk_bytes: int,
    with_entropy: bool,
    with_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[5, N] as of `RowStatistics.merge`, 0 without a target; the rows' order; how many have one, on the CPU."""
    order_N, count = _wanted_first(targets_N, weight_VD.shape[0])
    rows_M = order_N[:count]
    statistics_5M = statistics(
        _taken(hidden_ND, rows_M),
        weight_VD,
        _taken(targets_N, rows_M),
        chunk_bytes=chunk_bytes,
        with_entropy=with_entropy,
        with_triton=with_triton,
    )
    return _spread(statistics_5M, rows_M, len(order_N), 1), order_N, torch.tensor(count)


def _logprobs_backward_fake(
    gradient_5N: torch.Tensor, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *_, want_hidden, want_weight, _ = rest
    return (
        hidden_ND.new_empty(hidden_ND.shape if want_hidden else 0),
        weight_VD.new_empty(weight_VD.shape if want_weight else 0),
    )


@kernel_op("linear_logprobs_backward", fake=_logprobs_backward_fake)
def _logprobs_backward(
    gradient_5N: torch.Tensor,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    statistics_5N: torch.Tensor,
    order_N: torch.Tensor,
    count: torch.Tensor,
    chunk_bytes: int,
    with_entropy: bool,
    want_hidden: bool,
    want_weight: bool,
    with_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows_M = order_N[: int(count)]
    direct_M, of_logsumexp_M, of_entropy_M = gradient_5N[:3].index_select(1, rows_M)
    entropy_M, peak_M, logsum_M = statistics_5N[2:].index_select(1, rows_M)
    terms = [peak_M, logsum_M, direct_M, of_logsumexp_M - direct_M]
    if with_entropy:
        terms += [of_entropy_M, entropy_M]
    hidden_gradient_MD, weight_gradient_VD = gradients(
        _taken(hidden_ND, rows_M),
        weight_VD,
        _taken(targets_N, rows_M),
        torch.stack(terms),
        chunk_bytes=chunk_bytes,
        want_hidden=want_hidden,
        want_weight=want_weight,
        with_triton=with_triton,
    )
    if want_hidden:
        hidden_gradient_MD = _spread(hidden_gradient_MD, rows_M, len(order_N))
    return hidden_gradient_MD, weight_gradient_VD


def linear_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    with_entropy: bool = False,
    impl: Impl | None = None,
) -> LinearLogprobs:
    """log softmax(hidden @ weight.T)[target], logsumexp and entropy of every row; gradients flow through all three.

    Rows with target -100 are never projected; they give 0 and get no gradient. What is returned does not depend on
    whether a gradient is wanted; backward skips what no gradient is wanted of.

    Memory: `chunk_bytes`, in backward a further fp32 [rows of a block, D] and, if more rows have a target than one
    block takes (`linear_chunks.tiled_blocks`: 16384 for 512 MB of bf16), an fp32 [V, D]. Saved: the inputs, and 28
    bytes a row.

    Args:
        hidden_ND: hidden states after the final norm, any floating dtype.
        weight_VD: the head's weight, same dtype.
        targets_N: int64 or int32 token ids, or -100 for none.
        chunk_bytes: size of the buffer of logits.
        with_entropy: whether the entropy of the softmax is taken in the same read (else None is returned for it).
        impl: see `umedtrain.kernels`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit each other, or a target outside the vocabulary.
    """
    _check(hidden_ND, weight_VD, targets_N, chunk_bytes)
    with_triton = use_triton(hidden_ND, impl)
    results_5N, _, _ = _logprobs(hidden_ND, weight_VD, targets_N, chunk_bytes, with_entropy, with_triton)
    return LinearLogprobs(results_5N[0], results_5N[1], results_5N[2] if with_entropy else None)


# --- linear_cross_entropy


def _loss_fake(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor | None,
    chunk_bytes: int,
    want_hidden: bool,
    want_weight: bool,
    with_triton: bool,
) -> tuple[torch.Tensor, ...]:
    sums = torch.promote_types(weight_VD.dtype, torch.float32)
    return (
        hidden_ND.new_empty((), dtype=torch.float32),
        hidden_ND.new_empty(hidden_ND.shape[0], dtype=torch.float32),
        hidden_ND.new_empty(hidden_ND.shape if want_hidden else 0),
        weight_VD.new_empty(weight_VD.shape if want_weight else 0, dtype=sums),
    )


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden_ND, weight_VD, _, weights_N, *_ = inputs
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if weights_N is None else weights_N.dtype)
    ctx.set_materialize_grads(False)


def _loss_autograd(ctx: Any, gradient: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    if gradient is None:
        return (None,) * 8
    logprobs_N, hidden_gradient_ND, weight_gradient_VD = ctx.saved_tensors
    made = [
        _scaled(values, factor, dtype) if needed else None
        for values, factor, dtype, needed in zip(
            (hidden_gradient_ND, weight_gradient_VD, logprobs_N),
            (gradient, gradient, -gradient),
            ctx.dtypes,
            (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3]),
            strict=True,
        )
    ]
    return made[0], made[1], None, made[2], None, None, None, None


@kernel_op("linear_cross_entropy", fake=_loss_fake, setup_context=_loss_setup, backward=_loss_autograd)
def _loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor | None,
    chunk_bytes: int,
    want_hidden: bool,
    want_weight: bool,
    with_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, log-probabilities, gradients of hidden states and weight for an incoming 1 (or of no elements)."""
    order_N, count = _wanted_first(targets_N, weight_VD.shape[0])
    rows_M = order_N[:count]
    if weights_N is None:
        weights_M = torch.ones(count, dtype=torch.float32, device=hidden_ND.device)
    else:
        weights_M = _taken(weights_N, rows_M).float()
    logp_M, hidden_gradient_MD, weight_gradient_VD = loss_and_gradients(
        _taken(hidden_ND, rows_M),
        weight_VD,
        _taken(targets_N, rows_M),
        weights_M,
        chunk_bytes=chunk_bytes,
        want_hidden=want_hidden,
        want_weight=want_weight,
        with_triton=with_triton,
    )
    loss = -(weights_M * logp_M).sum()
    if want_hidden:
        hidden_gradient_MD = _spread(hidden_gradient_MD, rows_M, len(order_N))
    return loss, _spread(logp_M, rows_M, len(order_N)), hidden_gradient_MD, weight_gradient_VD


def _scaled_fake(values: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.new_empty(values.shape, dtype=dtype)


@kernel_op("scaled", fake=_scaled_fake)
def _scaled(values: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values * factor, multiplied in fp32 whatever the dtype of `values`, and rounded once to `dtype`.

    PyTorch would round the factor itself to `values`' dtype: 1/N in bf16 is off by up to 0.2 %, in the same direction
    everywhere.
    """
    out = values.new_empty(values.shape, dtype=dtype)
    for piece, result in zip(values.view(-1).split(_SCALED), out.view(-1).split(_SCALED), strict=True):
        torch.mul(piece.float() if piece.dtype != torch.float64 else piece, factor, out=result)
    return out


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    impl: Impl | None = None,
) -> torch.Tensor:
    """sum over rows of -weights[n] * log softmax(hidden @ weight.T)[n, target[n]], an fp32 scalar.

    The fast path for losses whose weights are known beforehand: the gradients are made with the loss, in 3 GEMMs
    instead of 4, and multiplied by the scalar that reaches the loss in backward. Divide by the global number of
    targets there, or put 1 / count into `weights_N`. The value does not depend on whether a gradient is wanted.

    Memory: `chunk_bytes` and an fp32 [V, D], kept until backward together with the gradient of the hidden states.
    Backward multiplies both by its scalar in fp32; the hidden states' gradient is rounded as it is made and again then,
    the weight's only then.

    Args:
        hidden_ND: hidden states after the final norm, any floating dtype.
        weight_VD: the head's weight, same dtype.
        targets_N: int64 or int32 token ids, or -100 for none: such rows are never projected.
        weights_N: floating point [N], or None for 1. May want a gradient, which is -logprob.
        chunk_bytes: size of the buffer of logits; it holds whole rows, at least one.
        impl: see `umedtrain.kernels`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit each other, or a target outside the vocabulary.
    """
    _check(hidden_ND, weight_VD, targets_N, chunk_bytes)
    if weights_N is not None and (weights_N.shape != targets_N.shape or not weights_N.is_floating_point()):
        raise ValueError(
            f"weights_N is {weights_N.dtype} {tuple(weights_N.shape)}; it must be floating point [{len(targets_N)}]"
        )
    if weights_N is not None and weights_N.device != hidden_ND.device:
        raise ValueError(f"weights_N is on {weights_N.device}; it must be on {hidden_ND.device}, as hidden_ND")
    tracked = torch.is_grad_enabled()
    want_hidden, want_weight = tracked and hidden_ND.requires_grad, tracked and weight_VD.requires_grad
    with_triton = use_triton(hidden_ND, impl)
    loss, *_ = _loss(hidden_ND, weight_VD, targets_N, weights_N, chunk_bytes, want_hidden, want_weight, with_triton)
    return loss


def _check(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, chunk_bytes: int) -> None:
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden_ND {tuple(hidden_ND.shape)} and weight_VD {tuple(weight_VD.shape)} must be [N, D] and [V, D] "
            "with the same D"
        )
    if weight_VD.shape[0] == 0:
        raise ValueError("weight_VD has no rows; the vocabulary must have at least one token")
    if not hidden_ND.is_floating_point() or hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(f"hidden_ND is {hidden_ND.dtype} and weight_VD {weight_VD.dtype}; both must be the same float")
    if hidden_ND.device != weight_VD.device:
        raise ValueError(f"weight_VD is on {weight_VD.device}; it must be on {hidden_ND.device}, as hidden_ND")
    check_target_tensor(targets_N, hidden_ND, "hidden_ND")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
