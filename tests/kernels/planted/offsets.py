"""Offsets in 32 bits. The lines that must be found, and no others, end in a comment that says so."""

import torch

from umedtrain.kernels._triton import tl, triton


@triton.jit
def scaled(index, stride):
    return index * stride  # found


@triton.jit
def offsets(x_ptr, index_ptr, out_ptr, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    total = tl.load(x_ptr + row * BLOCK + column)  # found
    total += tl.load(x_ptr + row * stride + column)  # found
    total += tl.load(x_ptr + ((row + 1) * stride).to(tl.int64) + column)  # found
    total += tl.load(x_ptr + scaled(row + 2, stride) + column)
    total += tl.load(x_ptr + tl.load(index_ptr + row) * stride + column)  # found
    total += tl.load(x_ptr + n * stride + column)  # found
    for j in range(0, n):
        total += tl.load(x_ptr + j * stride + column)  # found
        total += tl.load(x_ptr + j.to(tl.int64) * stride + column)
        total += tl.load(x_ptr + j + column)
    offset = column
    for _ in range(0, n):
        total += tl.load(x_ptr + offset)
        offset = tl.where(total > 0, offset, column + (row - 1) * stride)  # found
    wide = row.to(tl.int64)
    rows = row * BLOCK + column
    total += tl.load(x_ptr + wide * stride + column)
    total += tl.load(x_ptr + rows.to(tl.int64) * stride)
    total += tl.load(x_ptr + row % 8 + column)
    total += tl.load(x_ptr + 3 * stride + column)
    tl.store(out_ptr + wide * BLOCK + column, total)


def cases(shape):
    def launch():
        x, index = torch.empty(1 << 16, device="meta"), torch.empty(64, dtype=torch.int32, device="meta")
        offsets[(64,)](x, index, x, 1008, 100, BLOCK=128)

    return {"offsets": launch}
