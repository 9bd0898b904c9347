"""The rule that results are held to lets roundings pass and catches wrong gradients."""

import pytest
import torch

from tests.kernels.compare import (
    DTYPES,
    HALF_TYPES,
    SHAPES,
    assert_bitwise_equal,
    assert_two_references,
    misaligned,
    poisoned,
    strided_rows,
)
from umedtrain.kernels._triton import tl, triton


@triton.jit
def silu_kernel(x_ptr, dy_ptr, out_ptr, n, BACKWARD: tl.constexpr, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    gate = 1 / (1 + tl.exp2(-1.4426950408889634 * x))
    out = x * gate
    if BACKWARD:
        dy = tl.load(dy_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        if FAULT == "uses the first row's weight":
            dy = tl.load(dy_ptr).to(tl.float32)
        slope = gate if FAULT == "drops a term" else gate * (1 + x * (1 - gate))
        out = dy * slope
        if FAULT == "rounds twice":
            out = dy * slope.to(tl.bfloat16).to(tl.float32)
    if FAULT == "forgets the last":
        n -= 1
    if FAULT == "truncates":
        out = (out.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=i < n)


def gradient(x, dy, fault=""):
    out = torch.empty_like(x)
    silu_kernel[(-(-x.numel() // 256),)](x, dy, out, x.numel(), True, fault, 256)
    return out


def references(x, dy):
    """In float64 and in x's type, with a random weight for each row as the incoming gradient."""
    results = []
    for dtype in (torch.float64, x.dtype):
        leaf = x.detach().to(dtype).requires_grad_()
        torch.nn.functional.silu(leaf).backward(dy.to(dtype))
        results.append(leaf.grad)
    return results


def sample(dtype, shape=(5, 257)):
    return torch.randn(shape).to(dtype), (torch.randn(shape[0], 1) * torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_right_gradient_passes(dtype, shape):
    x, dy = sample(dtype, shape)
    with poisoned():
        ours = gradient(x, dy)
    assert_two_references(ours, *references(x, dy))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["drops a term", "uses the first row's weight", "forgets the last"])
def test_a_wrong_gradient_is_caught(dtype, fault):
    x, dy = sample(dtype)
    with poisoned():
        ours = gradient(x, dy, fault)
    with pytest.raises(AssertionError, match=r"off by|being finite"):
        assert_two_references(ours, *references(x, dy))


def test_a_rounding_to_bf16_too_many_is_caught_in_fp32():
    x, dy = sample(torch.float32)
    with pytest.raises(AssertionError, match=r"off by .* allowed"):
        assert_two_references(gradient(x, dy, "rounds twice"), *references(x, dy))


def test_two_steps_of_bf16_are_caught_where_torch_only_rounds():
    exact = 1 + torch.arange(1000, dtype=torch.float64) / 1000
    rounded = exact.to(torch.bfloat16)
    step = torch.finfo(torch.bfloat16).eps
    assert_two_references(rounded, exact, rounded)
    assert_two_references((rounded.float() + step).bfloat16(), exact, rounded)  # the rule's price: 1.5 steps may pass
    with pytest.raises(AssertionError, match="off by"):
        assert_two_references((rounded.float() + 2 * step).bfloat16(), exact, rounded)


def test_infinities_and_nan_must_be_the_same():
    exact = torch.tensor([1.0, float("inf"), float("nan")], dtype=torch.float64)
    assert_two_references(exact.float(), exact)
    for wrong in ([1.0, float("-inf"), float("nan")], [1.0, 2.0, float("nan")], [float("nan"), float("inf"), 3.0]):
        with pytest.raises(AssertionError, match="being finite"):
            assert_two_references(torch.tensor(wrong), exact)


def test_shapes_and_types_must_be_the_same():
    exact = torch.ones(2, 3, dtype=torch.float64)
    assert_two_references(torch.ones(2, 3), exact)
    assert_two_references(torch.ones(0, 3), exact[:0])
    with pytest.raises(AssertionError, match="shape"):
        assert_two_references(torch.ones(3, 2), exact)
    with pytest.raises(AssertionError, match="needs PyTorch's result"):
        assert_two_references(torch.ones(2, 3).half(), exact)
    with pytest.raises(AssertionError, match="but torch gives"):
        assert_two_references(torch.ones(2, 3).half(), exact, torch.ones(2, 3))


def test_fp32_is_held_to_a_millionth_of_the_largest_value():
    exact = torch.linspace(-3, 100, 7, dtype=torch.float64)
    assert_two_references((exact + 9e-5).float(), exact, fp32_relative=2e-6)
    assert_two_references((exact + 5e-5).float(), exact)
    with pytest.raises(AssertionError, match="off by"):
        assert_two_references((exact + 2e-4).float(), exact)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.int8, torch.int32, torch.int64, torch.uint8])
def test_fresh_buffers_are_poisoned_inside_only(dtype):
    like = torch.zeros(3, dtype=dtype)
    with poisoned():
        fresh = [torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3)]
        fresh.append(torch.empty_strided((3,), (2,), dtype=dtype))
        assert torch.empty(3, dtype=dtype, device="meta").is_meta
    for tensor in fresh:
        if dtype.is_floating_point:
            assert tensor.float().isnan().all()
        else:
            assert (tensor.view(torch.uint8) == 0x5A).all() if tensor.is_contiguous() else (tensor != 0).all()
    assert "poison" not in torch.empty.__name__


def test_awkward_tensors_hold_the_same_values():
    x = torch.randn(3, 5, requires_grad=True)
    shifted, strided = misaligned(x), strided_rows(x)
    assert shifted.data_ptr() % 16 == 4
    assert shifted.is_contiguous()
    assert strided.stride() == (10, 1)
    for other in (shifted, strided):
        assert other.requires_grad
        assert other.is_leaf
        assert_bitwise_equal(other.detach(), x.detach())
    assert not misaligned(x.detach()).requires_grad


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_bitwise_comparison(dtype):
    x = torch.tensor([1.0, float("nan"), 2.0], dtype=dtype)
    assert_bitwise_equal(x, x.clone())
    with pytest.raises(AssertionError, match="1 of 3 elements"):
        assert_bitwise_equal(x, x + (x == 1))
