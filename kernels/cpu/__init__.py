"""Decoding on CPUs: the layers of a Llama in C++, on the model's own weights.

PyTorch's linear layers are made for training: below some 64 rows they reach a fraction of what memory or arithmetic
allow, and a row's last bits depend on how many rows stand beside it. Here every row has the same bits in every batch,
and weights are read as they lie, without a second, packed copy that would have to follow each update.

Activations are fp32. Nothing has a gradient. Sizes are not checked beyond what a wrong call could overwrite: the
sampler calls these some hundred times a token. Shape suffixes: T tokens, D inputs, N outputs, H query heads, G
key-value heads, K head dimension, P pages, S slots of a page, B sequences, M pages of a sequence, R rows, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from umedtrain.kernels.cpu.library import library
from umedtrain.kernels.quantized import QuantizedWeight
from umedtrain.kernels.sampling import Sampled

KINDS = {torch.float32: 0, torch.bfloat16: 1, "int8": 2, "int4": 3}
"""Of weights, as the C++ side numbers them; norms and caches are one of the first two."""
DTYPES = (torch.float32, torch.bfloat16)


def available() -> bool:
    """Whether the C++ library is there, or could be compiled just now (some 10 seconds, once on a machine)."""
    return library() is not None


def matrix(weight: torch.Tensor | QuantizedWeight) -> list[int]:
    """Where a weight [N, D] lies and what it is, for the C++ side; it must outlive the numbers."""
    if isinstance(weight, QuantizedWeight):
        _check(weight.values, dtype=weight.values.dtype)
        _check(weight.scale, dtype=weight.scale.dtype)
        zero = 0 if weight.zero is None else weight.zero.data_ptr()
        kind = KINDS["int4" if weight.group else "int8"]
        return [weight.values.data_ptr(), weight.scale.data_ptr(), zero, kind, weight.group, *weight.shape]
    _check(weight, dtype=weight.dtype)
    return [weight.data_ptr(), 0, 0, KINDS[weight.dtype], 0, *weight.shape]


def linear(
    x_TD: torch.Tensor, weight: torch.Tensor | QuantizedWeight, *, into: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T: fp32 [T, N] from contiguous fp32 x and a contiguous weight [N, D] in fp32, bf16, 8 or 4 bits.

    With `into`, the products are added to it, in place.
    """
    numbers = _numbers(matrix(weight))
    tokens, (outputs, inputs) = x_TD.shape[0], weight.shape
    y_TN = x_TD.new_empty(tokens, outputs) if into is None else into
    assert x_TD.shape == (tokens, inputs)
    assert y_TN.shape == (tokens, outputs)
    _check(x_TD, y_TN)
    library().linear(x_TD.data_ptr(), numbers, y_TN.data_ptr(), tokens, into is not None)
    return y_TN


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight, fp32, contiguous; the weight may be bf16."""
    _check(x_TD)
    _check(weight_D, dtype=weight_D.dtype)
    assert weight_D.shape == x_TD.shape[1:]
    out_TD = torch.empty_like(x_TD)
    kind = KINDS[weight_D.dtype]
    library().rms_norm(x_TD.data_ptr(), weight_D.data_ptr(), kind, out_TD.data_ptr(), *x_TD.shape, eps)
    return out_TD


@dataclass(frozen=True)
class Layer:
    """Weights and cache of a layer; norms and cache are fp32 or bf16 alike, for all layers."""

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    key_pages_PSGK: torch.Tensor
    value_pages_PSGK: torch.Tensor
    projections: Sequence[torch.Tensor | QuantizedWeight]  # q, k, v, o, gate, up, down


class LlamaLayers:
    """All layers of a Llama, called at once.

    Args:
        layers: their tensors, which are kept; their memory must not move.
        heads: query heads.
        eps: of the norms.
    """

    def __init__(self, layers: Sequence[Layer], *, heads: int, eps: float) -> None:
        self._layers, self._heads, self._eps = list(layers), heads, eps
        self._dtype = layers[0].key_pages_PSGK.dtype
        numbers: list[int] = []
        for layer in layers:
            own = (layer.attention_norm, layer.mlp_norm, layer.key_pages_PSGK, layer.value_pages_PSGK)
            _check(*own, dtype=self._dtype)
            numbers += [tensor.data_ptr() for tensor in own]
            for weight in layer.projections:
                numbers += matrix(weight)
        self._numbers = _numbers(numbers)

    def __call__(
        self,
        x_TD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        sequence_T: torch.Tensor,
        position_T: torch.Tensor,
        table_BM: torch.Tensor,
    ) -> torch.Tensor:
        """Rotates, stores keys and values in the pages, attends, and so on; x goes through all layers in place.

        Args:
            x_TD: fp32, contiguous; overwritten.
            rotation: cosines and sines, fp32, [T, K / 2] in memory (half-split layout).
            sequence_T, position_T: int64; a sequence's tokens follow one another in rising positions, and all its
                earlier positions are in the cache.
            table_BM: int32 page numbers.
        """
        tokens, hidden = x_TD.shape
        _, slots, kv_heads, head_dim = self._layers[0].key_pages_PSGK.shape
        _check(x_TD, *rotation)
        _check(sequence_T, position_T, dtype=torch.int64)
        _check(table_BM, dtype=torch.int32)
        assert all(table.numel() == tokens * head_dim // 2 for table in rotation)
        assert len(sequence_T) == len(position_T) == tokens
        sizes = (len(self._layers), tokens, hidden, self._heads, kv_heads, head_dim, slots, table_BM.shape[1])
        where = [tensor.data_ptr() for tensor in (*rotation, sequence_T, position_T, table_BM)]
        library().llama_layers(
            self._numbers, _numbers([*sizes, *where]), KINDS[self._dtype], x_TD.data_ptr(), self._eps
        )
        return x_TD


def sample(
    logits_RV: torch.Tensor,
    *,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    seeds_R: torch.Tensor,
    positions_R: torch.Tensor,
) -> Sampled:
    """`umedtrain.kernels.sample` for contiguous inputs (int64, top-p fp64, the rest fp32): the same tokens, sooner."""
    rows, vocabulary = logits_RV.shape
    inputs = (logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, seeds_R, positions_R)
    _check(logits_RV, temperature_R, min_p_R)
    _check(top_k_R, seeds_R, positions_R, dtype=torch.int64)
    _check(top_p_R, dtype=torch.float64)
    assert all(len(x) == rows for x in inputs)
    tokens_R = torch.empty(rows, dtype=torch.int64)
    logprobs_R, truncated_R = torch.empty(rows), torch.empty(rows)
    pointers = [x.data_ptr() for x in (*inputs, tokens_R, logprobs_R, truncated_R)]
    library().sample(*pointers, rows, vocabulary)
    return Sampled(tokens_R, logprobs_R, truncated_R)


def softmax_statistics(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and log sum of exponentials below it, fp32 [R] each, of contiguous fp32 logits.

    A logit minus the one, then minus the other, is its log-probability, to the last bit as `sample` reports it.
    """
    _check(logits_RV)
    peaks_R, log_sums_R = torch.empty(2, len(logits_RV))
    pointers = [x.data_ptr() for x in (logits_RV, peaks_R, log_sums_R)]
    library().softmax_statistics(*pointers, *logits_RV.shape)
    return peaks_R, log_sums_R


def _numbers(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def _check(*tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    for x in tensors:
        assert x.dtype == dtype
        assert x.is_contiguous()
        assert x.device.type == "cpu"
