"""Triton's CPU interpreter with the arithmetic of a GPU.

With TRITON_INTERPRET=1, Triton 3.7 keeps bf16 as raw uint16, so `tl.dot` and `a + b` in bf16 work on bit patterns,
fp32 -> bf16 truncates and fp32 -> fp8 rounds wrongly (triton issues 4972, 5424, 11584). `install()` replaces the
interpreter's builder so that a kernel computes what it would compute on a GPU:

- conversions to bf16 and fp8 round to nearest, ties to even; fp8 saturates as PTX's `cvt.rn.satfinite` does;
- bf16 arithmetic is done in fp32 and rounded once for each operation;
- `tl.dot` multiplies exactly and accumulates in fp32; fp32 operands lose the 13 low bits that the tensor core ignores,
  unless the kernel says `input_precision="ieee"` (or "tf32x3");
- Python floats among a kernel's arguments are fp32 scalars (stock: fp64 without `.to`), Python bools are int1;
- a lane that a load masks out without giving `other` is undefined: NaN in floats and 0x7F.. in integers, not 0;
- floating-point exceptions and wrapping integers are silent, as on a GPU;
- `tl.reduce` and `tl.associative_scan` with a combine function of one's own call it log2(n) times on whole blocks
  instead of once per element, which is what makes tests of such kernels affordable.

What stays unlike a GPU: programs run one after another, `tl.dot` takes blocks of any size, and sums are in NumPy's
order. Written against Triton 3.7's private names; another version fails in `install()` or in the tests of this file.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.runtime import interpreter as stock

from umedtrain.kernels._triton import tl

Array = np.ndarray
Handle = stock.TensorHandle

_FP8 = {tl.float8e5: torch.float8_e5m2, tl.float8e4nv: torch.float8_e4m3fn}
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def install() -> None:
    """Give the interpreter of this process the arithmetic above; a second call changes nothing.

    Raises:
        RuntimeError: where TRITON_INTERPRET was not set, so that kernels would be compiled.
    """
    if not knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported; this process compiles its kernels")
    if isinstance(stock.interpreter_builder, GpuBuilder):
        return
    stock.interpreter_builder.__class__ = GpuBuilder
    # Off: it computes every integer operation a second time in int64 for an assertion that only debug mode makes.
    stock.interpreter_builder.options = stock.InterpreterOptions(sanitize_overflow=False)
    stock.ReduceOps, stock.ScanOps = _Reduce, _Scan
    stock.GridExecutor = GridExecutor
    stock._implicit_cvt = functools.partial(_to_scalar, stock._implicit_cvt)
    stock._patch_lang = functools.partial(_patch_once, stock._patch_lang)


# --- rounding


def bf16_to_fp32(bits: Array) -> Array:
    """Values of bf16 bit patterns (uint16)."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: Array) -> Array:
    """bf16 bit patterns (uint16), rounded to nearest, ties to even; a NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), ((bits >> 16) | np.uint32(0x40)).astype(np.uint16), rounded)


def fp32_to_tf32(values: Array) -> Array:
    """fp32 without the 13 low bits of the significand, which a tensor core does not read."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    return np.where(np.isnan(values), values, (bits & np.uint32(0xFFFFE000)).view(np.float32))


def _fp8_to_fp32(bits: Array, dtype: tl.dtype) -> Array:
    return torch.from_numpy(np.ascontiguousarray(bits)).view(_FP8[dtype]).float().numpy().reshape(np.shape(bits))


def _fp32_to_fp8(values: Array, dtype: tl.dtype) -> Array:
    largest = torch.finfo(_FP8[dtype]).max
    clamped = torch.from_numpy(np.array(values, dtype=np.float32)).clamp(-largest, largest)
    return clamped.to(_FP8[dtype]).view(torch.uint8).numpy()


def _is_emulated(dtype: tl.dtype) -> bool:
    """Whether NumPy lacks the type, so that the interpreter holds its bit patterns."""
    return dtype == tl.bfloat16 or dtype in _FP8


def _to_fp32(handle: Handle) -> Array:
    dtype = handle.dtype.scalar
    if dtype == tl.bfloat16:
        return bf16_to_fp32(handle.data)
    return _fp8_to_fp32(handle.data, dtype) if dtype in _FP8 else handle.data


