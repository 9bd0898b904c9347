"""RMS normalisation over packed rows, alone and with the residual addition before it.

    h = x + r                                            add_rms_norm only; rounded to x's dtype, then normalised
    rstd_t = 1 / sqrt(mean_d(h[t, d]^2) + eps)
    y[t, d] = h[t, d] * rstd_t * w[d]

    n = h * rstd        g = dy * w        c_t = mean_d(g[t, d] * n[t, d])
    dh = rstd * (g - n * c)  (+ the gradient that arrives at h itself)        dw[d] = sum_t dy[t, d] * n[t, d]

Casts. The square, the mean, rstd and all of the backward are fp32; dh and dw are rounded once. Forward, "fp32": y is
rounded once, at the end, to x's dtype. "hf": h * rstd is rounded to x's dtype before it is multiplied by w and rounded
again, as Hugging Face's LlamaRMSNorm does; y has the dtype that PyTorch promotes x and w to, as there.

Bytes for T rows of D elements of b bytes: forward 2 T D b, with the addition 4 T D b; backward 3 T D b, with the
gradient of the sum 4 T D b, and 8 D per program for the partial sums of dw. About 4 and 9 FLOPs an element, far below
what the memory takes. Saved for backward: h, w and rstd (fp32, T).

Backward runs a fixed number of programs per multiprocessor. Each walks its rows with a constant step and keeps its sum
of dw in registers; the partial sums are then added in a fixed order, so one GPU model gives the same bits every time.
The loop is software-pipelined: the next row is under way while this one is reduced. Where rows are too wide for the
registers, a kernel finds their scalars first (rstd, c) and the same kernels then work on column tiles: forward reads
x twice, backward reads dy and h twice.

Shape suffixes: T rows, D columns, P programs.
"""

from typing import Any, Literal

import torch

from umedtrain.kernels._dispatch import Impl, architecture, pick, use_triton
from umedtrain.kernels._op import kernel_op
from umedtrain.kernels._triton import tl, triton

Casting = Literal["fp32", "hf"]
Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Columns up to which a row stays in registers; odd widths need more of those, for the masks.
WIDEST_FORWARD, WIDEST_BACKWARD, WIDEST_BACKWARD_ODD = 16384, 8192, 4096
TILE, TILE_WARPS = 4096, 16

# (columns up to, launch options): a thread holds 8 to 32 values of each tensor.
FORWARD = {
    "default": (
        (512, {"num_warps": 1}),
        (1024, {"num_warps": 2}),
        (2048, {"num_warps": 4}),
        (4096, {"num_warps": 8}),
        (16384, {"num_warps": 16}),
    ),
}
# (columns up to, (programs per multiprocessor, launch options)). Held to 64 registers the compiler spills nothing where
# rows are whole vectors, and 32 warps are resident; left alone it takes up to 98 and halves that.
BACKWARD = {
    "default": (
        (512, (16, {"num_warps": 2, "maxnreg": 64})),
        (1024, (8, {"num_warps": 4, "maxnreg": 64})),
        (2048, (4, {"num_warps": 8, "maxnreg": 64})),
        (4096, (2, {"num_warps": 16, "maxnreg": 64})),
        (8192, (1, {"num_warps": 32})),
    ),
    "gfx942": (
        (512, (16, {"num_warps": 1})),
        (1024, (8, {"num_warps": 2})),
        (2048, (4, {"num_warps": 4})),
        (4096, (2, {"num_warps": 8})),
        (8192, (1, {"num_warps": 16})),
    ),
}
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}  # where no GPU can be asked


