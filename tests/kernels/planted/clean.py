"""The twins without faults; one file for each kind of the faults in faulty.py."""

import torch

from umedtrain.kernels._triton import tl, triton


@triton.jit
def centre_rows(x_ptr, out_ptr, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + column, mask=column < n, other=0.0)
    tl.store(out_ptr + row * stride + column, x - tl.sum(x) / n, mask=column < n)


@triton.jit
def product(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a, b = tl.load(a_ptr + row * BLOCK + column), tl.load(b_ptr + row * BLOCK + column)
    tl.store(out_ptr + row * BLOCK + column, tl.dot(a, b))


def cases(shape):
    def centre():
        x = torch.empty(64, 8192, device="meta")
        centre_rows[(64,)](x, x, 8192, 8192, BLOCK=8192, num_warps=16)

    def multiply():
        a = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
        product[(1,)](a, a, torch.empty(64, 64, device="meta"), BLOCK=64)

    return {"centre": centre, "multiply": multiply}
