"""A Llama's forward pass for decoding, over a paged key-value cache and on the model's own weights.

The same layers twice: `TorchLayers` on any device, with the Triton kernels on a GPU, and `CpuLayers` in C++ with fp32
activations (`umedtrain.kernels.cpu`). In the latter every token's results have the same bits whatever else is computed
in the same pass; `TorchLayers(exact=True)` gets there by giving every matrix product the same number of rows.

Shape suffixes: T tokens of the pass, D hidden size, H query heads, G key-value heads, K head dimension, B sequences, M
pages of a sequence, P pages, S slots of a page, R rows whose logits are wanted, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from umedtrain import kernels
from umedtrain.kernels import cpu
from umedtrain.model.config import LlamaConfig
from umedtrain.model.llama import Llama, RMSNorm
from umedtrain.model.rope import rope_frequencies, rope_tables, rotate

EXACT_ROWS = 32
Weight = torch.Tensor | kernels.QuantizedWeight
Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Stream:
    """The tokens of one pass.

    Attributes:
        tokens_T: int64.
        sequence_T: row of `table_BM` that each token belongs to, int64; a sequence's tokens follow one another.
        position_T: int64; all earlier positions of the sequence are in the cache or in the pass.
        table_BM: int32 pages of each sequence.
        singles: so many tokens at the beginning are the only ones of their sequences.
        chunks: (first token, number of tokens) of the other sequences.
    """

    tokens_T: torch.Tensor
    sequence_T: torch.Tensor
    position_T: torch.Tensor
    table_BM: torch.Tensor
    singles: int
    chunks: tuple[tuple[int, int], ...] = ()


class PagedCache:
    """Keys and values of every layer, [P, S, G, K] each."""

    def __init__(
        self, config: LlamaConfig, num_pages: int, page_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_pages, page_size, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole pages, for a sequence that goes on from a page that others go on from too."""
        if not sources:
            return
        source, target = torch.tensor([sources, targets], device=self.keys[0].device)
        for pages in (*self.keys, *self.values):
            pages[target] = pages[source]


