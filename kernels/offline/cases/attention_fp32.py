"""Launches of `umedtrain.kernels.attention` on fp32, which no tensor core multiplies exactly: hence its own budget."""

from collections.abc import Callable

import torch

from umedtrain.kernels.offline.cases import LLAMA_8B, LlamaShape
from umedtrain.kernels.offline.cases.attention import run


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """The model's head size and, with 8B's heads, the smaller one that is tuned."""
    sizes = (64, 128) if shape == LLAMA_8B else (shape.head_dim,)
    return {f"head_dim {size}": lambda size=size: run(shape, size, torch.float32) for size in sizes}
