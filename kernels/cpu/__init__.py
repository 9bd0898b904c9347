"""Decoding on CPUs: the layers of a Llama in C++, on the model's own weights.

PyTorch's linear layers are made for training: below some 64 rows they reach a fraction of what memory or arithmetic
allow, and a row's last bits depend on how many rows stand beside it. Here every row has the same bits in every batch,
and weights are read as they lie, without a second, packed copy that would have to follow each update.

Activations are fp32. Nothing has a gradient. Sizes are not checked beyond what a wrong call could overwrite: the
sampler calls these some hundred times a token. Shape suffixes: T tokens, D inputs, N outputs, H query heads, G
key-value heads, K head dimension, P pages, S slots of a page, B sequences, M pages of a sequence, R rows, V vocabulary.
"""

import torch

from umedtrain.kernels.cpu.library import library
from umedtrain.kernels.quantized import QuantizedWeight, quantized_linear
from umedtrain.kernels.sampling import Sampled

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""Of weights and caches."""


def available() -> bool:
    """Whether the C++ library is there, or could be compiled just now (some 10 seconds, once on a machine)."""
    return library() is not None


def linear(
    x_TD: torch.Tensor, weight: torch.Tensor | QuantizedWeight, *, into: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T: fp32 [T, N] from contiguous fp32 x and a contiguous weight [N, D] in fp32, bf16 or 8 bits.

    With `into`, the products are added to it, in place. Weights of 4 bits take PyTorch's path, for which rows beside
    one another are not independent in their last bits.
    """
    if isinstance(weight, QuantizedWeight) and weight.group:
        product_TN = quantized_linear(x_TD, weight, impl="torch")
        return product_TN if into is None else into.add_(product_TN)
    outputs, inputs = weight.shape
    tokens = x_TD.shape[0]
    y_TN = x_TD.new_empty(tokens, outputs) if into is None else into
    assert x_TD.shape[1] == inputs
    assert y_TN.shape == (tokens, outputs)
    _check(x_TD, y_TN)
    sizes = (tokens, outputs, inputs, into is not None)
    if isinstance(weight, QuantizedWeight):
        values, scale = weight.values.data_ptr(), weight.scale.data_ptr()
        library().linear_int8(x_TD.data_ptr(), values, scale, y_TN.data_ptr(), *sizes)
        return y_TN
    assert weight.is_contiguous()
    function = library().linear_fp32 if weight.dtype == torch.float32 else library().linear_bf16
    assert weight.dtype in DTYPES
    function(x_TD.data_ptr(), weight.data_ptr(), y_TN.data_ptr(), *sizes)
    return y_TN


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight, all fp32 and contiguous."""
    _check(x_TD, weight_D)
    out_TD = torch.empty_like(x_TD)
    library().rms_norm(x_TD.data_ptr(), weight_D.data_ptr(), out_TD.data_ptr(), *x_TD.shape, eps)
    return out_TD


def silu_product_(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, written into `gate`; fp32, contiguous."""
    assert gate.shape == up.shape
    _check(gate, up)
    library().silu_product(gate.data_ptr(), up.data_ptr(), gate.numel())
    return gate


def paged_attention(
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    sequence_T: torch.Tensor,
    position_T: torch.Tensor,
    table_BM: torch.Tensor,
    key_pages_PSGK: torch.Tensor,
    value_pages_PSGK: torch.Tensor,
) -> torch.Tensor:
    """Rotate q and k, put k and v into their sequences' pages, and attend: fp32 [T, H, K].

    Args:
        q_THK, k_TGK, v_TGK: fp32, contiguous; q is overwritten.
        rotation: cosines and sines, fp32 [T, K / 2], contiguous (half-split layout).
        sequence_T, position_T: int64; a sequence's tokens follow one another in rising positions, and all its earlier
            positions are in the cache.
        table_BM: int32 page numbers.
        key_pages_PSGK, value_pages_PSGK: fp32 or bf16, contiguous; written to.
    """
    (tokens, heads, head_dim), (_, slots, kv_heads, _) = q_THK.shape, key_pages_PSGK.shape
    name = DTYPES[key_pages_PSGK.dtype]
    cosine, sine = rotation
    _check(q_THK, k_TGK, v_TGK, cosine, sine)
    _check(sequence_T, position_T, dtype=torch.int64)
    _check(table_BM, dtype=torch.int32)
    _check(key_pages_PSGK, value_pages_PSGK, dtype=key_pages_PSGK.dtype)
    assert cosine.shape == sine.shape == (tokens, head_dim // 2)
    where = (sequence_T.data_ptr(), position_T.data_ptr(), table_BM.data_ptr())
    cache = (key_pages_PSGK.data_ptr(), value_pages_PSGK.data_ptr())
    sizes = (tokens, heads, kv_heads, head_dim, slots, table_BM.shape[1])
    getattr(library(), f"rotate_and_store_{name}")(
        q_THK.data_ptr(), k_TGK.data_ptr(), v_TGK.data_ptr(), cosine.data_ptr(), sine.data_ptr(), *where, *cache, *sizes
    )
    out_THK = torch.empty_like(q_THK)
    getattr(library(), f"attend_{name}")(q_THK.data_ptr(), out_THK.data_ptr(), *where, *cache, *sizes, head_dim**-0.5)
    return out_THK


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


def _check(*tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    for x in tensors:
        assert x.dtype == dtype
        assert x.is_contiguous()
        assert x.device.type == "cpu"
