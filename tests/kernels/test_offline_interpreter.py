"""The interpreter computes what a GPU computes: types, rounding, products, undefined lanes."""

import warnings

import numpy as np
import pytest
import torch
from triton import knobs
from triton.runtime import interpreter as stock

from umedtrain.kernels._triton import tl, triton
from umedtrain.kernels.offline import interpreter

BF16, FP16, FP32, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2


@triton.jit
def convert(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


def converted(x, dtype):
    out = torch.empty(x.numel(), dtype=dtype)
    convert[(1,)](x, out, x.numel())
    return out


def awkward(n=4096):
    """Many sizes, ties between neighbours in bf16, the edges of the formats, infinities and NaN."""
    x = torch.randn(n) * torch.exp2(torch.randint(-30, 16, (n,)).float())
    edges = [0.0, -0.0, 1.00390625, 1.01171875, 1.9999, 3.3895e38, 448.0, 57344.0, 65504.0, 1e-40, 6e-8, 2.0**-9]
    x[: len(edges)] = torch.tensor(edges)
    x[len(edges) : 2 * len(edges)] = -torch.tensor(edges)
    x[-3:] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    return x


def assert_same(ours, theirs):
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("source", [FP32, FP16, BF16])
@pytest.mark.parametrize("target", [FP32, FP16, BF16])
def test_conversions_equal_torch(source, target):
    x = awkward().to(source)
    assert_same(converted(x, target), x.to(target))


@pytest.mark.parametrize("source", [FP32, FP16, BF16])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_fp8_rounds_to_nearest_and_saturates(source, fp8):
    x = awkward().to(source)
    largest = torch.finfo(fp8).max
    narrow = converted(x, fp8)
    assert_same(narrow.float(), x.float().clamp(-largest, largest).to(fp8).float())
    assert_same(converted(narrow, source), narrow.to(source))


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        r = x + y
    elif OP == "subtract":
        r = x - y
    elif OP == "multiply":
        r = x * y
    elif OP == "negate":
        r = -x
    elif OP == "absolute":
        r = tl.abs(x)
    elif OP == "maximum":
        r = tl.maximum(x, y)
    elif OP == "where":
        r = tl.where(x > y, x, y)
    elif OP == "fma":
        r = tl.fma(x, y, x)
    elif OP == "constant":
        r = x * 0.1 + tl.full((N,), 0.3, x.dtype)
    tl.store(out_ptr + i, r)


TORCH = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "negate": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(x > y, x, y),
    "fma": lambda x, y: (x.float() * y.float() + x.float()).to(x.dtype),
    "constant": lambda x, y: x * torch.tensor(0.1, dtype=x.dtype) + torch.tensor(0.3, dtype=x.dtype),
}


@pytest.mark.parametrize("op", TORCH)
def test_bf16_arithmetic_rounds_once_per_operation(op):
    x, y = torch.randn(512).to(BF16), torch.randn(512).to(BF16)
    out = torch.empty_like(x)
    arithmetic[(1,)](x, y, out, op, 512)
    assert_same(out, TORCH[op](x, y))


@triton.jit
def reductions(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.sum(x, 0).to(tl.float32))
    tl.store(out_ptr + 1, tl.max(x, 0).to(tl.float32))
    tl.store(out_ptr + 2, tl.min(x, 0).to(tl.float32))
    tl.store(out_ptr + 3, tl.argmax(x, 0).to(tl.float32))


def pairwise_sum(x):
    while len(x) > 1:
        x = x[0::2] + x[1::2]
    return x[0]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_reductions_in_16_bits_round_at_each_step(dtype):
    x, out = torch.randn(128).to(dtype), torch.empty(4)
    reductions[(1,)](x, out, 128)
    assert out.tolist() == [v.item() for v in (pairwise_sum(x), x.max(), x.min(), x.argmax())]


@triton.jit
def product(a_ptr, b_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i[:, None] * N + i[None, :]), tl.load(b_ptr + i[:, None] * N + i[None, :])
    out = tl.dot(a, b, input_precision=PRECISION, out_dtype=out_ptr.dtype.element_ty)
    tl.store(out_ptr + i[:, None] * N + i[None, :], out)


def multiplied(a, b, precision="tf32", out=FP32):
    result = torch.empty(a.shape, dtype=out)
    product[(1,)](a, b, result, a.shape[0], precision)
    return result


@pytest.mark.parametrize("dtype", [BF16, FP16, E4M3, E5M2])
def test_products_are_exact_and_accumulate_in_fp32(dtype):
    a, b = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
    exact = a.double() @ b.double()
    assert (multiplied(a, b) - exact).abs().max() < 1e-6 * exact.abs().max()


def test_int8_products():
    a, b = (torch.randint(-128, 128, (32, 32), dtype=torch.int8) for _ in range(2))
    assert torch.equal(multiplied(a, b, out=torch.int32), a.int() @ b.int())


