"""Launches of `umedtrain.kernels.sampling` for one decode step."""

from collections.abc import Callable

import torch

from umedtrain.kernels.offline.cases import LlamaShape
from umedtrain.kernels.sampling import sample

_SEQUENCES = 64


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """Name -> host code that launches on meta tensors."""
    return {
        f"sample_{name}": lambda dtype=dtype: _sample(shape, dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }


def _sample(shape: LlamaShape, dtype: torch.dtype) -> None:
    numbers_B = torch.empty(_SEQUENCES, device="meta")
    integers_B = torch.empty(_SEQUENCES, device="meta", dtype=torch.int64)
    sample(
        torch.empty(_SEQUENCES, shape.vocab, dtype=dtype, device="meta"),
        temperature_B=numbers_B,
        top_k_B=integers_B,
        top_p_B=numbers_B,
        min_p_B=numbers_B,
        seeds_B=integers_B,
        positions_B=integers_B,
        impl="triton",
    )
