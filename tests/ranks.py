"""Running a function on several gloo ranks from a test."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
    """`function(world, *args)` on `num_ranks` fresh processes; their results by rank. Raises what a rank raised."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_main, args=(rank, num_ranks, port, folder, function, args), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        _wait(processes, timeout)
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        results = []
        for rank in range(num_ranks):
            path = Path(folder, str(rank))
            kind, value = pickle.loads(path.read_bytes()) if path.exists() else ("error", "no result")
            assert kind == "result", f"rank {rank}: {value} (hanging ranks: {hanging})"
            results.append(value)
        assert not hanging, f"ranks {hanging} did not end"
        return results


def _wait(processes: list[multiprocessing.Process], timeout: float, *, grace: float = 20.0) -> None:
    """Until all have ended, `timeout` is over, or `grace` after one was killed, for which others may wait in vain."""
    deadline = time.monotonic() + timeout
    killed = False
    while (alive := [process for process in processes if process.is_alive()]) and time.monotonic() < deadline:
        if not killed and any(process.exitcode for process in processes):
            killed, deadline = True, min(deadline, time.monotonic() + grace)
        multiprocessing.connection.wait([process.sentinel for process in alive], deadline - time.monotonic())


def _main(rank: int, num_ranks: int, port: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    import torch

    from umedtrain.distributed.world import finalize, initialize

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        outcome = ("result", function(initialize(), *args))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    Path(folder, str(rank)).write_bytes(pickle.dumps(outcome))
    finalize()
