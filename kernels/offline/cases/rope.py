"""Launches of `umedtrain.kernels.rope`, forward and backward."""

from collections.abc import Callable

import torch

from umedtrain.kernels.offline.cases import LlamaShape
from umedtrain.kernels.rope import rope


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """Contiguous heads in both types, and heads that are slices of a fused projection."""
    return {
        "bf16": lambda: _rope(shape, torch.bfloat16),
        "fp32": lambda: _rope(shape, torch.float32),
        "bf16, fused projection": lambda: _rope(shape, torch.bfloat16, unused_heads=shape.kv_heads),
    }


def _rope(shape: LlamaShape, dtype: torch.dtype, unused_heads: int = 0) -> None:
    heads = shape.heads + shape.kv_heads
    qkv = torch.empty(shape.tokens, heads + unused_heads, shape.head_dim, dtype=dtype, device="meta")
    if unused_heads:
        q_THK, k_TGK, _ = qkv.requires_grad_().split((shape.heads, shape.kv_heads, unused_heads), dim=1)
    else:
        q_THK, k_TGK = (x.clone().requires_grad_() for x in qkv.split((shape.heads, shape.kv_heads), dim=1))
    table_TF = torch.empty(shape.tokens, shape.head_dim // 2, device="meta")
    outputs = rope(q_THK, k_TGK, table_TF, table_TF, impl="triton")
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
