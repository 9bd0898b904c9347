"""What the model asks of a key-value cache. The sampler owns the storage (`umedtrain.sampling`)."""

from typing import Protocol

import torch

from umedtrain.model.layout import Layout


class KVCache(Protocol):
    """Keys and values of tokens already seen, for every layer.

    Shape suffixes: T new tokens, H query heads, G key-value heads, K head dimension.
    """

    def positions(self, layout: Layout) -> torch.Tensor:
        """RoPE position of each of the stream's new tokens, int64 [T]."""
        ...

    def attend(
        self, layer: int, q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGK: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """Store the new (already rotated) keys and values of `layer`; return the attention output [T, H, K]."""
        ...