def test_fp32_products_lose_bits_unless_told_not_to():
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    exact = a.double() @ b.double()
    largest = exact.abs().max()
    assert (multiplied(a, b, "ieee") - exact).abs().max() < 1e-6 * largest
    assert 1e-5 * largest < (multiplied(a, b, "tf32") - exact).abs().max() < 4e-3 * largest


@triton.jit
def scalars(out_ptr, value, flag):
    tl.store(out_ptr, value.to(tl.float32) - 0.1)
    tl.store(out_ptr + 1, tl.where(flag, 1.0, 0.0))


def test_float_arguments_are_fp32_and_bools_int1():
    out = torch.empty(2)
    scalars[(1,)](out, 0.1 + 1e-12, True)
    assert out.tolist() == [0.0, 1.0]


@triton.jit
def half_loaded(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, E4M3])
def test_masked_lanes_without_other_are_nan(dtype):
    x, out = torch.ones(8).to(dtype), torch.zeros(8).to(dtype)
    half_loaded[(1,)](x, out, 5, 8)
    assert out[:5].float().eq(1).all()
    assert out[5:].float().isnan().all()


def test_masked_integers_without_other_are_garbage():
    x, out = torch.ones(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    half_loaded[(1,)](x, out, 5, 8)
    assert out[5:].eq(0x7F7F7F7F).all()


@triton.jit
def _linear(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def _welford(m1, s1, n1, m2, s2, n2):
    n = n1 + n2
    d = m2 - m1
    return m1 + d * n2 / n, s1 + s2 + d * d * n1 * n2 / n, n


@triton.jit
def recurrence(a_ptr, b_ptr, out_ptr, REVERSE: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :]
    _, out = tl.associative_scan((tl.load(a_ptr + at), tl.load(b_ptr + at)), 1, _linear, reverse=REVERSE)
    tl.store(out_ptr + at, out)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_with_a_combine_function_of_ones_own(reverse):
    a, b, out = torch.randn(2, 16), torch.randn(2, 16), torch.empty(2, 16)
    recurrence[(1,)](a, b, out, reverse, 2, 16)
    state, columns = torch.zeros(2), range(15, -1, -1) if reverse else range(16)
    for j in columns:
        state = a[:, j] * state + b[:, j]
        torch.testing.assert_close(out[:, j], state)


@triton.jit
def moments(x_ptr, out_ptr, AXIS: tl.constexpr, KEEP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + i[None, :])
    mean, square, count = tl.reduce((x, x * 0.0, x * 0.0 + 1.0), AXIS, _welford, keep_dims=KEEP)
    if KEEP:
        tl.store(out_ptr + i[:, None] * N + i[None, :], x - mean + square / count * 0.0)
    else:
        tl.store(out_ptr + i, square / count)


def test_reduction_with_a_combine_function_of_ones_own():
    x, variance, centred = torch.randn(16, 16), torch.empty(16), torch.empty(16, 16)
    for axis in (0, 1):
        moments[(1,)](x, variance, axis, False, 16)
        torch.testing.assert_close(variance, x.var(axis, correction=0))
        moments[(1,)](x, centred, axis, True, 16)
        torch.testing.assert_close(centred, x - x.mean(axis, keepdim=True))


@triton.jit
def _first(a, b):
    return a


@triton.jit
def keep_first(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr, tl.reduce(tl.load(x_ptr + i[:, None] * N + i[None, :]), None, _first))


def test_reduction_keeps_the_order_of_its_operands():
    x, out = torch.randn(8, 8).to(BF16), torch.empty(1, dtype=BF16)
    keep_first[(1,)](x, out, 8)
    assert out.item() == x[0, 0].item()


@triton.jit
def divide(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i) / tl.load(y_ptr + i))


def test_what_a_gpu_does_silently_gives_no_warning():
    out = torch.empty(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        divide[(1,)](torch.tensor([1.0, 0.0]), torch.zeros(2), out, 2)
    assert out.isinf()[0]
    assert out.isnan()[1]


def test_installing_twice_is_harmless():
    before = stock._implicit_cvt, stock._patch_lang, stock.GridExecutor, type(stock.interpreter_builder)
    interpreter.install()
    assert before == (stock._implicit_cvt, stock._patch_lang, stock.GridExecutor, type(stock.interpreter_builder))
    x = awkward()
    assert_same(converted(x, BF16), x.to(BF16))


def test_installing_where_kernels_are_compiled_is_refused(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        interpreter.install()


def test_rounding_functions_keep_shapes_of_views():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2].T
    assert np.array_equal(interpreter.bf16_to_fp32(interpreter.fp32_to_bf16(x)), x)
    assert np.array_equal(interpreter.fp32_to_tf32(x), x)
    assert interpreter.fp32_to_bf16(np.float32(1.5)).shape == ()
