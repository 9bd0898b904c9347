"""Launches of `umedtrain.kernels.paged_attention` for one layer of a decode step."""

from collections.abc import Callable

import torch

from umedtrain.kernels.offline.cases import LlamaShape
from umedtrain.kernels.paged_attention import paged_attention

_SEQUENCES = 64
_PAGE = 16


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """A token of each sequence, a draft of five, and a piece of a prompt."""
    return {
        "paged_attention_decode": lambda: decode(shape, 1),
        "paged_attention_verify": lambda: decode(shape, 5),
        "paged_attention_chunk": lambda: decode(shape, 64),
    }


def decode(shape: LlamaShape, queries: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """The last `queries` tokens of 64 sequences, on meta tensors."""
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
