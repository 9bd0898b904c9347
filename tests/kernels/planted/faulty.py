"""A spill, a 32-bit offset, an atomic sum of floats, double precision, a compiler that fails and one that dies."""

import os

import torch

from tests.kernels.planted.clean import centre_rows
from umedtrain.kernels._triton import tl, triton


@triton.jit
def offset_32(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    tl.store(out_ptr + row * stride + column, tl.load(x_ptr + (row * stride).to(tl.int64) + column))


@triton.jit
def atomic_sum(x_ptr, out_ptr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + column, tl.load(x_ptr + tl.program_id(0).to(tl.int64) * BLOCK + column))


@triton.jit
def double(x_ptr, out_ptr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column).to(tl.float64)
    tl.store(out_ptr + column, (x * 0.1).to(tl.float32))


@triton.jit
def wrong(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + tl.arange(0, 3))


def cases(shape):
    x = torch.empty(64, 8192, device="meta")
    return {
        # 256 elements of a row for each of 32 threads, all needed after the sum
        "spill": lambda: centre_rows[(64,)](x, x, 8192, 8192, BLOCK=8192, num_warps=1),
        "offset": lambda: offset_32[(64,)](x, x, 8192, BLOCK=1024),
        "atomic": lambda: atomic_sum[(64,)](x, x, BLOCK=1024),
        "double": lambda: double[(1,)](x, x, BLOCK=1024),
        "refused": lambda: wrong[(1,)](x),
        "dies": os.abort,
        "nothing": lambda: None,
    }
