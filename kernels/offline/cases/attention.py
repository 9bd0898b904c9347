"""Launches of `umedtrain.kernels.attention`, forward and backward, for one layer of a packed stream."""

from collections.abc import Callable

import torch

from umedtrain.kernels.attention import attention
from umedtrain.kernels.attention_plan import attention_plan
from umedtrain.kernels.offline.cases import LlamaShape


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """Half-precision q, k and v: contiguous, slices of a fused projection, heads outside tokens, other head sizes.

    Heads outside tokens, and a head size that is no power of two, are what tensor descriptors cannot read.
    """
    return {
        "bf16": lambda: run(shape, shape.head_dim),
        "fp16, fused projection": lambda: run(shape, shape.head_dim, torch.float16, arrange=_fused),
        "bf16, heads first": lambda: run(shape, shape.head_dim, arrange=_heads_first),
        "bf16, head_dim 64": lambda: run(shape, 64),
        "bf16, head_dim 96": lambda: run(shape, 96),
        "bf16, head_dim 256": lambda: run(shape, 256),
    }


Tensors = list[torch.Tensor]


def _contiguous(tokens: int, heads: list[int], head_dim: int, dtype: torch.dtype) -> Tensors:
    return [torch.empty(tokens, n, head_dim, dtype=dtype, device="meta") for n in heads]


def _heads_first(tokens: int, heads: list[int], head_dim: int, dtype: torch.dtype) -> Tensors:
    return [torch.empty(n, tokens, head_dim, dtype=dtype, device="meta").transpose(0, 1) for n in heads]


def _fused(tokens: int, heads: list[int], head_dim: int, dtype: torch.dtype) -> Tensors:
    return list(torch.empty(tokens, sum(heads), head_dim, dtype=dtype, device="meta").split(heads, 1))


def run(
    shape: LlamaShape,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    arrange: Callable[[int, list[int], int, torch.dtype], Tensors] = _contiguous,
) -> None:
    """Forward and backward over two documents, one with an answer, on meta tensors."""
    plan = attention_plan([shape.tokens // 2, shape.tokens // 4, shape.tokens // 4], [None, 0, None], device="meta")
    heads = [shape.heads, shape.kv_heads, shape.kv_heads]
    inputs = [x.requires_grad_() for x in arrange(shape.tokens, heads, head_dim, dtype)]
    (do_THK,) = arrange(shape.tokens, [shape.heads], head_dim, dtype)
    torch.autograd.grad(attention(*inputs, plan, impl="triton"), inputs, do_THK)
