"""Many tensors in one launch: a table of addresses and a map from programs to (tensor, tile).

An optimizer has hundreds of tensors of all sizes; a launch for each would cost more than its work. Instead a kernel
gets three small tensors: for every shard (one contiguous tensor per role) the addresses, the length and whether all
addresses are 16-byte aligned, and for every program which tile of which shard is its own.

The map depends on the sizes only and is made once. The addresses are compared on the host at every call, a matter of
microseconds, and sent again when they changed, as gradients' addresses may; the copy is from pinned memory, so the host
does not wait for the device.
"""

import functools
from collections.abc import Sequence

import torch

ALIGNMENT = 16  # bytes of the widest load


class ShardTable:
    """The map of a set of shards, and the addresses that they had last.

    Args:
        sizes: elements of each shard; 0 is allowed and gets no program.
        device: where the shards are.
        tile: elements that one program works on.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, tile: int) -> None:
        self.sizes = tuple(sizes)
        self.device = device
        counts = torch.tensor([-(-size // tile) for size in sizes], dtype=torch.int64)
        shard = torch.repeat_interleave(torch.arange(len(counts)), counts)
        block = torch.arange(len(shard)) - (counts.cumsum(0) - counts)[shard]
        self.num_tiles = len(shard)
        self.tiles = torch.stack((shard, block), 1).to(torch.int32).to(device)
        """int32 [tiles, 2]: shard, and tile inside it."""
        self._addresses: tuple[tuple[int, ...], ...] | None = None
        self._rows = torch.empty(0)

    def rows(self, roles: Sequence[Sequence[torch.Tensor]], numbers: Sequence[int] | None = None) -> torch.Tensor:
        """int64 [shards, roles + 3]: the addresses, elements, 1 where all addresses are aligned or 0, a number.

        Args:
            roles: one list of contiguous tensors per role, one tensor per shard; an empty list gives zeros.
            numbers: what the kernel calls the shards; by default 0, 1, 2, ...
        """
        columns = [[t.data_ptr() for t in role] if role else [0] * len(self.sizes) for role in roles]
        addresses = tuple(zip(*columns, numbers or range(len(self.sizes)), strict=True))
        if addresses != self._addresses:
            table = [
                (*row, size, int(all(address % ALIGNMENT == 0 for address in row)), number)
                for (*row, number), size in zip(addresses, self.sizes, strict=True)
            ]
            pinned = torch.tensor(table, dtype=torch.int64, pin_memory=self.device.type == "cuda")
            self._rows = pinned.to(self.device, non_blocking=True)
            self._addresses = addresses
        return self._rows


def shard_table(tensors: Sequence[torch.Tensor], tile: int) -> ShardTable:
    """The table of shards with the sizes of `tensors`, all on one device; kept for the calls to come."""
    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _cached_table(tuple(t.numel() for t in tensors), device, tile, stream)


@functools.lru_cache(maxsize=64)
def _cached_table(sizes: tuple[int, ...], device: torch.device, tile: int, stream: int) -> ShardTable:
    # A table is uploaded on the stream that uses it, hence one for each stream.
    return ShardTable(sizes, device, tile)


HALVES = (torch.bfloat16, torch.float16)


def check_shard(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    size: int,
    device: torch.device,
    *,
    contiguous: bool = True,
    note: str = "",
) -> None:
    """Raise ValueError, naming the argument, unless a kernel can work on `tensor` by its address."""
    if hasattr(tensor, "to_local"):
        raise ValueError(f"{name} is a DTensor; it must be a plain tensor: pass its .to_local()")
    if tensor.dtype not in dtypes:
        words = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype}; it must be {words}{note}")
    if tensor.numel() != size:
        raise ValueError(f"{name} has {tensor.numel()} elements; it must have {size}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {device}, as the first tensor")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