@triton.jit
def _load_sum(x_ptr, residual_ptr, x_offset, residual_offset, mask, ADD: tl.constexpr):
    """What is normalised, in x's dtype."""
    h = tl.load(x_ptr + x_offset, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + residual_offset, mask=mask, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
    return h


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, x_stride, residual_stride, columns, eps,
    ADD: tl.constexpr, HF: tl.constexpr, TILED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, or with TILED one tile of a row whose rstd is known."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    h = _load_sum(x_ptr, residual_ptr, row * x_stride + column, row * residual_stride + column, inside, ADD)
    if ADD:
        tl.store(sum_ptr + row * columns + column, h, mask=inside)
    wide = h.to(tl.float32)
    if TILED:
        rstd = tl.load(rstd_ptr + row)
    else:
        rstd = tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
        tl.store(rstd_ptr + row, rstd)
    normal = wide * rstd
    if HF:
        normal = normal.to(x_ptr.dtype.element_ty).to(tl.float32)
    # fp32 holds a product of two 16-bit floats exactly, so that rounding it once is what the product in 16 bits gives.
    y = normal * weight.to(tl.float32)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_rstd_kernel(
    x_ptr, residual_ptr, sum_ptr, rstd_ptr, x_stride, residual_stride, columns, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum and rstd of one row that does not fit into registers."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        h = _load_sum(x_ptr, residual_ptr, row * x_stride + column, row * residual_stride + column, inside, ADD)
        if ADD:
            tl.store(sum_ptr + row * columns + column, h, mask=inside)
        wide = h.to(tl.float32)
        squares += wide * wide
    tl.store(rstd_ptr + row, tl.rsqrt(tl.sum(squares, 0) / columns + eps))


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr, dsum_ptr, h_ptr, weight_ptr, rstd_ptr, dots_ptr, dh_ptr, partial_ptr, dy_stride, dsum_stride, h_stride,
    rows, columns, ADD: tl.constexpr, TILED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dh of the rows program, program + P, ... and their sum of dw; with TILED of one column tile, c being known."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=2):
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normal = h * rstd
        g = dy * weight
        c = tl.load(dots_ptr + row) if TILED else tl.sum(g * normal, 0) / columns
        dh = rstd * (g - normal * c)
        if ADD:
            dh += tl.load(dsum_ptr + row * dsum_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dh_ptr + row * columns + column, dh.to(dh_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normal
    tl.store(partial_ptr + program * columns + column, dweight, mask=inside)


@triton.jit
def _rms_norm_dots_kernel(
    dy_ptr, h_ptr, weight_ptr, rstd_ptr, dots_ptr, dy_stride, h_stride, columns, BLOCK: tl.constexpr
):
    """c of one row that does not fit into registers."""
    row = tl.program_id(0).to(tl.int64)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
        products += dy * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) * h
    tl.store(dots_ptr + row, tl.sum(products, 0) * tl.load(rstd_ptr + row) / columns)


@triton.jit
def _rms_norm_partials_kernel(partial_ptr, out_ptr, programs, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (row < programs) & (column < columns)[None, :]
        total += tl.load(partial_ptr + row * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < columns)


def _launch_forward(
    x_TD: torch.Tensor, residual_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float, hf: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    rows, columns = x_TD.shape
    add = residual_TD is not None
    y_TD, rstd_T = _outputs(x_TD, weight_D, hf)
    sum_TD = x_TD.new_empty(x_TD.shape) if add else None
    if not rows:
        return y_TD, sum_TD, rstd_T
    x_TD, residual_TD, weight_D = _unit_stride(x_TD), _unit_stride(residual_TD), weight_D.contiguous()
    sizes = (x_TD.stride(0), residual_TD.stride(0) if add else 0, columns, eps)
    if columns <= WIDEST_FORWARD:
        flags = {"ADD": add, "HF": hf, "TILED": False, "BLOCK": triton.next_power_of_2(columns)}
        tensors = (x_TD, residual_TD, weight_D, y_TD, sum_TD, rstd_T)
        _rms_norm_forward_kernel[(rows,)](*tensors, *sizes, **flags, **pick(FORWARD, columns))
    else:
        options = {"BLOCK": TILE, "num_warps": TILE_WARPS}
        _rms_norm_rstd_kernel[(rows,)](x_TD, residual_TD, sum_TD, rstd_T, *sizes, ADD=add, **options)
        h_TD = sum_TD if add else x_TD
        tensors = (h_TD, None, weight_D, y_TD, None, rstd_T)
        grid = (rows, triton.cdiv(columns, TILE))
        _rms_norm_forward_kernel[grid](*tensors, h_TD.stride(0), *sizes[1:], ADD=False, HF=hf, TILED=True, **options)
    return y_TD, sum_TD, rstd_T


def _launch_backward(
    dy_TD: torch.Tensor, dsum_TD: torch.Tensor | None, h_TD: torch.Tensor, weight_D: torch.Tensor, rstd_T: torch.Tensor
) -> Pair:
    rows, columns = h_TD.shape
    dh_TD, dweight_D = h_TD.new_empty(h_TD.shape), weight_D.new_empty(columns)
    if not rows:
        return dh_TD, dweight_D.zero_()
    dy_TD, dsum_TD, h_TD, weight_D = *map(_unit_stride, (dy_TD, dsum_TD, h_TD)), weight_D.contiguous()
    tiled = columns > (WIDEST_BACKWARD if columns % 16 == 0 else WIDEST_BACKWARD_ODD)
    if tiled:
        block, tiles, options = TILE, triton.cdiv(columns, TILE), {"num_warps": TILE_WARPS}
        programs = 2 * _processors(h_TD.device) // tiles
        dots_T = torch.empty_like(rstd_T)
        tensors = (dy_TD, h_TD, weight_D, rstd_T, dots_T)
        _rms_norm_dots_kernel[(rows,)](*tensors, dy_TD.stride(0), h_TD.stride(0), columns, BLOCK=block, **options)
    else:
        block, tiles, dots_T = triton.next_power_of_2(columns), 1, None
        per_processor, options = pick(BACKWARD, columns)
        programs = per_processor * _processors(h_TD.device)
        options = options if columns % 16 == 0 else {**options, "maxnreg": None}
    partial_PD = rstd_T.new_empty(max(1, min(rows, programs)), columns)
    tensors = (dy_TD, dsum_TD, h_TD, weight_D, rstd_T, dots_T, dh_TD, partial_PD)
    sizes = (dy_TD.stride(0), 0 if dsum_TD is None else dsum_TD.stride(0), h_TD.stride(0), rows, columns)
    flags = {"ADD": dsum_TD is not None, "TILED": tiled, "BLOCK": block}
    _rms_norm_backward_kernel[(len(partial_PD), tiles)](*tensors, *sizes, **flags, **options)
    grid = (triton.cdiv(columns, 64),)
    _rms_norm_partials_kernel[grid](partial_PD, dweight_D, len(partial_PD), columns, ROWS=64, BLOCK=64, num_warps=8)
    return dh_TD, dweight_D


def _outputs(x_TD: torch.Tensor, weight_D: torch.Tensor, hf: bool) -> Pair:
    dtype = torch.promote_types(x_TD.dtype, weight_D.dtype) if hf else x_TD.dtype
    return x_TD.new_empty(x_TD.shape, dtype=dtype), x_TD.new_empty(x_TD.shape[0], dtype=torch.float32)


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return PROCESSORS[architecture()]


def _unit_stride(x_TD: torch.Tensor | None) -> torch.Tensor | None:
    return x_TD if x_TD is None or x_TD.stride(-1) == 1 else x_TD.contiguous()


def _torch_forward(h_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, hf: bool) -> Pair:
    wide_TD = h_TD.float()
    rstd_T = torch.rsqrt(wide_TD.pow(2).mean(-1) + eps)
    normal_TD = wide_TD * rstd_T[:, None]
    if hf:
        return weight_D * normal_TD.to(h_TD.dtype), rstd_T
    return (normal_TD * weight_D.float()).to(h_TD.dtype), rstd_T


def _torch_backward(
    dy_TD: torch.Tensor, dsum_TD: torch.Tensor | None, h_TD: torch.Tensor, weight_D: torch.Tensor, rstd_T: torch.Tensor
) -> Pair:
    normal_TD = h_TD.float() * rstd_T[:, None]
    g_TD = dy_TD.float() * weight_D.float()
    dh_TD = rstd_T[:, None] * (g_TD - normal_TD * (g_TD * normal_TD).mean(-1, keepdim=True))
    if dsum_TD is not None:
        dh_TD += dsum_TD.float()
    return dh_TD.to(h_TD.dtype), (dy_TD.float() * normal_TD).sum(0).to(weight_D.dtype)


def _backward_fake(
    dy_TD: torch.Tensor,
    dsum_TD: torch.Tensor | None,
    h_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor,
    triton: bool,
) -> Pair:
    return h_TD.new_empty(h_TD.shape), weight_D.new_empty(weight_D.shape)


@kernel_op("rms_norm_backward", fake=_backward_fake)
def _backward_op(
    dy_TD: torch.Tensor,
    dsum_TD: torch.Tensor | None,
    h_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor,
    triton: bool,
) -> Pair:
    return (_launch_backward if triton else _torch_backward)(dy_TD, dsum_TD, h_TD, weight_D, rstd_T)


def _forward_fake(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, hf: bool, triton: bool) -> Pair:
    return _outputs(x_TD, weight_D, hf)


def _forward_context(ctx: Any, inputs: tuple, output: Pair) -> None:
    x_TD, weight_D, *_, ctx.triton = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, weight_D, output[1])


def _forward_backward(ctx: Any, dy_TD: torch.Tensor | None, _: None) -> tuple:
    if dy_TD is None:
        return None, None, None, None, None
    return *_backward_op(dy_TD, None, *ctx.saved_tensors, ctx.triton), None, None, None


@kernel_op("rms_norm", fake=_forward_fake, setup_context=_forward_context, backward=_forward_backward)
def _forward_op(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, hf: bool, triton: bool) -> Pair:
    if triton:
        y_TD, _, rstd_T = _launch_forward(x_TD, None, weight_D, eps, hf)
        return y_TD, rstd_T
    return _torch_forward(x_TD, weight_D, eps, hf)


def _add_fake(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, hf: bool, triton: bool
) -> Triple:
    y_TD, rstd_T = _outputs(x_TD, weight_D, hf)
    return y_TD, x_TD.new_empty(x_TD.shape), rstd_T


def _add_context(ctx: Any, inputs: tuple, output: Triple) -> None:
    _, _, weight_D, *_, ctx.triton = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight_D, output[2])


def _add_backward(ctx: Any, dy_TD: torch.Tensor | None, dsum_TD: torch.Tensor | None, _: None) -> tuple:
    dh_TD, dweight_D = dsum_TD, None
    if dy_TD is not None:
        dh_TD, dweight_D = _backward_op(dy_TD, dsum_TD, *ctx.saved_tensors, ctx.triton)
    return dh_TD, dh_TD, dweight_D, None, None, None


@kernel_op("add_rms_norm", fake=_add_fake, setup_context=_add_context, backward=_add_backward)
def _add_op(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, hf: bool, triton: bool
) -> Triple:
    if triton:
        return _launch_forward(x_TD, residual_TD, weight_D, eps, hf)
    sum_TD = x_TD + residual_TD
    y_TD, rstd_T = _torch_forward(sum_TD, weight_D, eps, hf)
    return y_TD, sum_TD, rstd_T


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, *, casting: Casting = "fp32", impl: Impl | None = None
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    Moves 2 T D elements forward and 3 T D backward; saves x, weight and T fp32 values. First-order gradients for x
    and weight, in their dtypes, bitwise repeatable.

    Args:
        x_TD: [..., D]; fp32, bf16 or fp16. Rows may be strided.
        weight_D: [D]; fp32, bf16 or fp16, not necessarily x's.
        eps: added to the mean square.
        casting: "fp32", one rounding at the end and a result in x's dtype, or "hf", the casts of Hugging Face's
            LlamaRMSNorm in its order (the file's header says more).
        impl: "triton" or "torch" instead of what x's device and the environment say.

    Returns:
        [..., D], contiguous.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    _check(x_TD, weight_D, eps, casting)
    rows_TD = x_TD.reshape(-1, x_TD.shape[-1])
    y_TD, _ = _forward_op(rows_TD, weight_D, eps, casting == "hf", use_triton(x_TD, impl))
    return _in_shape(y_TD, x_TD)


def add_rms_norm(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    casting: Casting = "fp32",
    impl: Impl | None = None,
) -> Pair:
    """(rms_norm(x + residual), x + residual) in one pass.

    Moves 4 T D elements forward and 4 T D backward, where the sum's gradient is added in the same pass; saves the sum,
    weight and T fp32 values. x and residual get the same gradient. Otherwise as `rms_norm`.

    Args:
        x_TD: [..., D].
        residual_TD: shape and dtype of x.
        weight_D: [D].
        eps: added to the mean square.
        casting: as in `rms_norm`; in both, the sum is rounded to x's dtype before it is normalised.
        impl: as in `rms_norm`.

    Returns:
        The normalised sum and the sum (x's dtype), both differentiable, contiguous.
    """
    _check(x_TD, weight_D, eps, casting)
    if (residual_TD.shape, residual_TD.dtype, residual_TD.device) != (x_TD.shape, x_TD.dtype, x_TD.device):
        raise ValueError(f"residual_TD is {_describe(residual_TD)}; it must be {_describe(x_TD)}, as x_TD is")
    rows = (-1, x_TD.shape[-1])
    flags = (casting == "hf", use_triton(x_TD, impl))
    y_TD, sum_TD, _ = _add_op(x_TD.reshape(rows), residual_TD.reshape(rows), weight_D, eps, *flags)
    return _in_shape(y_TD, x_TD), _in_shape(sum_TD, x_TD)


def _in_shape(rows_TD: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """No view where rows are what was given: FSDP warns of modules that return one."""
    return rows_TD if x.ndim == 2 else rows_TD.view(x.shape)


def _check(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, casting: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if x_TD.ndim < 1 or x_TD.shape[-1] < 1 or x_TD.dtype not in dtypes:
        raise ValueError(f"x_TD is {_describe(x_TD)}; it must be fp32, bf16 or fp16 [..., D] with D >= 1")
    if weight_D.shape != x_TD.shape[-1:] or weight_D.dtype not in dtypes or weight_D.device != x_TD.device:
        expected = f"fp32, bf16 or fp16 [{x_TD.shape[-1]}] on {x_TD.device}"
        raise ValueError(f"weight_D is {_describe(weight_D)}; it must be {expected}")
    if not eps >= 0.0:
        raise ValueError(f"eps is {eps}; it must not be negative")
    if casting not in ("fp32", "hf"):
        raise ValueError(f"casting is {casting!r}; it must be 'fp32' or 'hf'")


def _describe(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
