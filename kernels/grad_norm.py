"""The 2-norm of many gradients, and the factor that clips it, without asking the device.

    norm = sqrt(sum over all tensors and elements of g^2)

Two stages. Each program sums the squares of one tile of 16384 elements in fp32: 2048 lanes that add up 8 values each,
and a tree over the lanes. One more program adds the sums of all tiles in the same way and takes the root. Tiles, lanes
and their order depend on sizes only, so a result repeats bit for bit; cutting the same elements into other tensors
changes the rounding alone. Bytes: every gradient once. FLOPs: 2 an element.

Squares are fp32: elements beyond 1.8e19 give infinity, below 1e-23 nothing. Infinities and NaN go through.
"""

from collections.abc import Sequence

import torch

from umedtrain.kernels._dispatch import Impl, pick, use_triton
from umedtrain.kernels._op import kernel_op
from umedtrain.kernels._shards import HALVES, check_shard, shard_table
from umedtrain.kernels._triton import tl, triton

# Elements of a program's tile, elements at a time, warps: two 16-byte loads of bf16 a thread.
CONFIGS = {"default": ((1, (16384, 2048, 4)),)}
FINAL_BLOCK, FINAL_WARPS = 4096, 8


@triton.jit
def _square_sums_kernel(
    rows_ptr, tiles_ptr, sums_ptr, GRAD: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 2
    row_ptr = rows_ptr + tl.load(tile_ptr).to(tl.int64) * 4
    start = tl.load(tile_ptr + 1).to(tl.int64) * TILE
    g_ptr = tl.load(row_ptr).to(tl.pointer_type(GRAD)) + start
    size = tl.minimum(tl.load(row_ptr + 1) - start, TILE).to(tl.int32)
    aligned = tl.load(row_ptr + 2) != 0
    lane = tl.arange(0, CHUNK)
    sums = tl.zeros((CHUNK,), tl.float32)
    for done in range(0, size, CHUNK):
        # A mask that ends anywhere forbids wide loads, so whole chunks go without.
        if aligned & (size - done >= CHUNK):
            g = tl.load(tl.multiple_of(g_ptr, 16) + lane).to(tl.float32)
        else:
            g = tl.load(g_ptr + lane, mask=lane < size - done, other=0.0).to(tl.float32)
        sums += g * g
        g_ptr += CHUNK
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sums, 0))


@triton.jit
def _root_kernel(sums_ptr, norm_ptr, count, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        sums += tl.load(sums_ptr + first + lane, mask=first + lane < count, other=0.0)
    tl.store(norm_ptr, tl.sqrt_rn(tl.sum(sums, 0)))


def _fake(grads: list[torch.Tensor], use_kernel: bool) -> torch.Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


@kernel_op("grad_norm", fake=_fake)
def _grad_norm(grads: list[torch.Tensor], use_kernel: bool) -> torch.Tensor:
    if not use_kernel:
        return _twin(grads)
    tile, chunk, warps = pick(CONFIGS, 0)
    of_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for grad in grads:
        of_type.setdefault(grad.dtype, []).append(grad)
    tables = {dtype: shard_table(some, tile) for dtype, some in of_type.items()}
    count = sum(table.num_tiles for table in tables.values())
    sums = torch.empty(count, dtype=torch.float32, device=grads[0].device)
    norm = torch.empty((), dtype=torch.float32, device=grads[0].device)
    first = 0
    for dtype, table in tables.items():
        if table.num_tiles:
            _square_sums_kernel[(table.num_tiles,)](
                table.rows([of_type[dtype]]), table.tiles, sums[first:],
                GRAD=getattr(tl, str(dtype).removeprefix("torch.")), TILE=tile, CHUNK=chunk, num_warps=warps,
            )  # fmt: skip
        first += table.num_tiles
    _root_kernel[(1,)](sums, norm, count, BLOCK=FINAL_BLOCK, num_warps=FINAL_WARPS)
    return norm


def _twin(grads: list[torch.Tensor]) -> torch.Tensor:
    sums = [grad.float().square().sum() for grad in grads]
    return torch.stack(sums).sum().sqrt()


def grad_norm(grads: Sequence[torch.Tensor], *, impl: Impl | None = None) -> torch.Tensor:
    """2-norm of all elements of all `grads`: one fp32 number on their device, which the host does not wait for.

    For gradients sharded over ranks this is the norm of the local shards; the global one is the root of the sum of the
    ranks' squares. One launch for each dtype and a small one; see the header of this file for order and rounding.

    Args:
        grads: plain tensors on one device, fp32, bf16 or fp16, of any shapes; with no elements the norm is 0.
        impl: "triton" or "torch"; by default chosen by the device.

    Raises:
        ValueError: for an empty list, a DTensor, another dtype or mixed devices.
    """
    if not len(grads):
        raise ValueError("grads is empty; it must have at least one tensor, which says on what device the norm is")
    for i, grad in enumerate(grads):
        types = (torch.float32, *HALVES)
        check_shard(f"grads[{i}]", grad, types, grad.numel(), grads[0].device, contiguous=False)
    with torch.no_grad():
        return _grad_norm([grad.contiguous() for grad in grads], use_triton(grads[0], impl))


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """min(1, max_norm / (norm + 1e-6)), the factor of `torch.nn.utils.clip_grads_with_norm_`, left on the device.

    It goes to `adamw_step` or to `AdamW.step` as `grad_scale`. NaN stays NaN; an infinite norm gives 0, which turns
    infinite gradients into NaN.

    Raises:
        ValueError: if max_norm is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it must be positive")
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
