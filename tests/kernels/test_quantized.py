"""Weights of 8 and 4 bits: half a step of round trip error, and products that equal the dequantised weight's."""

import pytest
import torch

from tests.kernels.compare import (
    DTYPES,
    assert_bitwise_equal,
    assert_two_references,
    misaligned,
    poisoned,
    strided_rows,
)
from umedtrain.kernels import quantized as module
from umedtrain.kernels.offline.sanitizer import watch
from umedtrain.kernels.quantized import QuantizedWeight, quantize_int4, quantize_int8, quantized_linear

QUANTIZE = {"int8": quantize_int8, "int4": quantize_int4, "int4 of 64": lambda weight: quantize_int4(weight, 64)}


def awkward_weight(outputs, inputs):
    """Rows of all magnitudes, lopsided ones, zeros."""
    weight_ND = torch.randn(outputs, inputs) * torch.logspace(-20, 4, outputs)[:, None]
    weight_ND[::3] += 2 * weight_ND[::3].abs().amax(1, keepdim=True)
    weight_ND[1::7] = 0.0
    weight_ND[:, ::5] = 0.0
    return weight_ND


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", QUANTIZE)
def test_round_trip_is_within_half_a_step(kind, dtype):
    weight_ND = awkward_weight(40, 256).clamp(-6e4, 6e4).to(dtype)
    quantized = QUANTIZE[kind](weight_ND)
    step = quantized.scale.double()
    step_ND = step.t().repeat_interleave(quantized.group, 1) if quantized.group else step[:, None].expand(40, 256)
    back_ND = quantized.dequantize(torch.float64)
    assert ((back_ND - weight_ND.double()).abs() <= step_ND * (0.5 + 1e-5)).all()
    assert not back_ND[weight_ND == 0].any()
    # The step is no larger than the range asks for: 254 steps of int8, 15 of int4 and bf16's rounding.
    if quantized.group:
        weight_NGK = weight_ND.double().unflatten(1, (-1, quantized.group))
        range_NG = weight_NGK.amax(-1).clamp(min=0) - weight_NGK.amin(-1).clamp(max=0)
        assert (step.t() <= range_NG / 15 * 1.008 + 1e-29).all()
    else:
        assert (step <= weight_ND.double().abs().amax(1) / 127 * (1 + 1e-6) + 1e-29).all()


def test_sizes():
    weight_ND = torch.randn(64, 1024)
    int8, int4 = quantize_int8(weight_ND), quantize_int4(weight_ND)
    assert int8.shape == int4.shape == (64, 1024)
    assert int8.nbytes == 64 * 1024 + 64 * 4
    assert int4.nbytes == 64 * 512 + 64 * 8 * 3
    assert int4.to("meta").shape == (64, 1024)
    assert int8.to("meta").values.device.type == "meta"
    # Around zero a step of int4 is about a third of a standard deviation: the error is a tenth.
    assert (int4.dequantize() - weight_ND).std() < 0.11
    assert (int8.dequantize() - weight_ND).std() < 0.009


