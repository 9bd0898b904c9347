"""The gated activation of Llama's MLP (Shazeer 2020, arXiv 2002.05202), alone and with the down projection behind it.

    s = 1 / (1 + exp(-gate))        silu = gate * s        h = silu * up
    dgate = dh * up * (s + silu * (1 - s))        dup = dh * silu

`swiglu` saves gate and up. The linear layer behind it saves h as well, for the gradient of its weight: 235 MB a layer
at Llama-3-8B's sizes and 8192 tokens. `swiglu_down` saves no h: the pass of its backward that makes dgate and dup makes
h too, which writes T F more elements and reads nothing more.

Casts: arithmetic in fp32 and one rounding of each result, except that "hf" rounds silu to the dtype before it is
multiplied by up, as Hugging Face's LlamaMLP does. The gradients are the same for both.

Bytes for T rows of F elements of b bytes: forward 3 T F b, backward 5 T F b, 6 T F b where it makes h again. About 6
and 12 FLOPs an element. Elements do not meet, so the bits depend on no launch parameter. Rows are cut into column tiles
on every architecture: a program with a whole row of 14336 takes so many registers that half of the warps stay out.

Shape suffixes: T rows, F intermediate size, D hidden size.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F

from umedtrain.kernels._dispatch import Impl, pick, use_triton
from umedtrain.kernels._op import kernel_op
from umedtrain.kernels._triton import tl, triton

Casting = Literal["fp32", "hf"]
ANY = 1 << 31

# (columns up to, (bytes of a tensor in a tile, launch options)): 16 bytes a thread, one vector.
CONFIG = {"default": ((64, (128, {"num_warps": 1})), (256, (512, {"num_warps": 1})), (ANY, (2048, {"num_warps": 4})))}
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _product(silu, up, HF: tl.constexpr, dtype: tl.constexpr):
    if HF:
        silu = silu.to(dtype).to(tl.float32)
    return (silu * up).to(dtype)


@triton.jit
def _swiglu_forward_kernel(
    gate_ptr, up_ptr, h_ptr, gate_stride, up_stride, columns, tiles, HF: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    h = _product(gate * _sigmoid(gate), up, HF, h_ptr.dtype.element_ty)
    tl.store(h_ptr + row * columns + column, h, mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, dh_stride, gate_stride, up_stride, columns, tiles,
    RECOMPUTE: tl.constexpr, HF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    dh = tl.load(dh_ptr + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    target = row * columns + column
    dtype = dgate_ptr.dtype.element_ty
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dgate_ptr + target, (dh * up * (silu * (1.0 - sigmoid) + sigmoid)).to(dtype), mask=inside)
    tl.store(dup_ptr + target, (dh * silu).to(dtype), mask=inside)
    if RECOMPUTE:
        tl.store(h_ptr + target, _product(silu, up, HF, dtype), mask=inside)


def _launch_forward(gate_TF: torch.Tensor, up_TF: torch.Tensor, hf: bool) -> torch.Tensor:
    h_TF = gate_TF.new_empty(gate_TF.shape)
    if h_TF.numel():
        gate_TF, up_TF = _unit_stride(gate_TF), _unit_stride(up_TF)
        grid, sizes, options = _tiling(gate_TF)
        _swiglu_forward_kernel[grid](gate_TF, up_TF, h_TF, gate_TF.stride(0), up_TF.stride(0), *sizes, HF=hf, **options)
    return h_TF


def _launch_backward(
    dh_TF: torch.Tensor, gate_TF: torch.Tensor, up_TF: torch.Tensor, recompute: bool, hf: bool
) -> list[torch.Tensor]:
    outputs = [gate_TF.new_empty(gate_TF.shape) for _ in range(3 if recompute else 2)]
    if gate_TF.numel():
        tensors = [_unit_stride(x) for x in (dh_TF, gate_TF, up_TF)]
        strides = [x.stride(0) for x in tensors]
        grid, sizes, options = _tiling(gate_TF)
        h_TF = outputs[2] if recompute else None
        flags = {"RECOMPUTE": recompute, "HF": hf}
        _swiglu_backward_kernel[grid](*tensors, *outputs[:2], h_TF, *strides, *sizes, **flags, **options)
    return outputs


def _tiling(gate_TF: torch.Tensor) -> tuple[tuple[int], tuple[int, int], dict[str, Any]]:
    """Grid, (columns, tiles of a row), and launch options."""
    rows, columns = gate_TF.shape
    tile_bytes, options = pick(CONFIG, columns)
    block = tile_bytes // gate_TF.element_size()
    tiles = triton.cdiv(columns, block)
    return (rows * tiles,), (columns, tiles), {"BLOCK": block, **options}


def _unit_stride(x_TF: torch.Tensor) -> torch.Tensor:
    return x_TF if x_TF.stride(-1) == 1 else x_TF.contiguous()


def _torch_product(gate: torch.Tensor, up: torch.Tensor, hf: bool) -> torch.Tensor:
    silu = F.silu(gate.float())
    if hf:
        return silu.to(gate.dtype) * up
    return (silu * up.float()).to(gate.dtype)


def _torch_backward(
    dh_TF: torch.Tensor, gate_TF: torch.Tensor, up_TF: torch.Tensor, recompute: bool, hf: bool
) -> list[torch.Tensor]:
    gate, dh = gate_TF.float(), dh_TF.float()
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    dgate_TF = (dh * up_TF.float() * (silu * (1.0 - sigmoid) + sigmoid)).to(gate_TF.dtype)
    dup_TF = (dh * silu).to(gate_TF.dtype)
    return [dgate_TF, dup_TF, _torch_product(gate_TF, up_TF, hf)] if recompute else [dgate_TF, dup_TF]


def _backward_fake(
    dh_TF: torch.Tensor, gate_TF: torch.Tensor, up_TF: torch.Tensor, recompute: bool, hf: bool, triton: bool
) -> list[torch.Tensor]:
    return [gate_TF.new_empty(gate_TF.shape) for _ in range(3 if recompute else 2)]


@kernel_op("swiglu_backward", fake=_backward_fake)
def _backward_op(
    dh_TF: torch.Tensor, gate_TF: torch.Tensor, up_TF: torch.Tensor, recompute: bool, hf: bool, triton: bool
) -> list[torch.Tensor]:
    return (_launch_backward if triton else _torch_backward)(dh_TF, gate_TF, up_TF, recompute, hf)


def _forward_fake(gate_TF: torch.Tensor, up_TF: torch.Tensor, hf: bool, triton: bool) -> torch.Tensor:
    return gate_TF.new_empty(gate_TF.shape)


def _forward_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    gate_TF, up_TF, ctx.hf, ctx.triton = inputs
    ctx.save_for_backward(gate_TF, up_TF)


def _forward_backward(ctx: Any, dh_TF: torch.Tensor) -> tuple:
    return *_backward_op(dh_TF, *ctx.saved_tensors, False, ctx.hf, ctx.triton), None, None


@kernel_op("swiglu", fake=_forward_fake, setup_context=_forward_context, backward=_forward_backward)
def _forward_op(gate_TF: torch.Tensor, up_TF: torch.Tensor, hf: bool, triton: bool) -> torch.Tensor:
    return (_launch_forward if triton else _torch_product)(gate_TF, up_TF, hf)


def _down_fake(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, weight_DF: torch.Tensor, hf: bool, triton: bool
) -> torch.Tensor:
    return gate_TF.new_empty(gate_TF.shape[0], weight_DF.shape[0])


def _down_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    gate_TF, up_TF, weight_DF, ctx.hf, ctx.triton = inputs
    ctx.save_for_backward(gate_TF, up_TF, weight_DF)


def _down_backward(ctx: Any, dy_TD: torch.Tensor) -> tuple:
    gate_TF, up_TF, weight_DF = ctx.saved_tensors
    dgate_TF, dup_TF, h_TF = _backward_op(dy_TD @ weight_DF, gate_TF, up_TF, True, ctx.hf, ctx.triton)
    return dgate_TF, dup_TF, dy_TD.T @ h_TF, None, None


@kernel_op("swiglu_down", fake=_down_fake, setup_context=_down_context, backward=_down_backward)
def _down_op(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, weight_DF: torch.Tensor, hf: bool, triton: bool
) -> torch.Tensor:
    return (_launch_forward if triton else _torch_product)(gate_TF, up_TF, hf) @ weight_DF.T


def swiglu(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, *, casting: Casting = "fp32", impl: Impl | None = None
) -> torch.Tensor:
    """silu(gate) * up, elementwise.

    Moves 3 T F elements forward and 5 T F backward; saves gate and up, never the product. First-order gradients for
    both, bitwise repeatable.

    Args:
        gate_TF: [..., F]; fp32, bf16 or fp16. Rows may be strided: halves of a fused projection.
        up_TF: shape and dtype of gate.
        casting: "fp32", one rounding at the end, or "hf", silu rounded before the product as Hugging Face does.
        impl: "triton" or "torch" instead of what gate's device and the environment say.

    Returns:
        [..., F] in gate's dtype, contiguous.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    _check(gate_TF, up_TF, casting)
    rows = (-1, gate_TF.shape[-1])
    h_TF = _forward_op(gate_TF.reshape(rows), up_TF.reshape(rows), casting == "hf", use_triton(gate_TF, impl))
    return h_TF.view(gate_TF.shape)


