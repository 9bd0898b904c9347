"""Launches of `umedtrain.kernels.norm`: forward and backward, alone and with the residual addition."""

import dataclasses
from collections.abc import Callable

import torch

from umedtrain.kernels.norm import WIDEST_FORWARD, add_rms_norm, rms_norm
from umedtrain.kernels.offline.cases import LlamaShape


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """bf16 with bf16 weights, with fp32 master weights, and fp32; and bf16 rows that no program holds whole."""
    bf16, fp32 = torch.bfloat16, torch.float32
    dtypes = {"bf16": (bf16, bf16), "bf16, fp32 weight": (bf16, fp32), "fp32": (fp32, fp32)}
    wide = dataclasses.replace(shape, hidden=WIDEST_FORWARD + 4096)
    kinds = {**{name: (shape, *pair) for name, pair in dtypes.items()}, "bf16, wide": (wide, bf16, bf16)}
    return {
        f"{run.__name__.strip('_')}, {name}": lambda run=run, kind=kind: run(*kind)
        for run in (_rms_norm, _add_rms_norm)
        for name, kind in kinds.items()
    }


def _tensors(shape: LlamaShape, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x_TD = torch.empty(shape.tokens, shape.hidden, dtype=dtype, device="meta", requires_grad=True)
    return x_TD, torch.empty(shape.hidden, dtype=weight_dtype, device="meta", requires_grad=True)


def _rms_norm(shape: LlamaShape, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x_TD, weight_D = _tensors(shape, dtype, weight_dtype)
    y_TD = rms_norm(x_TD, weight_D, 1e-5, impl="triton")
    y_TD.backward(torch.empty_like(y_TD))
    rms_norm(x_TD.detach(), weight_D, 1e-5, casting="hf", impl="triton")


def _add_rms_norm(shape: LlamaShape, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x_TD, weight_D = _tensors(shape, dtype, weight_dtype)
    outputs = add_rms_norm(x_TD, torch.empty_like(x_TD), weight_D, 1e-5, impl="triton")
    torch.autograd.backward(outputs, [torch.empty_like(y_TD) for y_TD in outputs])
