"""How `linear_loss` cuts [N, V] logits into blocks, what a block's GEMMs are, and how many bytes that moves.

Logits are made block by block, `rows` x `columns` at a time, in one buffer of `chunk_bytes`. Which side of the matrix
the blocks run along decides what has to be read again:

    along the vocabulary (`tiled_blocks`)   all rows at once, as long as a block is at least `TILE` columns wide: the
                                            head's weight is read once by each GEMM and its gradient written once;
                                            hidden states and their gradient, 16 times smaller, go round instead
    along the rows (`whole_rows`)           all columns at once: a softmax that has not been seen before needs them

Shape suffixes: N rows with a target, R rows of a block, D hidden size, V vocabulary, C columns of a block.
"""

from dataclasses import dataclass

import torch

CHUNK_BYTES = 512 * 2**20
"""Default size of the buffer of logits."""
TILE = 16384
"""Columns over which one program takes a row's statistics; blocks are cut at multiples of it."""

# `addmm` on half-precision factors and an fp32 sum exists on GPUs since this version.
_MIXED_ADDMM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


@dataclass(frozen=True)
class Blocks:
    """How [N, V] logits are cut: `rows` x `columns` at a time, the last block of either direction possibly smaller."""

    total_rows: int
    vocab: int
    rows: int
    columns: int

    @property
    def row_slices(self) -> list[slice]:
        """One for each block of rows."""
        return _slices(self.total_rows, self.rows)

    @property
    def column_slices(self) -> list[slice]:
        """One for each block of columns."""
        return _slices(self.vocab, self.columns)


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _even(total: int, largest: int) -> int:
    """The step, at most `largest`, that cuts `total` into as few pieces as possible, of about the same size."""
    return -(-total // max(1, -(-total // largest)))


def tiled_blocks(rows: int, vocab: int, chunk_bytes: int, itemsize: int) -> Blocks:
    """As many rows as leave a block one tile of columns; then as many tiles as fit. At least one row and one tile."""
    elements = chunk_bytes // itemsize
    block_rows = max(1, _even(rows, max(1, elements // min(vocab, TILE))))
    columns = max(TILE, elements // block_rows // TILE * TILE)
    return Blocks(rows, vocab, block_rows, vocab if elements // block_rows >= vocab else min(vocab, columns))


def whole_rows(rows: int, vocab: int, chunk_bytes: int, itemsize: int) -> Blocks:
    """Blocks that are as wide as the vocabulary; at least one row."""
    return Blocks(rows, vocab, max(1, _even(rows, max(1, chunk_bytes // itemsize // vocab))), vocab)


def project(hidden_RD: torch.Tensor, weight_VD: torch.Tensor, columns: slice, buffer: torch.Tensor) -> torch.Tensor:
    """Logits [R, C] of some columns, in the inputs' dtype, in the first elements of `buffer`."""
    rows, width = hidden_RD.shape[0], columns.stop - columns.start
    logits_RC = buffer[: rows * width].view(rows, width)
    return torch.mm(hidden_RD, weight_VD[columns].T, out=logits_RC)


def accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, first: bool) -> None:
    """total = left @ right if `first`, total += left @ right otherwise, without a copy where a GEMM can do it.

    Every product is summed in fp32 inside the GEMM. `total` is fp32 or of the factors' dtype. Half-precision factors
    with an fp32 total take one GEMM on a GPU (torch 2.10 and later); elsewhere the product is rounded to the factors'
    dtype before it is added.
    """
    if total.dtype == left.dtype and first:
        torch.mm(left, right, out=total)
    elif total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    elif total.is_cuda and _MIXED_ADDMM:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


@dataclass(frozen=True)
class HeadTraffic:
    """Bytes between memory and the GEMMs of one forward and backward pass of a head, and the gradient's accumulation.

    Attributes:
        weight: reads of the weight, writes of its gradient, and both for each time that the gradient is added to.
        hidden: the same for the hidden states.
        logits: writes and reads of the logits and their gradients, by GEMMs and by the softmax kernels.
    """

    weight: int
    hidden: int
    logits: int


def head_traffic(
    tokens: int,
    hidden: int,
    vocab: int,
    chunk_bytes: int = CHUNK_BYTES,
    *,
    itemsize: int = 2,
    gradient_in_forward: bool = False,
) -> HeadTraffic:
    """What `linear_logprobs`, or with `gradient_in_forward` `linear_cross_entropy`, asks of memory; no cache modelled.

    Gradients that are summed over blocks are fp32 and their first block is only written. A last pass over a finished
    sum, to round it, costs the same however the logits are cut, and is not counted.
    """
    plan = (whole_rows if gradient_in_forward else tiled_blocks)(tokens, vocab, chunk_bytes, itemsize)
    down, across = len(plan.row_slices), len(plan.column_slices)
    weight_elements, hidden_elements, logits = vocab * hidden, tokens * hidden, tokens * vocab * itemsize
    # Logits are made once, or once more for the backward pass; one further GEMM reads the weight, and one the hidden.
    readers = 2 if gradient_in_forward else 3

    def gradient(elements: int, blocks: int, direct: bool) -> int:
        return elements * (itemsize if direct and blocks == 1 else 4 * (2 * blocks - 1))

    return HeadTraffic(
        weight=weight_elements * itemsize * down * readers + gradient(weight_elements, down, not gradient_in_forward),
        hidden=hidden_elements * itemsize * across * readers + gradient(hidden_elements, across, True),
        logits=logits * (6 if gradient_in_forward else 7),
    )


def weight_traffic(
    tokens: int,
    hidden: int,
    vocab: int,
    chunk_bytes: int = CHUNK_BYTES,
    *,
    itemsize: int = 2,
    gradient_in_forward: bool = False,
) -> int:
    """`head_traffic(...).weight`: bytes of the head's weight and its gradient in one forward and backward pass."""
    return head_traffic(
        tokens, hidden, vocab, chunk_bytes, itemsize=itemsize, gradient_in_forward=gradient_in_forward
    ).weight
