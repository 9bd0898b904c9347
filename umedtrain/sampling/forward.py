"""A Llama's forward pass for decoding, over a paged key-value cache and on the model's own weights.

Twice: `CppDecoder` for CPUs, with fp32 activations (`umedtrain.kernels.cpu`), and `TorchDecoder` for any device, with
the Triton kernels on a GPU. In the former every token's results have the same bits whatever else is computed in the
same pass; `TorchDecoder(exact=True)` gets there by giving every matrix product the same number of rows.

Shape suffixes: T tokens of the pass, D hidden size, H query heads, G key-value heads, K head dimension, B sequences, M
pages of a sequence, P pages, S slots of a page, R rows whose logits are wanted, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from umedtrain import kernels
from umedtrain.kernels import cpu
from umedtrain.model.config import LlamaConfig
from umedtrain.model.fused import kernels_for
from umedtrain.model.llama import Block, Llama
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


class Weights:
    """A model's parameters, and copies of the projections in fewer bits if asked for.

    Args:
        model: read anew after every change; its parameters may be written to in place between passes.
        quantize: copy the layers' projections, and a head of its own, in so many bits.
    """

    def __init__(self, model: Llama, *, quantize: Literal["int8", "int4"] | None = None) -> None:
        self.model, self.config = model, model.config
        self._quantize = _QUANTIZERS[quantize] if quantize else None
        self._copies: dict[torch.Tensor, Weight] = {}

    def version(self) -> int:
        """A number that changes whenever a parameter is written to or moved.

        Parameters made in inference mode do not count what is written to them: of those, only moves are seen.
        """
        parameters = self.model.parameters()
        return hash(tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters))

    def forget_copies(self) -> None:
        """The parameters have changed."""
        self._copies.clear()

    def projections(self, block: Block) -> list[Weight]:
        """Of q, k, v, o, gate, up and down."""
        attention, mlp = block.self_attn, block.mlp
        inner = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        return [self._copy(linear.weight) for linear in (*inner, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]

    @property
    def head(self) -> Weight:
        """Of the logits."""
        weight = self.model.lm_head_weight
        return weight if self.model.lm_head is None else self._copy(weight)

    def _copy(self, parameter: torch.Tensor) -> Weight:
        if self._quantize is None:
            return parameter
        if parameter not in self._copies:
            self._copies[parameter] = self._quantize(parameter)
        return self._copies[parameter]


_QUANTIZERS: dict[str, Callable[[torch.Tensor], Weight]] = {
    "int8": kernels.quantize_int8,
    "int4": kernels.quantize_int4,
}


def make_decoder(weights: Weights, cache: PagedCache, *, exact: bool) -> "CppDecoder | TorchDecoder":
    """The faster one that can run."""
    weight = weights.model.lm_head_weight
    alike = all(parameter.dtype == weight.dtype for parameter in weights.model.parameters())
    if weight.device.type == "cpu" and weight.dtype in cpu.DTYPES and alike and cpu.available():
        return CppDecoder(weights, cache)
    return TorchDecoder(weights, cache, exact=exact)


class CppDecoder:
    """In C++: all layers in one call, activations in fp32."""

    def __init__(self, weights: Weights, cache: PagedCache) -> None:
        self.weights, self.cache = weights, cache
        self.exact = True
        self.refresh()

    def refresh(self) -> None:
        """Look again where the parameters are."""
        config = self.weights.config
        self._layers = cpu.LlamaLayers(
            [
                cpu.Layer(
                    block.input_layernorm.weight,
                    block.post_attention_layernorm.weight,
                    keys,
                    values,
                    self.weights.projections(block),
                )
                for block, keys, values in zip(
                    self.weights.model.layers, self.cache.keys, self.cache.values, strict=True
                )
            ],
            heads=config.num_attention_heads,
            eps=config.rms_norm_eps,
        )

    def hidden(self, stream: Stream) -> torch.Tensor:
        """fp32 [T, D] before the final norm; stores the tokens' keys and values."""
        rotation = rope_tables(rope_frequencies(self.weights.config), stream.position_T)
        x_TD = F.embedding(stream.tokens_T, self.weights.model.embed_tokens.weight).float()
        return self._layers(x_TD, rotation, stream.sequence_T, stream.position_T, stream.table_BM)

    def next_logits(self, stream: Stream) -> torch.Tensor:
        """fp32 [T, V] after every token of a stream."""
        return self.logits(self.hidden(stream))

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """fp32 [R, V] of rows of `hidden`."""
        norm = self.weights.model.norm
        return cpu.linear(cpu.rms_norm(hidden_RD.contiguous(), norm.weight, norm.eps), self.weights.head)


