"""Linear layers on weights of 8 or 4 bits, for decoding: y = x W^T with W made from integers on the way.

    int8: W[n, d] = scale[n] * v[n, d]                              v in -127..127, a scale per output channel
    int4: W[n, d] = scale[g, n] * (v[n, d] - zero[g, n])            v in 0..15, a scale and a zero point for each
                                                                    group g of `group` consecutive inputs d

Quantising rounds to nearest, so no weight is off by more than half a scale. int4 is asymmetric: a group's scale is
(max - min) / 15, zero included in the range, which for weights around zero is a sixth smaller than max|w| / 7; the zero
point is a whole number, so a weight of 0 stays 0. Scales are fp32 for int8 and bf16 (rounded up, so that 15 steps still
reach) for int4: 4.19 bits a weight at group 128.

Packing. A byte holds two inputs half a group apart, the first in the low bits: in a group of 128, byte j holds inputs j
and j + 64. A mask and a shift give two tiles of consecutive inputs; nothing is interleaved.

Numerics. v and v - zero are whole numbers up to 127, exact in bf16, fp16 and fp32, so the products with x are exact and
their sums are fp32; scales multiply sums in fp32 (int8 at the end, int4 each group's); one rounding to x's dtype. The
same order for every row: a row's bits do not depend on the other rows as long as the number of rows stays on one side
of 16. No split along the inputs, no atomics. Bytes: the quantised weight once, x once for each block of outputs (from
L2). No backward: the weights are frozen, and the sampler asks for none.

Up to 16 rows, a program has few outputs and its warps share the inputs (matrix-vector): enough weights in flight for
the memory although there are few programs. More rows take square tiles, which read a weight once for 64 or 128 rows.

Shape suffixes: M rows, N outputs, D inputs, G groups, S slices of the inputs, K inputs (or packed bytes) of a step.
"""

from dataclasses import dataclass

import torch

from umedtrain.kernels._dispatch import Impl, pick, use_triton
from umedtrain.kernels._op import kernel_op
from umedtrain.kernels._triton import tl, triton

GROUPS = (32, 64, 128, 256)
_LEAST_SCALE = 1e-30
_TWIN_OUTPUTS = 4096

VECTOR_ROWS = 16
SLICE = 128
"""Inputs of an int8 slice."""

# (outputs of a program, slices of the inputs, warps, stages).
VECTORS = {"default": ((VECTOR_ROWS, (32, 4, 4, 3)),), "gfx942": ((VECTOR_ROWS, (32, 4, 4, 2)),)}
# (rows, outputs and inputs of a tile, warps, stages) by rows of x.
INT8_TILES = {
    "default": ((64, (64, 64, 128, 4, 3)), (2**31, (128, 128, 64, 8, 3))),
    "gfx942": ((64, (64, 64, 128, 4, 2)), (2**31, (128, 128, 64, 8, 2))),
}
# (rows and outputs of a tile, warps, stages); the inputs are a group.
INT4_TILES = {
    "default": ((64, (64, 64, 4, 3)), (2**31, (128, 64, 8, 3))),
    "sm_80": ((2**31, (64, 128, 8, 3)),),
    "gfx942": ((64, (64, 64, 4, 2)), (2**31, (128, 64, 8, 2))),
}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, D] in 8 or 4 bits; see the file's header.

    Attributes:
        values: int8 [N, D], or uint8 [N, D / 2].
        scale: fp32 [N], or bf16 [G, N].
        zero: None, or int8 [G, N].
        group: inputs that share a scale; 0 for int8.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        outputs, columns = self.values.shape
        return outputs, columns * 2 if self.group else columns

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and zero points."""
        return sum(x.nbytes for x in (self.values, self.scale, self.zero) if x is not None)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return QuantizedWeight(self.values.to(device), self.scale.to(device), zero, self.group)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, D] that products are made with, in `dtype`."""
        integers, scale = _integers(self.values, self.zero, self.group), self.scale.to(torch.float64)
        scale = scale.t().repeat_interleave(self.group, 1) if self.group else scale[:, None]
        return (integers.to(torch.float64) * scale).to(dtype)


