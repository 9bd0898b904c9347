"""A run's folder, and how a recipe starts and ends.

config.toml         the resolved config
environment.json    versions, machine, ranks, command
metrics.jsonl       one line per logged step
checkpoints/        see training/checkpoint.py
export/             the result as a Hugging Face directory
summary.json        totals and every dropped row's reason; written last, so its presence means: finished
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch.distributed as dist

from umedtrain.config import load_config, read_config, write_config
from umedtrain.distributed.world import World, finalize, initialize
from umedtrain.training.checkpoint import CheckpointWriteError
from umedtrain.training.metrics import describe_environment

Config = TypeVar("Config")

# Sections that may change between the parts of one run without making it another run.
_FREE_SECTIONS = ("checkpoint", "log", "parallel")


def launch(schema: type[Config], run: Callable[[Config, World], Any]) -> None:
    """What a recipe's `main` does: config from the command line, process group, `run(config, world)`.

    Errors that the user can mend end in one sentence on stderr and exit code 1, without a traceback.
    """
    try:
        config = load_config(schema, sys.argv[1:])
        world = initialize()
        run(config, world)
    except (ValueError, CheckpointWriteError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        where = f"[rank {dist.get_rank()}] " if dist.is_initialized() and dist.get_world_size() > 1 else ""
        print(f"{where}error: {error}", file=sys.stderr, flush=True)
        # Other ranks may wait for this one in a collective: leave at once, so that torchrun ends them.
        sys.stdout.flush()
        os._exit(1)
    except RuntimeError as error:
        # gloo and NCCL raise this where a rank waits for one that has ended; that rank's own message says why.
        if not _in_collective(error):
            raise
        print(f"[rank {dist.get_rank()}] error: another rank ended; its message says why", file=sys.stderr, flush=True)
        os._exit(1)
    finalize()


def _in_collective(error: BaseException) -> bool:
    """Whether the innermost Python frame is one of torch.distributed's collectives."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return frame.f_globals.get("__name__") == "torch.distributed.distributed_c10d"


def start_run(folder: Path, config: Any, world: World) -> bool:
    """Make the run's folder and record config and environment. False when the folder holds this run, finished.

    Raises:
        ValueError: when the folder belongs to a run with another config.
    """
    problem = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_same_run(folder, config)
            write_config(config, folder / "config.toml")
            (folder / "environment.json").write_text(json.dumps(describe_environment(world), indent=2) + "\n")
        except (ValueError, OSError) as error:
            problem = str(error)
    problem, finished = world.gather((problem, (folder / "summary.json").exists()))[0]
    if problem:
        raise ValueError(problem)
    return not finished


def finish_run(folder: Path, summary: dict[str, Any], world: World) -> None:
    """Write summary.json, atomically."""
    if world.is_main:
        write_json(folder / "summary.json", summary)
    world.barrier()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _check_same_run(folder: Path, config: Any) -> None:
    path = folder / "config.toml"
    # A run that ended at a wrong file name has left nothing that another one could spoil.
    if not path.exists() or {entry.name for entry in folder.iterdir()} <= {"config.toml", "environment.json"}:
        return
    before, now = (msgspec.to_builtins(value) for value in (read_config(type(config), path), config))
    changed = [key for key in _flat(now) if _flat(before)[key] != _flat(now)[key]]
    if changed:
        raise ValueError(
            f"{folder} holds a run with another {', '.join(changed)}; choose another output folder, or remove this one"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if not prefix and key in _FREE_SECTIONS:
            continue
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
