"""What the tests of kernels share: the rule by which a result is right, poisoned buffers, awkward tensors."""

from contextlib import contextmanager
from unittest import mock

import torch

SHAPES = ((1, 1), (3, 3), (2, 127), (5, 257), (3, 4099))
"""Rows and columns of which no kernel's block is a divisor."""

HALF_TYPES = (torch.bfloat16, torch.float16)
DTYPES = (*HALF_TYPES, torch.float32)


def assert_two_references(ours, exact64, same_dtype_torch=None, *, fp32_relative=1e-6, name="result"):
    """A kernel may err twice as much as PyTorch does in the same type, and round once.

    bf16, fp16: max|ours - exact| <= 2 max|torch - exact| + eps/2 * max|exact|, the last term being one rounding of the
    output's type. fp32: max|ours - exact| <= fp32_relative * max|exact|; a test states a larger `fp32_relative` where
    the length of the sums asks for it. Where `exact64` is not finite, `ours` must be the same infinity or NaN.

    Args:
        ours: the kernel's result, on any of those types.
        exact64: the same in float64, from the same (rounded) inputs.
        same_dtype_torch: what PyTorch's operators give in the type of `ours`; needed for bf16 and fp16.
    """
    assert exact64.dtype == torch.float64, f"{name}: the exact reference is {exact64.dtype}"
    assert ours.shape == exact64.shape, f"{name}: shape {tuple(ours.shape)}, must be {tuple(exact64.shape)}"
    if ours.numel() == 0:
        return
    finite = exact64.isfinite()
    wrong = (~torch.isclose(ours.double(), exact64, equal_nan=True) & ~finite) | (~ours.isfinite() & finite)
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {ours.numel()} elements differ in being finite"
    if not finite.any():
        return
    exact = exact64[finite]
    largest = exact.abs().max().item()
    if ours.dtype == torch.float32:
        allowed = fp32_relative * largest
    else:
        assert same_dtype_torch is not None, f"{name}: {ours.dtype} needs PyTorch's result in that type"
        assert same_dtype_torch.dtype == ours.dtype, f"{name}: {ours.dtype}, but torch gives {same_dtype_torch.dtype}"
        torch_error = (same_dtype_torch[finite].double() - exact).abs().max().item()
        allowed = 2 * torch_error + torch.finfo(ours.dtype).eps / 2 * largest
    error = (ours[finite].double() - exact).abs().max().item()
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g} (largest value {largest:.3g})"


@contextmanager
def poisoned():
    """Inside, fresh buffers hold NaN (integers: 0x5A..), so that an element that a kernel forgets to write shows."""
    fresh = {name: _poisoning(getattr(torch, name)) for name in ("empty", "empty_like", "empty_strided")}
    with (
        mock.patch.multiple(torch, **fresh),
        mock.patch.object(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty)),
    ):
        yield


def _poisoning(allocate):
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.device.type == "meta" or tensor.dtype == torch.bool:
            return tensor
        with torch.no_grad():
            floating = tensor.dtype.is_floating_point
            return tensor.fill_(float("nan") if floating else 0x5A5A5A5A5A5A5A5A >> (64 - 8 * tensor.element_size()))

    return allocate_poisoned


def misaligned(tensor):
    """The same values, contiguous, beginning one element after a 16-byte boundary."""
    buffer = tensor.new_zeros(tensor.numel() + 1)
    buffer[1:] = tensor.detach().reshape(-1)
    return buffer[1:].view(tensor.shape).requires_grad_(tensor.requires_grad)


def strided_rows(tensor, gap=5):
    """The same values with `gap` unused elements, all NaN, after each row of the last dimension."""
    buffer = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + gap), float("nan"))
    buffer[..., : tensor.shape[-1]] = tensor.detach()
    return buffer[..., : tensor.shape[-1]].requires_grad_(tensor.requires_grad)


def assert_bitwise_equal(first, second, name="result"):
    """Same type, shape and bits; NaN equals NaN."""
    assert first.dtype == second.dtype, f"{name}: {first.dtype} and {second.dtype}"
    same = (first == second) | (first.isnan() & second.isnan())
    assert same.all(), f"{name}: {int((~same).sum())} of {first.numel()} elements differ"