def swiglu_down(
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor,
    down_weight_DF: torch.Tensor,
    *,
    casting: Casting = "fp32",
    impl: Impl | None = None,
) -> torch.Tensor:
    """linear(silu(gate) * up, down_weight) that saves gate, up and the weight, and makes the product again in backward.

    Against `F.linear(swiglu(gate, up), down_weight)`: T F elements less are kept between forward and backward, and T F
    more are written in backward. The results are the same, bit for bit. First-order gradients for all three.

    Args:
        gate_TF: [..., F], as in `swiglu`.
        up_TF: shape and dtype of gate.
        down_weight_DF: [D, F] in gate's dtype.
        casting: as in `swiglu`.
        impl: as in `swiglu`; the matrix products are PyTorch's.

    Returns:
        [..., D] in gate's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    _check(gate_TF, up_TF, casting)
    expected = (2, gate_TF.shape[-1], gate_TF.dtype, gate_TF.device)
    if (down_weight_DF.ndim, down_weight_DF.shape[-1], down_weight_DF.dtype, down_weight_DF.device) != expected:
        wanted = f"{str(gate_TF.dtype).removeprefix('torch.')} [D, {gate_TF.shape[-1]}] on {gate_TF.device}"
        raise ValueError(f"down_weight_DF is {_describe(down_weight_DF)}; it must be {wanted}")
    rows = (-1, gate_TF.shape[-1])
    flags = (casting == "hf", use_triton(gate_TF, impl))
    y_TD = _down_op(gate_TF.reshape(rows), up_TF.reshape(rows), down_weight_DF, *flags)
    return y_TD.view(*gate_TF.shape[:-1], down_weight_DF.shape[0])


def _check(gate_TF: torch.Tensor, up_TF: torch.Tensor, casting: str) -> None:
    if gate_TF.ndim < 1 or gate_TF.shape[-1] < 1 or gate_TF.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"gate_TF is {_describe(gate_TF)}; it must be fp32, bf16 or fp16 [..., F] with F >= 1")
    if (up_TF.shape, up_TF.dtype, up_TF.device) != (gate_TF.shape, gate_TF.dtype, gate_TF.device):
        raise ValueError(f"up_TF is {_describe(up_TF)}; it must be {_describe(gate_TF)}, as gate_TF is")
    if casting not in ("fp32", "hf"):
        raise ValueError(f"casting is {casting!r}; it must be 'fp32' or 'hf'")


def _describe(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
