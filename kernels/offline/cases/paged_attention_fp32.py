"""Launches of `umedtrain.kernels.paged_attention` on fp32, which no tensor core multiplies exactly: its own budget."""

from collections.abc import Callable

import torch

from umedtrain.kernels.offline.cases import LlamaShape
from umedtrain.kernels.offline.cases.paged_attention import decode


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """A token of each sequence."""
    return {"paged_attention_decode": lambda: decode(shape, 1, torch.float32)}
