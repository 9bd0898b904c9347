"""Checkpoints of a run: written whole or not at all, and everything a bit-identical resume needs.

    checkpoints/step-00000100/    written under the name step-00000100.partial, renamed when complete
    checkpoints/latest            name of the newest complete checkpoint, replaced atomically

PyTorch's distributed checkpoint format: every rank writes its own shards, and any number of ranks can read them.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from umedtrain.distributed.world import World

_PARTIAL = ".partial"
# DCP wraps whatever a rank's storage raised, and does not derive its wrapper from Exception.
_STORAGE_ERRORS = (Exception, CheckpointException)


class CheckpointWriteError(RuntimeError):
    """A checkpoint that could not be written, a full disk for instance; earlier ones are untouched."""


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        directory: the run's `checkpoints` folder; made when the first checkpoint is written.
        keep: how many of the newest are kept.
    """

    def __init__(self, directory: Path, world: World, *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {keep}")
        self.directory, self.world, self.keep = Path(directory), world, keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None. All ranks get rank 0's answer."""
        name = None
        pointer = self.directory / "latest"
        if self.world.is_main and pointer.exists():
            name = pointer.read_text(encoding="utf-8").strip()
        name = self.world.gather(name)[0]
        if name is None:
            return None
        if not (self.directory / name / ".metadata").exists():
            raise ValueError(f"{pointer} names {name}, which is not a complete checkpoint; remove or mend {pointer}")
        return self.directory / name

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> Path:
        """Write the state after `step` optimizer steps. Collective.

        Raises:
            CheckpointWriteError: on every rank, when any rank could not write.
        """
        final = self.directory / f"step-{step:08d}"
        partial = final.with_name(final.name + _PARTIAL)
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self.world.barrier()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {
            "model": model_state,
            "optimizer": optimizer_state,
            "progress": progress,
            **self._rng_state(),
        }
        problem = None
        try:
            dcp.save(state, checkpoint_id=partial)
        except _STORAGE_ERRORS as error:
            problem = f"rank {self.world.rank}: {_root_cause(error)}"
        if problem is None and self.world.is_main:
            try:
                self._publish(partial, final)
            except OSError as error:
                problem = f"rank 0: {error}"
        problems = [text for text in self.world.gather(problem) if text]
        if problems:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointWriteError(
                f"{final}: checkpoint could not be written ({problems[0]}); earlier checkpoints are intact: "
                "free some space and start the same command again"
            )
        return final

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Load model, optimizer and this rank's random state from `path`; returns the saved progress. Collective."""
        model_state, optimizer_state = get_state_dict(model, optimizer)
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        progress: dict[str, Any] = {key.removeprefix("progress."): None for key in saved if key.startswith("progress.")}
        state = {"model": model_state, "optimizer": optimizer_state, "progress": progress}
        # Another number of ranks than the one that saved: the others start with fresh random states.
        rng = {key: value for key, value in self._rng_state().items() if key in saved}
        state |= rng
        self._read(path, state)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for key in rng:
            _set_rng(key, state[key])
        return state["progress"]

    def load_weights(self, model: nn.Module) -> None:
        """Load the newest checkpoint's weights alone, as they were at the end of a run. Collective.

        Raises:
            ValueError: without a checkpoint, or for one of another model.
        """
        path = self.latest()
        if path is None:
            raise ValueError(f"{self.directory} holds no checkpoint, though the run was finished; make the run again")
        state = {"model": get_model_state_dict(model)}
        self._read(path, state)
        set_model_state_dict(model, state["model"])

    def _read(self, path: Path, state: dict[str, Any]) -> None:
        try:
            dcp.load(state, checkpoint_id=path)
        except _STORAGE_ERRORS as error:
            raise ValueError(
                f"{path}: checkpoint does not load into this model ({_root_cause(error)}); "
                "start with the config that wrote it, or in another run folder"
            ) from error

    def _rng_state(self) -> dict[str, torch.Tensor]:
        # A key of its own per rank, or DCP would keep only one rank's.
        states = {f"rng_cpu_{self.world.rank}": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            states[f"rng_cuda_{self.world.rank}"] = torch.cuda.get_rng_state()
        return states

    def _publish(self, partial: Path, final: Path) -> None:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        pointer = self.directory / "latest"
        temporary = pointer.with_name("latest.partial")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(final.name)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(pointer)
        _sync_directory(self.directory)
        complete = sorted(path for path in self.directory.glob("step-*") if not path.name.endswith(_PARTIAL))
        for old in [path for path in complete if path != final][: max(0, len(complete) - self.keep)]:
            shutil.rmtree(old)


def _set_rng(key: str, state: torch.Tensor) -> None:
    if key.startswith("rng_cpu"):
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state)


def _root_cause(error: BaseException) -> str:
    """The innermost message of an exception that DCP wrapped, on one line."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
