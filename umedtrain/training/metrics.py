"""What a run records about itself: metrics.jsonl, TensorBoard, the progress bar."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from umedtrain.config import LogConfig
from umedtrain.distributed.world import World


class Metrics:
    """Writes one line of numbers per logged step, on rank 0; on the other ranks every call does nothing.

    Args:
        start_step: steps that are already done; lines of later steps, written by a killed run after its last
            checkpoint, are cut away, so that every step stands in the file once.
    """

    def __init__(self, run: Path, world: World, config: LogConfig, *, start_step: int, num_steps: int) -> None:
        self.config, self.active = config, world.is_main
        if not self.active:
            return
        path = run / "metrics.jsonl"
        _cut_after(path, start_step)
        self.file = path.open("a", encoding="utf-8")
        self.bar = tqdm(
            total=num_steps,
            initial=start_step,
            desc=run.name,
            unit="step",
            disable=not config.progress,
            leave=False,
        )
        self.events = _tensorboard(run, start_step) if config.tensorboard else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers of step `step` (counted from 1)."""
        if not self.active:
            return
        self.bar.update(1)
        self.bar.set_postfix({"loss": f"{values['loss']:.4f}", "tok/s": f"{values['tokens_per_second']:,.0f}"})
        if step % self.config.every_steps:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close everything."""
        if not self.active:
            return
        self.file.close()
        self.bar.close()
        if self.events is not None:
            self.events.close()


def describe_environment(world: World) -> dict[str, Any]:
    """Versions, machine and ranks, for a run's environment.json."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "ranks": world.size,
        "threads_per_rank": torch.get_num_threads(),
        "command": sys.argv,
    }


def _cut_after(path: Path, step: int) -> None:
    """Keep the lines of `path` up to `step`; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _tensorboard(run: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "log.tensorboard = true needs the package tensorboard: pip install 'umedtrain[track]'"
        ) from None
    return SummaryWriter(run / "tensorboard", purge_step=start_step + 1)
