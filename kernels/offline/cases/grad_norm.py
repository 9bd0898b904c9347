"""Launches of `umedtrain.kernels.grad_norm` over the shards that one of eight ranks holds of a Llama."""

from collections.abc import Callable

import torch

from umedtrain.kernels.grad_norm import grad_norm
from umedtrain.kernels.offline.cases import LlamaShape
from umedtrain.kernels.offline.cases.adamw import shard_shapes


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """Gradients in bf16, and in fp32."""

    def run(dtype: torch.dtype) -> None:
        grad_norm([torch.empty(size, dtype=dtype, device="meta") for size in shard_shapes(shape)], impl="triton")

    return {"bf16": lambda: run(torch.bfloat16), "fp32": lambda: run(torch.float32)}
