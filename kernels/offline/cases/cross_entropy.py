"""Launches of `umedtrain.kernels.cross_entropy`: a model's logits, forward and backward."""

from collections.abc import Callable

import torch

from umedtrain.kernels.cross_entropy import cross_entropy
from umedtrain.kernels.offline.cases import LlamaShape


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """Name -> host code that launches on meta tensors."""
    return {
        "cross_entropy_bf16": lambda: _cross_entropy(shape.tokens, shape.vocab, torch.bfloat16),
        "cross_entropy_fp32": lambda: _cross_entropy(shape.tokens, shape.vocab, torch.float32),
    }


def _cross_entropy(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits_NV = torch.empty(rows, vocab, dtype=dtype, device="meta", requires_grad=True)
    targets_N = torch.empty(rows, dtype=torch.int64, device="meta")
    cross_entropy(logits_NV, targets_N, impl="triton").sum().backward()