def _from_fp32(values: Array, dtype: tl.dtype) -> Handle:
    values = np.asarray(values, dtype=np.float32)
    return Handle(fp32_to_bf16(values) if dtype == tl.bfloat16 else _fp32_to_fp8(values, dtype), dtype)


# --- operations


class GpuBuilder(stock.InterpreterBuilder):
    """The interpreter's builder: what `tl.*` calls for each operation, on NumPy arrays in `Handle`s."""

    def cast_impl(self, src: Handle, dst_type: tl.dtype) -> Handle:
        """Conversion between any two scalar types."""
        source, target = src.dtype.scalar, dst_type.scalar
        if _is_emulated(source):
            values = Handle(_to_fp32(src), tl.float32)
            return values if target == tl.float32 else self.cast_impl(values, dst_type)
        if _is_emulated(target):
            return _from_fp32(src.data, target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Handle, dst_type: tl.dtype, rounding_mode: Any) -> Handle:
        """`.to` with a rounding mode, and conversions that involve fp8."""
        if _is_emulated(src.dtype.scalar) or _is_emulated(dst_type.scalar):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: Handle, rhs: Handle, op: Callable[..., Array]) -> Handle:
        """Arithmetic and comparisons."""
        dtype = lhs.dtype.scalar
        if not _is_emulated(dtype) or op in _BITWISE:
            return super().binary_op(lhs, rhs, op)
        result = op(_to_fp32(lhs), _to_fp32(rhs))
        return Handle(result, tl.int1) if op in _COMPARISONS else _from_fp32(result, dtype)

    def unary_op(self, arg: Handle, op: Callable[..., Array]) -> Handle:
        """Functions of one argument."""
        dtype = arg.dtype.scalar
        return _from_fp32(op(_to_fp32(arg)), dtype) if _is_emulated(dtype) else super().unary_op(arg, op)

    def ternary_op(self, lhs: Handle, rhs: Handle, other: Handle, op: Callable[..., Array]) -> Handle:
        """`tl.where`, which selects bit patterns as they are, and `tl.clamp`."""
        dtype = other.dtype.scalar
        if not _is_emulated(dtype) or op is np.where:
            return super().ternary_op(lhs, rhs, other, op)
        return _from_fp32(op(_to_fp32(lhs), _to_fp32(rhs), _to_fp32(other)), dtype)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        """x * y + z."""
        dtype = z.dtype.scalar
        if not _is_emulated(dtype):
            return super().create_fma(x, y, z)
        return _from_fp32(_to_fp32(x) * _to_fp32(y) + _to_fp32(z), dtype)

    def create_dot(self, a: Handle, b: Handle, d: Handle, input_precision: Any, max_num_imprecise_acc: int) -> Handle:
        """d + a @ b: products of bf16, fp16 and fp8 are exact in fp32, integers accumulate in int32."""
        lhs, rhs = _to_fp32(a), _to_fp32(b)
        dtype = np.int32 if np.issubdtype(lhs.dtype, np.integer) else np.float32
        if a.dtype.scalar == tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            lhs, rhs = fp32_to_tf32(lhs), fp32_to_tf32(rhs)
        product = np.matmul(lhs.astype(dtype, copy=False), rhs.astype(dtype, copy=False)) + d.data
        return Handle(product.astype(d.data.dtype, copy=False), d.dtype.scalar)

    def get_bf16(self, value: float) -> Handle:
        """A bf16 constant; the stock builder has those of the other types only."""
        return _from_fp32(np.array([value]), tl.bfloat16)

    def create_masked_load(
        self, ptrs: Handle, mask: Handle, other: Handle | None, *options: Any, **named: Any
    ) -> Handle:
        """A load; masked lanes without `other` hold what no correct kernel may depend on."""
        if other is None and not np.all(mask.data):
            dtype = ptrs.get_element_ty()
            other = Handle(_undefined(ptrs.data.shape, dtype), dtype)
        return super().create_masked_load(ptrs, mask, other, *options, **named)


