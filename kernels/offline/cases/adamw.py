"""Launches of `umedtrain.kernels.adamw` over the shards that one of eight ranks holds of a Llama."""

from collections.abc import Callable

import torch

from umedtrain.kernels._adamw_twin import BLOCK, State8
from umedtrain.kernels.adamw import adamw_step
from umedtrain.kernels.offline.cases import LlamaShape

RANKS, LAYERS = 8, 2
"""Two layers: the grid grows with the number of layers, the kernel does not change."""


def shard_shapes(shape: LlamaShape) -> list[tuple[int, int]]:
    """Rows and columns of one rank's shards of the matrices of some layers, the embedding and the head."""
    kv = shape.kv_heads * shape.head_dim
    rows_and_columns = [
        *[(shape.hidden, shape.hidden)] * 2,
        *[(kv, shape.hidden)] * 2,
        *[(shape.intermediate, shape.hidden)] * 2,
        (shape.hidden, shape.intermediate),
    ]
    all_shapes = rows_and_columns * LAYERS + [(shape.vocab, shape.hidden)] * 2
    return [(rows // RANKS, columns) for rows, columns in all_shapes]


def cases(shape: LlamaShape) -> dict[str, Callable[[], None]]:
    """fp32 and 8-bit states, with a bf16 parameter and with an fp32 one, lr from the host and from the device."""

    def empty(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.empty(size, dtype=dtype, device="meta") for size in shard_shapes(shape)]

    def states(bits: int, dtype: torch.dtype) -> list[torch.Tensor | State8]:
        if bits == 32:
            return empty(torch.float32)
        return [State8(x, torch.empty(x.numel() // BLOCK, device="meta")) for x in empty(dtype)]

    def run(bits: int, half: bool, device_scalars: bool) -> None:
        number = torch.empty(1, device="meta")
        adamw_step(
            empty(torch.bfloat16 if half else torch.float32),
            empty(torch.bfloat16 if half else torch.float32),
            states(bits, torch.int8),
            states(bits, torch.uint8),
            master=empty(torch.float32) if half else None,
            lr=number if device_scalars else 1e-3,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            step=number if device_scalars else 7,
            grad_scale=number,
            impl="triton",
        )

    return {
        "bf16": lambda: run(32, True, False),
        "fp32": lambda: run(32, False, False),
        "bf16, device scalars": lambda: run(32, True, True),
        "8-bit, bf16": lambda: run(8, True, False),
        "8-bit, fp32": lambda: run(8, False, False),
        "8-bit, bf16, device scalars": lambda: run(8, True, True),
    }
