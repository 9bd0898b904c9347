"""Launches of `umedtrain.kernels.quantized` for the linear layers of a model."""

from collections.abc import Callable

import torch

from umedtrain.kernels.offline.cases import LlamaShape
from umedtrain.kernels.quantized import QuantizedWeight, quantized_linear

_GROUP = 128


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """Name -> host code that launches on meta tensors."""
    layers = {"gate_up": (2 * shape.intermediate, shape.hidden), "down": (shape.hidden, shape.intermediate)}
    return {
        f"quantized_{bits}_{layer}_{rows}": lambda bits=bits, size=size, rows=rows: _linear(bits, *size, rows)
        for bits in ("int8", "int4")
        for layer, size in layers.items()
        for rows in (1, 64, 2048)
    }


def _linear(bits: str, outputs: int, inputs: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
    if bits == "int8":
        values = torch.empty(outputs, inputs, dtype=torch.int8, device="meta")
        weight = QuantizedWeight(values, torch.empty(outputs, device="meta"), None, 0)
    else:
        values = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device="meta")
        scale = torch.empty(inputs // _GROUP, outputs, dtype=torch.bfloat16, device="meta")
        weight = QuantizedWeight(values, scale, torch.empty_like(scale, dtype=torch.int8), _GROUP)
    quantized_linear(torch.empty(rows, inputs, dtype=dtype, device="meta"), weight, impl="triton")