class Layers(Protocol):
    """The arithmetic of a pass."""

    def embed(self, tokens_T: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Hidden states that enter the first layer."""
        ...

    def norm(self, x_TD: torch.Tensor, module: RMSNorm) -> torch.Tensor:
        """RMSNorm."""
        ...

    def linear(self, x_TD: torch.Tensor, weight: Weight, *, into: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T, or `into` plus that; `into` may be overwritten."""
        ...

    def attend(
        self,
        q_THK: torch.Tensor,
        k_TGK: torch.Tensor,
        v_TGK: torch.Tensor,
        rotation: Rotation,
        stream: Stream,
        pages: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Rotate, store and attend: [T, H, K]."""
        ...

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        ...


class CpuLayers:
    """In C++, activations in fp32."""

    def embed(self, tokens_T: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens_T, weight).float()

    def norm(self, x_TD: torch.Tensor, module: RMSNorm) -> torch.Tensor:
        return cpu.rms_norm(x_TD, module.weight.float(), module.eps)

    def linear(self, x_TD: torch.Tensor, weight: Weight, *, into: torch.Tensor | None = None) -> torch.Tensor:
        return cpu.linear(x_TD, weight, into=into)

    def attend(
        self,
        q_THK: torch.Tensor,
        k_TGK: torch.Tensor,
        v_TGK: torch.Tensor,
        rotation: Rotation,
        stream: Stream,
        pages: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        where = (stream.sequence_T, stream.position_T, stream.table_BM)
        cos_TF, sin_TF = (table_T1F.squeeze(1) for table_T1F in rotation)
        return cpu.paged_attention(q_THK, k_TGK, v_TGK, (cos_TF, sin_TF), *where, *pages)

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return cpu.silu_product_(gate, up)


class TorchLayers:
    """In PyTorch and Triton, activations in the weights' dtype.

    Args:
        exact: give matrix products always the same number of rows, and attention one token at a time, so that a
            token's results do not depend on the rest of the pass.
    """

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact

    def embed(self, tokens_T: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens_T, weight)

    def norm(self, x_TD: torch.Tensor, module: RMSNorm) -> torch.Tensor:
        return module(x_TD)

    def linear(self, x_TD: torch.Tensor, weight: Weight, *, into: torch.Tensor | None = None) -> torch.Tensor:
        product = kernels.quantized_linear if isinstance(weight, kernels.QuantizedWeight) else F.linear
        if not self.exact:
            y_TN = product(x_TD, weight)
        else:
            tokens = len(x_TD)
            padded = F.pad(x_TD, (0, 0, 0, -tokens % EXACT_ROWS))
            y_TN = torch.cat([product(block, weight) for block in padded.split(EXACT_ROWS)])[:tokens]
        return y_TN if into is None else into + y_TN

    def attend(
        self,
        q_THK: torch.Tensor,
        k_TGK: torch.Tensor,
        v_TGK: torch.Tensor,
        rotation: Rotation,
        stream: Stream,
        pages: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        q_THK, k_TGK = rotate(q_THK, k_TGK, *rotation)
        page_size = pages[0].shape[1]
        page_T = stream.table_BM[stream.sequence_T, stream.position_T // page_size].long()
        for cached, new in zip(pages, (k_TGK, v_TGK), strict=True):
            cached[page_T, stream.position_T % page_size] = new
        singles = len(q_THK) if self.exact else stream.singles
        seen_T = stream.position_T + 1
        table_TM = stream.table_BM[stream.sequence_T[:singles]]
        parts = [kernels.paged_attention(q_THK[:singles], *pages, table_TM, seen_T[:singles])]
        for first, count in () if self.exact else stream.chunks:
            last, row = first + count - 1, stream.sequence_T[first : first + 1]
            q_1QHK = q_THK[first : first + count][None]
            table_1M, seen_1 = stream.table_BM[row], seen_T[last : last + 1]
            parts.append(kernels.paged_attention(q_1QHK, *pages, table_1M, seen_1)[0])
        return torch.cat(parts)

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up


class Decoder:
    """A model's weights with the arithmetic to decode with them.

    Args:
        model: read anew in every pass; its parameters may change in place between passes.
        exact: see `TorchLayers`; `CpuLayers` are always so.
        quantize: copies of the layers' projections and of a separate head in so many bits.
    """

    def __init__(self, model: Llama, *, exact: bool = False, quantize: Literal["int8", "int4"] | None = None) -> None:
        self.model, self.config = model, model.config
        weight = model.lm_head_weight
        in_cpp = weight.device.type == "cpu" and weight.dtype in cpu.DTYPES and cpu.available()
        self.layers: Layers = CpuLayers() if in_cpp else TorchLayers(exact=exact)
        self.exact = exact or (in_cpp and quantize != "int4")
        self._quantize = _QUANTIZERS[quantize] if quantize else None
        self._quantized: dict[torch.Tensor, Weight] = {}
        self._version = self.version()

    def version(self) -> int:
        """A number that changes whenever a parameter is written to."""
        return sum(parameter._version for parameter in self.model.parameters())

    def cache(self, num_pages: int, page_size: int) -> PagedCache:
        """An empty cache in the weights' dtype."""
        weight = self.model.lm_head_weight
        return PagedCache(self.config, num_pages, page_size, dtype=weight.dtype, device=weight.device)

    def _weight(self, parameter: torch.Tensor) -> Weight:
        if self._quantize is None:
            return parameter
        if self._version != self.version():
            self._quantized.clear()
            self._version = self.version()
        if parameter not in self._quantized:
            self._quantized[parameter] = self._quantize(parameter)
        return self._quantized[parameter]

    def hidden(self, stream: Stream, cache: PagedCache) -> torch.Tensor:
        """[T, D] before the final norm; stores the tokens' keys and values."""
        layers, weight, head_dim = self.layers, self._weight, self.config.head_dim
        frequencies = rope_frequencies(self.config, device=stream.tokens_T.device)
        rotation = rope_tables(frequencies, stream.position_T)
        x_TD = layers.embed(stream.tokens_T, self.model.embed_tokens.weight)
        for block, *pages in zip(self.model.layers, cache.keys, cache.values, strict=True):
            attention, mlp = block.self_attn, block.mlp
            h_TD = layers.norm(x_TD, block.input_layernorm)
            q_THK, k_TGK, v_TGK = (
                layers.linear(h_TD, weight(projection.weight)).unflatten(-1, (-1, head_dim))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            out_THK = layers.attend(q_THK, k_TGK, v_TGK, rotation, stream, tuple(pages))
            x_TD = layers.linear(out_THK.flatten(1), weight(attention.o_proj.weight), into=x_TD)
            h_TD = layers.norm(x_TD, block.post_attention_layernorm)
            gate, up = (layers.linear(h_TD, weight(projection.weight)) for projection in (mlp.gate_proj, mlp.up_proj))
            x_TD = layers.linear(layers.gate(gate, up), weight(mlp.down_proj.weight), into=x_TD)
        return x_TD

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """fp32 [R, V] of rows of `hidden`."""
        head = self.model.lm_head_weight
        normed_RD = self.layers.norm(hidden_RD, self.model.norm)
        return self.layers.linear(normed_RD, head if self.model.lm_head is None else self._weight(head)).float()


_QUANTIZERS: dict[str, Callable[[torch.Tensor], Weight]] = {
    "int8": kernels.quantize_int8,
    "int4": kernels.quantize_int4,
}
