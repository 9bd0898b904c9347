"""Log-probabilities of wanted tokens, and their sum as a loss, without ever holding the logits of all tokens.

Shape suffixes: N rows, M rows of one chunk, D hidden size, V vocabulary.
"""

import torch

from umedtrain.model.fused import kernels_for

IGNORED = -100
"""The target that means: no target here. Its log-probability is 0 and it sends no gradient."""

_ROWS = 256
"""Of a chunk of `token_cross_entropy`: more of them make its products no faster."""


def token_logprobs(
    hidden_ND: torch.Tensor,
    lm_head_weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    chunk_bytes: int = 512 * 2**20,
) -> torch.Tensor:
    """log softmax(hidden @ weight.T)[target] for every row, fp32 [N]; 0 where the target is -100.

    Rows without a target are never projected. The others go through in chunks whose fp32 logits take at most
    `chunk_bytes`, all in one buffer. What the buffer holds of the last chunk stays there for the backward pass, so
    rows that fit into one chunk are projected once; the logits of earlier chunks are made again. The softmax is fp32,
    and so is the sum of the weight's gradient over chunks, which is rounded to the weight's dtype once.

    On a GPU this is `umedtrain.kernels.linear_logprobs`: logits in the inputs' dtype, hence twice as many of 16 bits in
    a chunk, all made again in the backward pass.

    Args:
        hidden_ND: hidden states after the final norm, any floating dtype.
        lm_head_weight_VD: output projection, same dtype as `hidden_ND`.
        targets_N: int64 token ids, or -100 for none.
        chunk_bytes: bound on the bytes of the buffer.

    Raises:
        ValueError: for shapes that do not fit each other, or a target outside the vocabulary.
    """
    _check(hidden_ND, lm_head_weight_VD, targets_N, chunk_bytes)
    if kernels := kernels_for(hidden_ND):
        return kernels.linear_logprobs(hidden_ND, lm_head_weight_VD, targets_N, chunk_bytes=chunk_bytes).logprobs_N
    rows_M = _wanted_rows(targets_N, len(lm_head_weight_VD))
    chunk_rows = max(1, chunk_bytes // (4 * len(lm_head_weight_VD)))
    logp_M = _ChunkedLogprobs.apply(hidden_ND[rows_M], lm_head_weight_VD, targets_N[rows_M], chunk_rows)
    return torch.zeros_like(targets_N, dtype=torch.float32).index_put((rows_M,), logp_M)


def token_cross_entropy(
    hidden_ND: torch.Tensor,
    lm_head_weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    chunk_bytes: int = 512 * 2**20,
) -> torch.Tensor:
    """-sum of `token_logprobs`, an fp32 scalar, for a loss in which every target counts alike.

    Its gradient is known but for a factor as soon as its value is, so it is made with it: logits are made once only,
    and a chunk is no larger than is good for speed. Two gradients, of the hidden states and of the weight in fp32, are
    kept until the backward pass, which there can be one of. On a GPU this is `umedtrain.kernels.linear_cross_entropy`.

    Arguments and errors are those of `token_logprobs`.
    """
    _check(hidden_ND, lm_head_weight_VD, targets_N, chunk_bytes)
    if kernels := kernels_for(hidden_ND):
        return kernels.linear_cross_entropy(hidden_ND, lm_head_weight_VD, targets_N, chunk_bytes=chunk_bytes)
    rows_M = _wanted_rows(targets_N, len(lm_head_weight_VD))
    chunk_rows = max(1, min(_ROWS, chunk_bytes // (4 * len(lm_head_weight_VD))))
    if not torch.is_grad_enabled():  # an autograd function would not notice
        hidden_ND, lm_head_weight_VD = hidden_ND.detach(), lm_head_weight_VD.detach()
    return _ChunkedCrossEntropy.apply(hidden_ND[rows_M], lm_head_weight_VD, targets_N[rows_M], chunk_rows)


def _check(hidden_ND: torch.Tensor, lm_head_weight_VD: torch.Tensor, targets_N: torch.Tensor, chunk_bytes: int) -> None:
    if hidden_ND.ndim != 2 or lm_head_weight_VD.ndim != 2 or hidden_ND.shape[1] != lm_head_weight_VD.shape[1]:
        raise ValueError(
            f"hidden_ND {tuple(hidden_ND.shape)} and lm_head_weight_VD {tuple(lm_head_weight_VD.shape)} "
            "must be [N, D] and [V, D] with the same D"
        )
    if targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"targets_N has shape {tuple(targets_N.shape)}, wanted {tuple(hidden_ND.shape[:1])}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")


def _wanted_rows(targets_N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Numbers of the rows with a target."""
    wanted_N = targets_N != IGNORED
    outside_N = wanted_N & ((targets_N < 0) | (targets_N >= vocab_size))
    # Reading the flag would make a GPU wait for the host, so only CPU tensors are checked here; on a GPU the
    # gather below stops the run with a device-side assertion.
    if targets_N.device.type == "cpu" and outside_N.any():
        row = int(outside_N.nonzero()[0])
        raise ValueError(f"targets_N[{row}] is {int(targets_N[row])}, outside the vocabulary of {vocab_size}")
    return wanted_N.nonzero()[:, 0]


class _ChunkedLogprobs(torch.autograd.Function):
    """Rows all have targets here. d logp / d logits = onehot(target) - softmax(logits).

    Works in place: on a CPU, fresh memory for another [M, V] costs more than the arithmetic on it.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, chunk_rows):
        num_rows = len(targets_N)
        logits_MV = _buffer(min(num_rows, chunk_rows), weight_VD)
        # softmax = exp(logits - peak) / total
        picked_N, peak_N, total_N = hidden_ND.new_empty(3, num_rows, dtype=torch.float32)
        for chunk in _chunks(num_rows, chunk_rows):
            exps_MV = _project(hidden_ND[chunk], weight_VD, logits_MV)
            picked_N[chunk] = exps_MV.gather(-1, targets_N[chunk, None])[:, 0]
            peak_N[chunk] = exps_MV.amax(-1)
            exps_MV.sub_(peak_N[chunk, None]).exp_()
            total_N[chunk] = exps_MV.sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, peak_N, total_N)
        ctx.chunk_rows, ctx.last_chunk = chunk_rows, logits_MV
        return picked_N - peak_N - total_N.log()

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, weight_VD, targets_N, peak_N, total_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        logits_MV, ctx.last_chunk = ctx.last_chunk, None
        kept = logits_MV is not None  # False in a second backward pass
        if not kept:
            logits_MV = _buffer(min(len(targets_N), ctx.chunk_rows), weight_VD)
        for chunk in reversed(_chunks(len(targets_N), ctx.chunk_rows)):
            if kept:
                exps_MV = logits_MV[: chunk.stop - chunk.start]
            else:
                exps_MV = _project(hidden_ND[chunk], weight_VD, logits_MV).sub_(peak_N[chunk, None]).exp_()
            kept = False
            grad_MV = exps_MV.mul_((-grad_N[chunk] / total_N[chunk])[:, None])
            grad_MV.scatter_add_(-1, targets_N[chunk, None], grad_N[chunk, None])
            grad_MV = grad_MV.to(weight_VD.dtype)
            torch.mm(grad_MV, weight_VD, out=grad_hidden_ND[chunk])
            _add_product(grad_weight_VD, grad_MV, hidden_ND[chunk])
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Rows all have targets here. d loss / d logits = softmax(logits) - onehot(target)."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, chunk_rows):
        num_rows = len(targets_N)
        want_hidden, want_weight, *_ = ctx.needs_input_grad
        logits_MV = _buffer(min(num_rows, chunk_rows), weight_VD)
        grad_hidden_ND = torch.empty_like(hidden_ND) if want_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if want_weight else None
        losses_N = hidden_ND.new_empty(num_rows, dtype=torch.float32)
        for chunk in _chunks(num_rows, chunk_rows):
            targets_M1 = targets_N[chunk, None]
            exps_MV = _project(hidden_ND[chunk], weight_VD, logits_MV)
            picked_M1, peak_M1 = exps_MV.gather(-1, targets_M1), exps_MV.amax(-1, keepdim=True)
            total_M1 = exps_MV.sub_(peak_M1).exp_().sum(-1, keepdim=True)
            losses_N[chunk] = (peak_M1 + total_M1.log() - picked_M1)[:, 0]
            if not (want_hidden or want_weight):
                continue
            grad_MV = exps_MV.div_(total_M1)
            grad_MV.scatter_add_(-1, targets_M1, grad_MV.new_full((1, 1), -1.0).expand_as(targets_M1))
            grad_MV = grad_MV.to(weight_VD.dtype)
            if want_hidden:
                torch.mm(grad_MV, weight_VD, out=grad_hidden_ND[chunk])
            if want_weight:
                _add_product(grad_weight_VD, grad_MV, hidden_ND[chunk])
        ctx.gradients, ctx.dtype = (grad_hidden_ND, grad_weight_VD), weight_VD.dtype
        return losses_N.sum()

    @staticmethod
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("token_cross_entropy can go through one backward pass only: its gradients are used up")
        (grad_hidden_ND, grad_weight_VD), ctx.gradients = ctx.gradients, None
        if grad_hidden_ND is not None:
            grad_hidden_ND = grad_hidden_ND.mul_(grad)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.mul_(grad).to(ctx.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None


def _add_product(sum_VD: torch.Tensor, grad_MV: torch.Tensor, hidden_MD: torch.Tensor) -> None:
    """Add grad^T hidden to an fp32 sum."""
    if hidden_MD.dtype == torch.float32:
        sum_VD.addmm_(grad_MV.T, hidden_MD)
    else:
        sum_VD += grad_MV.T @ hidden_MD


def _chunks(num_rows: int, chunk_rows: int) -> list[slice]:
    """The one that is not full comes first, for the last one's logits need not be made again."""
    return [slice(max(0, end - chunk_rows), end) for end in range(num_rows, 0, -chunk_rows)][::-1]


def _buffer(num_rows: int, weight_VD: torch.Tensor) -> torch.Tensor:
    return weight_VD.new_empty(num_rows, len(weight_VD), dtype=torch.float32)


def _project(hidden_MD: torch.Tensor, weight_VD: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """fp32 logits [M, V] in the first rows of the buffer; their product is rounded to the weight's dtype."""
    logits_MV = buffer[: len(hidden_MD)]
    if weight_VD.dtype == torch.float32:
        return torch.mm(hidden_MD, weight_VD.T, out=logits_MV)
    return logits_MV.copy_(hidden_MD @ weight_VD.T)
