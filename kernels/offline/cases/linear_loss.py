"""Launches of `umedtrain.kernels.linear_loss`: the passes over a model's head, behind the choice of rows.

That choice reads the targets, which meta tensors do not have; all rows have one here.
"""

from collections.abc import Callable

import torch

from umedtrain.kernels.linear_chunks import CHUNK_BYTES
from umedtrain.kernels.linear_passes import gradients, loss_and_gradients, statistics
from umedtrain.kernels.offline.cases import LlamaShape


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """Name -> host code that launches on meta tensors."""
    return {
        "linear_logprobs": lambda: _logprobs(shape, with_entropy=False),
        "linear_logprobs_entropy": lambda: _logprobs(shape, with_entropy=True),
        "linear_cross_entropy": lambda: _cross_entropy(shape),
    }


def _inputs(shape: LlamaShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_ND = torch.empty(shape.tokens, shape.hidden, dtype=torch.bfloat16, device="meta")
    weight_VD = torch.empty(shape.vocab, shape.hidden, dtype=torch.bfloat16, device="meta")
    return hidden_ND, weight_VD, torch.empty(shape.tokens, dtype=torch.int64, device="meta")


def _logprobs(shape: LlamaShape, *, with_entropy: bool) -> None:
    inputs = _inputs(shape)
    statistics(*inputs, chunk_bytes=CHUNK_BYTES, with_entropy=with_entropy, with_triton=True)
    terms_KN = torch.empty(6 if with_entropy else 4, shape.tokens, device="meta")
    gradients(*inputs, terms_KN, chunk_bytes=CHUNK_BYTES, want_hidden=True, want_weight=True, with_triton=True)


def _cross_entropy(shape: LlamaShape) -> None:
    weights_N = torch.empty(shape.tokens, device="meta")
    loss_and_gradients(
        *_inputs(shape), weights_N, chunk_bytes=CHUNK_BYTES, want_hidden=True, want_weight=True, with_triton=True
    )
