"""Launches of `umedtrain.kernels.paged_attention` for one layer of a decode step."""

from collections.abc import Callable

import torch

from umedtrain.kernels.offline.cases import LlamaShape
from umedtrain.kernels.paged_attention import paged_attention

_SEQUENCES = 64
_PAGE = 16


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """Name -> host code that launches on meta tensors."""
    return {
        "paged_attention_decode": lambda: _decode(shape, 1),
        "paged_attention_verify": lambda: _decode(shape, 5),
        "paged_attention_chunk": lambda: _decode(shape, 64),
        "paged_attention_decode_fp32": lambda: _decode(shape, 1, torch.float32),
    }


def _decode(shape: LlamaShape, queries: int, dtype: torch.dtype = torch.bfloat16) -> None:
    pages = shape.tokens // _PAGE
    cache = torch.empty(_SEQUENCES * pages, _PAGE, shape.kv_heads, shape.head_dim, dtype=dtype, device="meta")
    paged_attention(
        torch.empty(_SEQUENCES, queries, shape.heads, shape.head_dim, dtype=dtype, device="meta"),
        cache,
        cache,
        torch.empty(_SEQUENCES, pages, dtype=torch.int32, device="meta"),
        torch.empty(_SEQUENCES, dtype=torch.int32, device="meta"),
        impl="triton",
    )