def quantize_int8(weight_ND: torch.Tensor) -> QuantizedWeight:
    """Symmetric, a scale of max|w| / 127 for each output.

    Raises:
        ValueError: unless the weight is a floating-point matrix of finite numbers.
    """
    weight_ND = _checked(weight_ND)
    scale_N = (weight_ND.abs().amax(1) / 127).clamp_(min=_LEAST_SCALE)
    values_ND = (weight_ND / scale_N[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedWeight(values_ND, scale_N, None, 0)


def quantize_int4(weight_ND: torch.Tensor, group: int = 128) -> QuantizedWeight:
    """Asymmetric, a scale and a zero point for each output and group of inputs.

    Raises:
        ValueError: unless the weight is a floating-point matrix of finite numbers, with whole groups of 32, 64, 128
            or 256 inputs.
    """
    weight_ND = _checked(weight_ND)
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(map(str, GROUPS))}, got {group!r}")
    if weight_ND.shape[1] % group:
        raise ValueError(f"weight_ND must have a multiple of group={group} columns, got {weight_ND.shape[1]}")
    weight_NGK = weight_ND.unflatten(1, (weight_ND.shape[1] // group, group))
    least_NG, largest_NG = weight_NGK.amin(-1).clamp_(max=0.0), weight_NGK.amax(-1).clamp_(min=0.0)
    # bf16 rounds by up to 2^-8; a scale larger by so much is not less than wanted after it.
    scale_NG = ((largest_NG - least_NG) * ((1 + 2**-8) / 15)).clamp_(min=_LEAST_SCALE).to(torch.bfloat16)
    zero_NG = (-least_NG / scale_NG.float()).round_()
    values_NGK = (weight_NGK / scale_NG.float()[..., None] + zero_NG[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    low, high = values_NGK.chunk(2, dim=-1)
    zero_GN = zero_NG.t().contiguous().to(torch.int8)
    return QuantizedWeight((low | high << 4).flatten(1), scale_NG.t().contiguous(), zero_GN, group)


def _checked(weight_ND: torch.Tensor) -> torch.Tensor:
    if weight_ND.ndim != 2 or not weight_ND.is_floating_point():
        raise ValueError(f"weight_ND must be a floating-point matrix, got {weight_ND.dtype} {list(weight_ND.shape)}")
    if not weight_ND.shape[1]:
        raise ValueError("weight_ND must have at least one column")
    weight_ND = weight_ND.detach().float()
    if not weight_ND.isfinite().all():
        raise ValueError("weight_ND must be finite, but holds NaN or inf")
    return weight_ND


def _integers(values: torch.Tensor, zero_GN: torch.Tensor | None, group: int) -> torch.Tensor:
    """v, or v - zero: int8 [N, D]."""
    if zero_GN is None:
        return values
    packed_NGK = values.unflatten(1, (len(zero_GN), group // 2))
    integers_NGK = torch.cat((packed_NGK & 15, packed_NGK >> 4), dim=-1).to(torch.int8)
    return (integers_NGK - zero_GN.t()[..., None]).flatten(1)


@triton.jit
def _float_of(bits, offset, dtype: tl.constexpr):
    """A whole number up to 255, added to the fp32 bits of `offset`, in `dtype`: exact.

    Conversions of integers run at a quarter of the rate of additions, and take many instructions where there is no
    bf16 arithmetic. Here they are one subtraction; bf16 is then the upper half of fp32.
    """
    whole = bits.to(tl.float32, bitcast=True) - offset
    if dtype == tl.bfloat16:
        return (whole.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return whole.to(dtype)


@triton.jit
def _int8_vector_kernel(
    x_ptr, values_ptr, scale_ptr, y_ptr, rows, outputs, inputs, x_stride, values_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Up to ROWS rows. Each warp takes a slice of the inputs, so that it reads but that slice of x."""
    row_M = tl.arange(0, ROWS)
    output_N = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row_M, is_output_N = row_M < rows, output_N < outputs
    input_SK = tl.arange(0, SLICES)[:, None] * INPUTS + tl.arange(0, INPUTS)[None, :]
    x_ptr_SMK = x_ptr + (row_M * x_stride)[None, :, None] + input_SK[:, None, :]
    values_ptr_SNK = values_ptr + (output_N * values_stride)[None, :, None] + input_SK[:, None, :]
    sums_SMN = tl.zeros((SLICES, ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, SLICES * INPUTS):
        is_input_S1K = (input_SK < inputs - start)[:, None, :]
        x_SMK = tl.load(x_ptr_SMK, mask=is_row_M[None, :, None] & is_input_S1K, other=0.0)
        values_SNK = tl.load(values_ptr_SNK, mask=is_output_N[None, :, None] & is_input_S1K, other=0)
        values_SNK = _float_of(values_SNK.to(tl.int32) + 0x4B400000, 12582912.0, x_SMK.dtype)
        sums_SMN = tl.dot(x_SMK, tl.permute(values_SNK, (0, 2, 1)), sums_SMN, input_precision="ieee")
        x_ptr_SMK += SLICES * INPUTS
        values_ptr_SNK += SLICES * INPUTS
    scale_N = tl.load(scale_ptr + output_N, mask=is_output_N, other=0.0)
    y_MN = (tl.sum(sums_SMN, 0) * scale_N[None, :]).to(y_ptr.dtype.element_ty)
    y_ptr_MN = y_ptr + row_M[:, None] * outputs + output_N[None, :]
    tl.store(y_ptr_MN, y_MN, mask=is_row_M[:, None] & is_output_N[None, :])


@triton.jit
def _int4_vector_kernel(
    x_ptr, values_ptr, scale_ptr, zero_ptr, y_ptr, rows, outputs, groups, x_stride, values_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, HALF: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """As above; a slice is a group. Scales and zero points are loaded a step ahead."""
    row_M = tl.arange(0, ROWS)
    output_N = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row_M, is_output_N = row_M < rows, output_N < outputs
    slice_S, byte_K = tl.arange(0, SLICES), tl.arange(0, HALF)
    x_ptr_SMK = x_ptr + (row_M * x_stride)[None, :, None] + (slice_S[:, None] * (2 * HALF) + byte_K)[:, None, :]
    values_ptr_SNK = (
        values_ptr + (output_N * values_stride)[None, :, None] + (slice_S[:, None] * HALF + byte_K)[:, None, :]
    )
    cell_SN = slice_S[:, None].to(tl.int64) * outputs + output_N[None, :]
    is_cell_SN = (slice_S < groups)[:, None] & is_output_N[None, :]
    zero_SN = tl.load(zero_ptr + cell_SN, mask=is_cell_SN, other=0)
    scale_SN = tl.load(scale_ptr + cell_SN, mask=is_cell_SN, other=0.0)
    sums_SMN = tl.zeros((SLICES, ROWS, OUTPUTS), tl.float32)
    for start in range(0, groups, SLICES):
        is_slice_S = slice_S < groups - start
        is_x_SM1 = is_slice_S[:, None, None] & is_row_M[None, :, None]
        low_SMK = tl.load(x_ptr_SMK, mask=is_x_SM1, other=0.0)
        high_SMK = tl.load(x_ptr_SMK + HALF, mask=is_x_SM1, other=0.0)
        packed_SNK = tl.load(values_ptr_SNK, mask=is_slice_S[:, None, None] & is_output_N[None, :, None], other=0)
        cell_SN += SLICES * outputs
        is_cell_SN = (slice_S < groups - start - SLICES)[:, None] & is_output_N[None, :]
        next_zero_SN = tl.load(zero_ptr + cell_SN, mask=is_cell_SN, other=0)
        next_scale_SN = tl.load(scale_ptr + cell_SN, mask=is_cell_SN, other=0.0)
        group_SMN = _int4_products(low_SMK, high_SMK, packed_SNK, zero_SN[:, :, None], (0, 2, 1))
        sums_SMN += group_SMN * scale_SN.to(tl.float32)[:, None, :]
        zero_SN, scale_SN = next_zero_SN, next_scale_SN
        x_ptr_SMK += SLICES * 2 * HALF
        values_ptr_SNK += SLICES * HALF
    y_MN = tl.sum(sums_SMN, 0).to(y_ptr.dtype.element_ty)
    y_ptr_MN = y_ptr + row_M[:, None] * outputs + output_N[None, :]
    tl.store(y_ptr_MN, y_MN, mask=is_row_M[:, None] & is_output_N[None, :])


@triton.jit
def _int4_products(low_MK, high_MK, packed_NK, zero_N1, TRANSPOSED: tl.constexpr):
    """Sums over a group before its scale. The high half stays where it is in its byte, as 16 times its value."""
    bits_NK = packed_NK.to(tl.int32) | 0x4B000000
    zero_N1 = zero_N1.to(tl.float32)
    high_NK = _float_of(bits_NK & 0x7FFFFFF0, zero_N1 * 16.0 + 8388608.0, low_MK.dtype)
    sums_MN = tl.dot(high_MK, tl.permute(high_NK, TRANSPOSED), input_precision="ieee") * 0.0625
    low_NK = _float_of(bits_NK & 0x7FFFFF0F, zero_N1 + 8388608.0, low_MK.dtype)
    return tl.dot(low_MK, tl.permute(low_NK, TRANSPOSED), sums_MN, input_precision="ieee")


@triton.jit
def _tile(rows, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Rows and outputs of this program; programs that share weights follow each other."""
    program, tiles = tl.program_id(0), tl.cdiv(rows, ROWS)
    row_M = (program % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row_M, (program // tiles).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)


@triton.jit
def _int8_tile_kernel(
    x_ptr, values_ptr, scale_ptr, y_ptr, rows, outputs, inputs, x_stride, values_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row_M, output_N = _tile(rows, ROWS, OUTPUTS)
    is_row_M, is_output_N = row_M < rows, output_N < outputs
    input_K = tl.arange(0, INPUTS)
    x_ptr_MK = x_ptr + row_M[:, None] * x_stride + input_K[None, :]
    values_ptr_NK = values_ptr + output_N[:, None] * values_stride + input_K[None, :]
    sums_MN = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        is_input_K = input_K < inputs - start
        x_MK = tl.load(x_ptr_MK, mask=is_row_M[:, None] & is_input_K[None, :], other=0.0)
        values_NK = tl.load(values_ptr_NK, mask=is_output_N[:, None] & is_input_K[None, :], other=0)
        values_NK = _float_of(values_NK.to(tl.int32) + 0x4B400000, 12582912.0, x_MK.dtype)
        sums_MN = tl.dot(x_MK, values_NK.T, sums_MN, input_precision="ieee")
        x_ptr_MK += INPUTS
        values_ptr_NK += INPUTS
    scale_N = tl.load(scale_ptr + output_N, mask=is_output_N, other=0.0)
    y_MN = (sums_MN * scale_N[None, :]).to(y_ptr.dtype.element_ty)
    y_ptr_MN = y_ptr + row_M[:, None] * outputs + output_N[None, :]
    tl.store(y_ptr_MN, y_MN, mask=is_row_M[:, None] & is_output_N[None, :])


@triton.jit
def _int4_tile_kernel(
    x_ptr, values_ptr, scale_ptr, zero_ptr, y_ptr, rows, outputs, groups, x_stride, values_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row_M, output_N = _tile(rows, ROWS, OUTPUTS)
    is_row_M, is_output_N = row_M < rows, output_N < outputs
    byte_K = tl.arange(0, HALF)
    x_ptr_MK = x_ptr + row_M[:, None] * x_stride + byte_K[None, :]
    values_ptr_NK = values_ptr + output_N[:, None] * values_stride + byte_K[None, :]
    zero_ptr_N, scale_ptr_N = zero_ptr + output_N, scale_ptr + output_N
    sums_MN = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for _ in range(groups):
        low_MK = tl.load(x_ptr_MK, mask=is_row_M[:, None], other=0.0)
        high_MK = tl.load(x_ptr_MK + HALF, mask=is_row_M[:, None], other=0.0)
        packed_NK = tl.load(values_ptr_NK, mask=is_output_N[:, None], other=0)
        zero_N = tl.load(zero_ptr_N, mask=is_output_N, other=0)
        scale_N = tl.load(scale_ptr_N, mask=is_output_N, other=0.0).to(tl.float32)
        sums_MN += _int4_products(low_MK, high_MK, packed_NK, zero_N[:, None], (1, 0)) * scale_N[None, :]
        x_ptr_MK += 2 * HALF
        values_ptr_NK += HALF
        zero_ptr_N += outputs
        scale_ptr_N += outputs
    y_ptr_MN = y_ptr + row_M[:, None] * outputs + output_N[None, :]
    tl.store(y_ptr_MN, sums_MN.to(y_ptr.dtype.element_ty), mask=is_row_M[:, None] & is_output_N[None, :])


def _twin(
    x_MD: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: int
) -> torch.Tensor:
    """The same in PyTorch, in fp32, for blocks of outputs at a time."""
    x_MD, parts = x_MD.float(), []
    for start in range(0, max(1, values.shape[0]), _TWIN_OUTPUTS):
        block = slice(start, start + _TWIN_OUTPUTS)
        if not group:
            parts.append(x_MD @ values[block].float().t() * scale[block])
            continue
        integers_ND = _integers(values[block], zero[:, block], group).float()
        integers_ND.unflatten(1, (len(zero), group)).mul_(scale[:, block].t()[..., None].float())
        parts.append(x_MD @ integers_ND.t())
    return torch.cat(parts, dim=1)


def _fake(
    x_MD: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: int,
    use_kernel: bool,
) -> torch.Tensor:
    return x_MD.new_empty(x_MD.shape[0], values.shape[0])


@kernel_op("quantized_linear", fake=_fake)
def _quantized_linear(
    x_MD: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: int,
    use_kernel: bool,
) -> torch.Tensor:
    if not use_kernel:
        return _twin(x_MD, values, scale, zero, group).to(x_MD.dtype)
    if x_MD.stride(1) != 1:
        x_MD = x_MD.contiguous()
    (rows, inputs), outputs = x_MD.shape, values.shape[0]
    y_MN = x_MD.new_empty(rows, outputs)
    if not y_MN.numel():
        return y_MN
    columns = (rows, outputs, inputs // group if group else inputs, x_MD.stride(0), values.stride(0))
    tensors = (x_MD, values, scale, zero, y_MN) if group else (x_MD, values, scale, y_MN)
    if rows <= VECTOR_ROWS:
        tile_outputs, slices, warps, stages = pick(VECTORS, rows)
        step = {"HALF": group // 2} if group else {"INPUTS": SLICE}
        (_int4_vector_kernel if group else _int8_vector_kernel)[(triton.cdiv(outputs, tile_outputs),)](
            *tensors, *columns, ROWS=VECTOR_ROWS, OUTPUTS=tile_outputs, SLICES=slices, **step,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return y_MN
    tile_rows, tile_outputs, *tile_inputs, warps, stages = pick(INT4_TILES if group else INT8_TILES, rows)
    step = {"HALF": group // 2} if group else {"INPUTS": tile_inputs[0]}
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(outputs, tile_outputs),)
    (_int4_tile_kernel if group else _int8_tile_kernel)[grid](
        *tensors, *columns, ROWS=tile_rows, OUTPUTS=tile_outputs, **step, num_warps=warps, num_stages=stages
    )
    return y_MN


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, *, impl: Impl | None = None) -> torch.Tensor:
    """x W^T for a quantised weight [N, D].

    Args:
        x: [..., D], fp32, bf16 or fp16.
        weight: from `quantize_int8` or `quantize_int4`, on x's device.
        impl: see `umedtrain.kernels._dispatch`.

    Returns:
        [..., N] of x's dtype, summed in fp32.

    Raises:
        ValueError: for wrong shapes, dtypes or devices, and for x that requires a gradient: there is no backward.
    """
    if x.ndim < 1 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x must be fp32, bf16 or fp16 [..., D], got {x.dtype} {list(x.shape)}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have the weight's {weight.shape[1]} columns, got {list(x.shape)}")
    if x.device != weight.values.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.values.device}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x must not require a gradient, for a quantised weight has no backward; use torch.no_grad()")
    x_MD = x.reshape(-1, x.shape[-1])
    y_MN = _quantized_linear(x_MD, weight.values, weight.scale, weight.zero, weight.group, use_triton(x, impl))
    return y_MN.view(*x.shape[:-1], weight.shape[0])
