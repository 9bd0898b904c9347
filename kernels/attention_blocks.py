"""What the three attention kernels share: their configuration, reading a block of rows, strides and descriptors.

Shape suffixes: T tokens, H heads, K head dimension, R rows of a block.
"""

from typing import Any, NamedTuple

import torch

from umedtrain.kernels._dispatch import pick
from umedtrain.kernels._triton import tl, triton
from umedtrain.kernels.attention_plan import TILE

LOG2_E = 1.4426950408889634


class Config(NamedTuple):
    """How a kernel is cut and compiled.

    `query_rows` and `key_rows` divide `TILE`, `edge_rows`, those of a masked block, divide `key_rows`. `stages` and
    `edge_stages` are how far ahead the two loops load; `descriptors` is whether whole blocks come through TMA.
    """

    query_rows: int
    key_rows: int
    edge_rows: int
    warps: int
    stages: int
    edge_stages: int
    descriptors: bool = False


@triton.jit
def load_rows(
    pointer_RK, row_R, rows, column_K, K: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr
) -> tl.tensor:
    """A block of rows; those from `rows` on, and columns from K on, are zero."""
    if MASKED and K == BLOCK_K:
        return tl.load(pointer_RK, mask=row_R[:, None] < rows, other=0.0)
    elif MASKED:
        return tl.load(pointer_RK, mask=(row_R[:, None] < rows) & (column_K[None, :] < K), other=0.0)
    elif K == BLOCK_K:
        return tl.load(pointer_RK)
    else:
        return tl.load(pointer_RK, mask=column_K[None, :] < K, other=0.0)


def configure(
    table: dict[str, Any], q_THK: torch.Tensor, a_THK: torch.Tensor, b_THK: torch.Tensor, rows: str
) -> tuple[Config, tuple[Any, Any]]:
    """The configuration for q's type and head dimension, and tensor descriptors of what the kernel loops over.

    fp32 has rows of its own in `table`, and what no descriptor can read gets those that every architecture can use.

    Args:
        table: rows for `pick`, under "default", "fp32" and names of architectures.
        q_THK: the queries.
        a_THK: read in blocks, as
        b_THK: is.
        rows: the field of `Config` that says how many rows such a block has.

    Returns:
        The configuration, and two descriptors or None twice.
    """
    head_dim = q_THK.shape[-1]
    if q_THK.dtype == torch.float32:
        return pick({"default": table["fp32"]}, head_dim), (None, None)
    config = pick(table, head_dim)
    if not config.descriptors:
        return config, (None, None)
    if _can_be_described(a_THK) and _can_be_described(b_THK):
        return config, (_describe(a_THK, getattr(config, rows)), _describe(b_THK, getattr(config, rows)))
    return pick({"default": table["default"]}, head_dim), (None, None)


def _can_be_described(x_THK: torch.Tensor) -> bool:
    """Whether the hardware can copy blocks: 16-byte alignment, tokens apart, and no columns to be masked away."""
    _, heads, head_dim = x_THK.shape
    token_stride, head_stride = x_THK.stride()[:2]
    apart = head_stride >= head_dim and token_stride >= (heads - 1) * head_stride + head_dim
    unmasked = head_dim >= 16 and triton.next_power_of_2(head_dim) == head_dim
    return apart and unmasked and _is_aligned(x_THK)


def _describe(x_THK: torch.Tensor, rows: int) -> Any:
    """A tensor descriptor for blocks of `rows` tokens of one head, whose columns begin at head times its stride."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tokens, heads, head_dim = x_THK.shape
    columns = (heads - 1) * x_THK.stride(1) + head_dim
    return TensorDescriptor(x_THK, [tokens, columns], [x_THK.stride(0), 1], [rows, head_dim])


def _is_aligned(x_THK: torch.Tensor) -> bool:
    strides = x_THK.stride()[:2]
    return x_THK.data_ptr() % 16 == 0 and all(n * x_THK.element_size() % 16 == 0 for n in strides)


def readable(x_THK: torch.Tensor) -> torch.Tensor:
    """x, copied if its heads' values are apart, or off 16-byte boundaries that they could be on.

    Without those every load is of one value: a copy is a small part of what it saves.
    """
    could_be = x_THK.shape[-1] * x_THK.element_size() % 16 == 0
    if x_THK.stride(-1) == 1 and (_is_aligned(x_THK) or not could_be):
        return x_THK
    return x_THK.clone(memory_format=torch.contiguous_format)


def compile_options(config: Config, q_THK: torch.Tensor, descriptors: tuple[Any, Any]) -> dict[str, Any]:
    """The constants and launch options that the three kernels share."""
    head_dim = q_THK.shape[-1]
    return {
        "K": head_dim,
        # The smallest product that tensor cores do has an inner dimension of 16.
        "BLOCK_K": max(16, triton.next_power_of_2(head_dim)),
        "M": config.query_rows,
        "N": config.key_rows,
        "E": config.edge_rows,
        "TILE": TILE,
        "DESCRIPTORS": descriptors[0] is not None,
        "EDGE_STAGES": config.edge_stages,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def token_head_strides(*tensors: torch.Tensor) -> list[int]:
    """Each tensor's strides between tokens and between heads."""
    return [stride for x in tensors for stride in x.stride()[:2]]