def _undefined(shape: tuple[int, ...], dtype: tl.dtype) -> Array:
    array = np.full(shape, 0xFF if dtype.is_floating() else 0x7F, dtype=np.uint8)  # all ones are a NaN in every format
    storage = stock._get_np_dtype(dtype)
    if storage == np.bool_:
        return array.astype(np.bool_)
    return np.repeat(array[..., None], storage.itemsize, axis=-1).view(storage)[..., 0]


def _to_scalar(convert: Callable[[Any], Any], arg: Any) -> Any:
    """A kernel's argument as a tensor, given how the stock interpreter converts it."""
    if type(arg) is float:
        return tl.tensor(Handle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
    if type(arg) is bool:
        return tl.tensor(Handle(np.array([arg], dtype=np.bool_), tl.int1), tl.int1)
    return convert(arg)


class GridExecutor(stock.GridExecutor):
    """Runs every program of a launch, without NumPy's warnings about what a GPU does silently."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Launch."""
        _patched.clear()
        with np.errstate(all="ignore"):
            super().__call__(*args, **kwargs)


_patched: set[Any] = set()


def _patch_once(patch: Callable[[Any], Any], function: Any) -> Any:
    """Make `tl` the interpreter's for `function`; a helper called by a kernel finds that done (half of the time)."""
    modules = {value for value in function.__globals__.values() if value is tl or value is tl.core}
    if modules and modules <= _patched:
        return stock._LangPatchScope()
    _patched.update(modules)
    return patch(function)


# --- reductions and scans


class _Reduce(stock.ReduceOps):
    """`tl.reduce`: sums, minima and maxima by NumPy, any other combine function pairwise on whole blocks."""

    def sum(self, input: Any) -> Any:
        """Sums of 16 bits round at each addition, which is a mistake that must show."""
        return self.generic_reduce((input,))[0] if _is_half(input) else super().sum(input)

    def generic_reduce(self, input: tuple[Any, ...]) -> list[Any]:
        """The reduction of one or more blocks of one shape."""
        shape, axis = input[0].handle.data.shape, self.axis
        arrays = [part.handle.data.reshape(-1) if axis is None else part.handle.data for part in input]
        arrays = [np.moveaxis(array, axis or 0, 0) for array in arrays]
        dtypes = [part.dtype for part in input]
        while len(arrays[0]) > 1:  # neighbours, so that the order is kept; blocks have a power of two of elements
            arrays = _combine(self, [a[0::2] for a in arrays], [a[1::2] for a in arrays], dtypes)
        arrays = [a[0] for a in arrays]
        if self.keep_dims:
            arrays = [np.expand_dims(a, tuple(range(len(shape))) if axis is None else axis) for a in arrays]
        return [self.to_tensor(a if a.ndim else a.item(), d) for a, d in zip(arrays, dtypes, strict=True)]


class _Scan(stock.ScanOps):
    """`tl.associative_scan`: prefix sums and products by NumPy, others by doubling on whole blocks."""

    def cumsum(self, input: Any) -> list[Any]:
        """As `_Reduce.sum`."""
        return self.generic_scan((input,)) if _is_half(input) else super().cumsum(input)

    def generic_scan(self, input: tuple[Any, ...]) -> list[Any]:
        """The scan of one or more blocks of one shape."""
        dtypes = [part.dtype for part in input]
        arrays = [np.moveaxis(part.handle.data, self.axis, 0) for part in input]
        step = 1
        while step < len(arrays[0]):
            combined = _combine(self, [np.roll(a, step, axis=0) for a in arrays], arrays, dtypes)
            arrays = [np.concatenate([a[:step], c[step:]]) for a, c in zip(arrays, combined, strict=True)]
            step *= 2
        return [self.to_tensor(np.moveaxis(a, 0, self.axis), d) for a, d in zip(arrays, dtypes, strict=True)]


def _is_half(tensor: Any) -> bool:
    return tensor.dtype.is_floating() and tensor.dtype.primitive_bitwidth < 32


def _combine(op: Any, left: list[Array], right: list[Array], dtypes: list[tl.dtype]) -> list[Array]:
    both = [op.to_tensor(a, d) for side in (left, right) for a, d in zip(side, dtypes, strict=True)]
    result = op.combine_fn.fn(*both)
    return [r.handle.data for r in (result if isinstance(result, tuple) else (result,))]
