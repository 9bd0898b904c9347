"""The process group that torchrun started, and the few collectives that the rest needs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run.

    Attributes:
        rank: index of this process.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        # The CPU back end is always there (see initialize), and host numbers need no trip to the GPU.
        totals = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()

    def gather(self, value: object) -> list:
        """Every rank's picklable `value`, in the order of the ranks, on every rank."""
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks (over the CPU back end, which needs no GPU work to finish)."""
        dist.all_reduce(torch.zeros(1))

    def mesh(self, shard: int) -> DeviceMesh:
        """Mesh (replicate, shard): `shard` ranks share a copy of the model, 0 for all of them.

        Raises:
            ValueError: when the world size is not a multiple of `shard`.
        """
        shard = shard or self.size
        if shard < 0 or self.size % shard:
            raise ValueError(
                f"parallel.shard = {shard} does not divide the {self.size} processes that torchrun started; "
                "change parallel.shard or --nproc-per-node"
            )
        return init_device_mesh(self.device.type, (self.size // shard, shard), mesh_dim_names=("replicate", "shard"))


def initialize(*, timeout_minutes: float = 30.0) -> World:
    """Join the process group that torchrun describes in the environment; alone when there is none.

    GPUs use NCCL for device tensors and gloo for host tensors; without GPUs everything is gloo.
    """
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        alone = "MASTER_ADDR" not in os.environ
        dist.init_process_group(
            backend,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            store=dist.HashStore() if alone else None,
            timeout=timedelta(minutes=timeout_minutes),
        )
    return World(dist.get_rank(), dist.get_world_size(), device)


def finalize() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