class TorchDecoder:
    """In PyTorch and Triton, activations in the weights' dtype.

    Args:
        exact: give matrix products always the same number of rows, and attention one token at a time, so that a
            token's results do not depend on the rest of the pass.
    """

    def __init__(self, weights: Weights, cache: PagedCache, *, exact: bool) -> None:
        self.weights, self.cache, self.exact = weights, cache, exact

    def refresh(self) -> None:
        """Nothing is kept of the parameters."""

    def hidden(self, stream: Stream) -> torch.Tensor:
        """[T, D] before the final norm; stores the tokens' keys and values."""
        model, config = self.weights.model, self.weights.config
        frequencies = rope_frequencies(config, device=stream.tokens_T.device)
        rotation = rope_tables(frequencies, stream.position_T)
        x_TD = F.embedding(stream.tokens_T, model.embed_tokens.weight)
        for block, *pages in zip(model.layers, self.cache.keys, self.cache.values, strict=True):
            q, k, v, o, gate, up, down = self.weights.projections(block)
            h_TD = block.input_layernorm(x_TD)
            heads = [self._linear(h_TD, weight).unflatten(-1, (-1, config.head_dim)) for weight in (q, k, v)]
            x_TD = x_TD + self._linear(self._attend(*heads, rotation, stream, *pages).flatten(1), o)
            h_TD = block.post_attention_layernorm(x_TD)
            x_TD = x_TD + self._linear(_gated(self._linear(h_TD, gate), self._linear(h_TD, up)), down)
        return x_TD

    def next_logits(self, stream: Stream) -> torch.Tensor:
        """fp32 [T, V] after every token of a stream."""
        return self.logits(self.hidden(stream))

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """fp32 [R, V] of rows of `hidden`."""
        return self._linear(self.weights.model.norm(hidden_RD), self.weights.head).float()

    def _linear(self, x_TD: torch.Tensor, weight: Weight) -> torch.Tensor:
        product = kernels.quantized_linear if isinstance(weight, kernels.QuantizedWeight) else F.linear
        if not self.exact:
            return product(x_TD, weight)
        padded = F.pad(x_TD, (0, 0, 0, -len(x_TD) % EXACT_ROWS))
        return torch.cat([product(block, weight) for block in padded.split(EXACT_ROWS)])[: len(x_TD)]

    def _attend(
        self,
        q_THK: torch.Tensor,
        k_TGK: torch.Tensor,
        v_TGK: torch.Tensor,
        rotation: Rotation,
        stream: Stream,
        keys_PSGK: torch.Tensor,
        values_PSGK: torch.Tensor,
    ) -> torch.Tensor:
        q_THK, k_TGK = rotate(q_THK, k_TGK, *rotation)
        page_size = keys_PSGK.shape[1]
        page_T = stream.table_BM[stream.sequence_T, stream.position_T // page_size].long()
        keys_PSGK[page_T, stream.position_T % page_size] = k_TGK
        values_PSGK[page_T, stream.position_T % page_size] = v_TGK
        pages, seen_T = (keys_PSGK, values_PSGK), stream.position_T + 1
        singles, chunks = (len(q_THK), ()) if self.exact else (stream.singles, stream.chunks)
        table_TM = stream.table_BM[stream.sequence_T[:singles]]
        parts = [kernels.paged_attention(q_THK[:singles], *pages, table_TM, seen_T[:singles])]
        for first, count in chunks:
            last, row = first + count - 1, stream.sequence_T[first : first + 1]
            q_1QHK = q_THK[first : first + count][None]
            parts.append(kernels.paged_attention(q_1QHK, *pages, stream.table_BM[row], seen_T[last : last + 1])[0])
        return torch.cat(parts)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if fused := kernels_for(gate):
        return fused.swiglu(gate, up, casting="hf")
    return F.silu(gate) * up
