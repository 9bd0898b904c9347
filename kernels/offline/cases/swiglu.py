"""Launches of `umedtrain.kernels.swiglu`: forward, backward, and backward that makes the product again."""

from collections.abc import Callable

import torch

from umedtrain.kernels.offline.cases import LlamaShape
from umedtrain.kernels.swiglu import Casting, swiglu, swiglu_down


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """bf16 in both castings, fp32, and bf16 halves of a fused projection."""
    return {
        "bf16": lambda: _swiglu(shape, torch.bfloat16, "fp32"),
        "bf16, hf": lambda: _swiglu(shape, torch.bfloat16, "hf"),
        "fp32": lambda: _swiglu(shape, torch.float32, "fp32"),
        "bf16, fused projection": lambda: _swiglu(shape, torch.bfloat16, "fp32", fused=True),
    }


def _swiglu(shape: LlamaShape, dtype: torch.dtype, casting: Casting, *, fused: bool = False) -> None:
    both = torch.empty(shape.tokens, 2 * shape.intermediate, dtype=dtype, device="meta", requires_grad=True)
    gate_TF, up_TF = both.chunk(2, dim=-1) if fused else (x.clone() for x in both.chunk(2, dim=-1))
    h_TF = swiglu(gate_TF, up_TF, casting=casting, impl="triton")
    weight_DF = torch.empty(shape.hidden, shape.intermediate, dtype=dtype, device="meta", requires_grad=True)
    y_TD = swiglu_down(gate_TF, up_TF, weight_DF, casting=casting, impl="triton")
    torch.autograd.backward((h_TF, y_TD), (torch.empty_like(h_TF), torch.empty_like(y_TD)))