def test_a_byte_holds_inputs_half_a_group_apart():
    weight_ND = torch.arange(16.0).repeat(16)[None]
    quantized = quantize_int4(weight_ND, 256)
    assert quantized.values[0, 3] == 3 + 16 * 3
    weight_ND[0, 128:] = 15 - weight_ND[0, 128:]
    assert torch.equal(quantize_int4(weight_ND, 256).dequantize() > 7, weight_ND > 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", QUANTIZE)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 33, 256), (5, 1, 128), (17, 70, 384), (67, 131, 128)])
def test_product_equals_the_dequantised_weights(kind, dtype, rows, outputs, inputs):
    quantized = QUANTIZE[kind](awkward_weight(outputs, inputs).clamp(-3, 3))
    x_MD = torch.randn(rows, inputs).to(dtype)
    exact = x_MD.double() @ quantized.dequantize(torch.float64).t()
    same_dtype = torch.nn.functional.linear(x_MD, quantized.dequantize(dtype))
    with poisoned():
        ours = quantized_linear(x_MD, quantized, impl="triton")
    assert_two_references(ours, exact, same_dtype)
    assert_two_references(quantized_linear(x_MD, quantized, impl="torch"), exact, same_dtype)
    if dtype != torch.float32:
        # Nothing but the last rounding is lost: each output on its own, not only against the largest.
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * (
            x_MD.double().abs() @ quantized.dequantize().double().abs().t()
        )
        assert ((ours.double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("kind", QUANTIZE)
def test_sizes_that_are_no_multiple_of_a_tile(kind):
    inputs = 77 if kind == "int8" else 192
    quantized = (quantize_int8 if kind == "int8" else lambda w: quantize_int4(w, 64))(torch.randn(9, inputs))
    x = torch.randn(2, 3, inputs)
    ours = quantized_linear(x, quantized, impl="triton")
    assert ours.shape == (2, 3, 9)
    assert_two_references(ours, x.double() @ quantized.dequantize(torch.float64).t())


@pytest.mark.parametrize("kind", QUANTIZE)
def test_rows_do_not_see_each_other(kind):
    quantized = QUANTIZE[kind](torch.randn(40, 256))
    for fewer, rows in ((1, 16), (17, 40)):
        x_MD = torch.randn(rows, 256)
        together = quantized_linear(x_MD, quantized, impl="triton")
        assert_bitwise_equal(quantized_linear(x_MD[:fewer], quantized, impl="triton"), together[:fewer])
        changed_MD = x_MD.clone()
        changed_MD[1] = float("nan")
        keep = [row for row in range(rows) if row != 1]
        assert_bitwise_equal(quantized_linear(changed_MD, quantized, impl="triton")[keep], together[keep])


@pytest.mark.parametrize("kind", QUANTIZE)
def test_repeats_and_tiles_and_strides(kind, monkeypatch):
    quantized, x_MD = QUANTIZE[kind](torch.randn(40, 256)), torch.randn(5, 256)
    first = quantized_linear(x_MD, quantized, impl="triton")
    shifted = QuantizedWeight(
        misaligned(quantized.values), misaligned(quantized.scale), quantized.zero, quantized.group
    )
    for x, weight in (
        (x_MD, quantized),
        (misaligned(x_MD), shifted),
        (strided_rows(x_MD), quantized),
        (x_MD.t().contiguous().t(), quantized),
    ):
        assert_bitwise_equal(quantized_linear(x, weight, impl="triton"), first)
    monkeypatch.setattr(module, "VECTORS", {"default": ((16, (16, 1, 4, 2)),)})
    torch.testing.assert_close(quantized_linear(x_MD, quantized, impl="triton"), first, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(module, "VECTOR_ROWS", 0)
    torch.testing.assert_close(quantized_linear(x_MD, quantized, impl="triton"), first, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", QUANTIZE)
def test_sanitizer_and_traffic(kind):
    quantized, x_MD = QUANTIZE[kind](torch.randn(70, 512)), torch.randn(3, 512).bfloat16()
    with watch() as watched:
        quantized_linear(x_MD, quantized, impl="triton")
    (launch,) = watched.launches
    assert launch.unique_loaded == quantized.nbytes + x_MD.nbytes
    # Weights once; x once for each block of outputs.
    assert launch.loaded <= quantized.nbytes + 3 * x_MD.nbytes
    assert launch.stored == launch.unique_stored == 3 * 70 * 2


@pytest.mark.parametrize("kind", QUANTIZE)
def test_no_rows_and_no_outputs(kind):
    for impl in ("triton", "torch"):
        assert quantized_linear(torch.randn(0, 256), QUANTIZE[kind](torch.randn(4, 256)), impl=impl).shape == (0, 4)
        assert quantized_linear(torch.randn(2, 256), QUANTIZE[kind](torch.randn(0, 256)), impl=impl).shape == (2, 0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: quantize_int8(torch.ones(3)), "weight_ND"),
        (lambda: quantize_int8(torch.ones(3, 4, dtype=torch.int8)), "weight_ND"),
        (lambda: quantize_int8(torch.ones(3, 0)), "weight_ND"),
        (lambda: quantize_int8(torch.full((3, 4), float("inf"))), "weight_ND"),
        (lambda: quantize_int4(torch.ones(3, 128), group=100), "group"),
        (lambda: quantize_int4(torch.ones(3, 100)), "weight_ND"),
        (lambda: quantized_linear(torch.ones(2, 4, dtype=torch.float64), quantize_int8(torch.ones(3, 4))), "x must"),
        (lambda: quantized_linear(torch.ones(2, 5), quantize_int8(torch.ones(3, 4))), "x must"),
        (lambda: quantized_linear(torch.ones(2, 4, requires_grad=True), quantize_int8(torch.ones(3, 4))), "gradient"),
        (lambda: quantized_linear(torch.ones(2, 4, device="meta"), quantize_int8(torch.ones(3, 4))), "weight"),
    ],
)
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize("kind", QUANTIZE)
def test_operator_and_compile(kind):
    quantized, x_MD = QUANTIZE[kind](torch.randn(6, 128)), torch.randn(3, 128)
    parts = (quantized.values, quantized.scale, quantized.zero, quantized.group)
    for use_kernel in (False, True):
        torch.library.opcheck(torch.ops.umedtrain.quantized_linear.default, (x_MD, *parts, use_kernel))
    for backend, impl in (("aot_eager", "triton"), ("inductor", "torch")):
        compiled = torch.compile(
            lambda x, impl=impl: quantized_linear(x, quantized, impl=impl), backend=backend, fullgraph=True
        )
        assert_bitwise_equal(compiled(x_MD), quantized_linear(x_MD, quantized, impl=impl))
