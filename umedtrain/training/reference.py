"""What the reference model says of every answer, computed once and kept: training then holds one model only.

Shape suffix: A answers, the childless segments of a batch in order.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from umedtrain.config import ParallelConfig
from umedtrain.data.batch import Batch
from umedtrain.data.loader import Loader
from umedtrain.distributed.part_files import PartFiles
from umedtrain.distributed.sharding import copy_sharded, reshard
from umedtrain.distributed.world import World
from umedtrain.training.tasks import KLEstimate, Reference, answer_logprobs


def frozen_reference(model: nn.Module, *, chunk_bytes: int) -> Reference:
    """A reference model that stays in memory and is run on every batch."""
    model.requires_grad_(False)

    @torch.no_grad()
    def logprobs(batch: Batch) -> torch.Tensor:
        return answer_logprobs(model, batch, chunk_bytes=chunk_bytes)

    return logprobs


def build_reference(
    kind: Literal["cache", "model", "none"],
    model: nn.Module,
    loader: Loader,
    folder: Path,
    world: World,
    *,
    parallel: ParallelConfig,
    weights: str,
    progress: bool = True,
) -> Reference | None:
    """What a sharded model, as it is now, says of the answers: kept in `folder`, by a copy in memory, or nothing.

    Arguments and errors as for `cached_reference`.
    """
    chunk_bytes = parallel.logits_megabytes * 2**20
    if kind == "none":
        return None
    if kind == "model":
        copy = copy_sharded(model, world.mesh(parallel.shard), dtype=getattr(torch, parallel.dtype))
        return frozen_reference(copy, chunk_bytes=chunk_bytes)
    return cached_reference(
        model,
        loader,
        folder,
        world,
        weights=weights,
        dtype=parallel.dtype,
        chunk_bytes=chunk_bytes,
        progress=progress,
    )


def cached_reference(
    model: nn.Module,
    loader: Loader,
    folder: Path,
    world: World,
    *,
    weights: str,
    dtype: str,
    chunk_bytes: int,
    progress: bool = True,
) -> Reference:
    """The log-probabilities that `model`, as it is now, gives to every answer that training will see. Collective.

    They are written to `folder` as they come, and what is there already is not computed again. Fill the cache before
    the model's first update, or with the weights that it is named after. Packed as training will pack them, so the
    values of an example's first step are, to the last bit, those that a frozen model would give.

    Args:
        model: the reference, sharded or not.
        loader: of the training that follows.
        folder: on a file system that all ranks share.
        weights: fingerprint of the reference's weights.
        dtype: in which the model computes.
        chunk_bytes: see `token_logprobs`.
        progress: show a progress bar.

    Raises:
        ValueError: when the folder holds log-probabilities of other data, weights or dtype.
    """
    # The digest covers the tokens: data, template and lengths are in it.
    identity = {"examples": loader.state_dict()["examples"], "weights": weights, "dtype": dtype, "kind": "sum"}
    parts = PartFiles(folder, identity, world, name="reference cache")
    done = {row["index"] for row in parts.rows()}
    hidden = not (progress and world.is_main)
    with parts.append() as append, torch.no_grad():
        for step in tqdm(range(loader.num_steps), desc="reference", unit="step", disable=hidden, leave=False):
            wanted = set(loader.step_examples(step)) - done
            if not wanted:
                continue
            rows = []
            for batch in loader.batch(step):
                batch = batch.to(world.device)
                values_A = answer_logprobs(model, batch, chunk_bytes=chunk_bytes).tolist()
                rows += _rows(batch, values_A)
            append([row for row in rows if row["index"] in wanted])
            done |= wanted
    reshard(model)
    values = {row["index"]: row["logprobs"] for row in parts.rows()}
    assert done <= values.keys()
    return _lookup(values)


def kl_estimate(loader: Loader, reference: Reference, world: World, *, chunk_bytes: int) -> KLEstimate:
    """The mean of log pi - log ref over a step's answers of `loader`, over all its ranks and micro-batches.

    Args:
        loader: see `umedtrain.data.mismatched`. Its steps begin anew when they are through.
        reference: of the same loader's batches.
        world: the ranks that share the steps.
        chunk_bytes: see `token_logprobs`.
    """

    @torch.no_grad()
    def estimate(model: nn.Module, step: int) -> float:
        total, count = 0.0, 0.0
        for batch in loader.batch(step % loader.num_steps):
            batch = batch.to(world.device)
            ratios_A = answer_logprobs(model, batch, chunk_bytes=chunk_bytes) - reference(batch)
            total, count = total + float(ratios_A.double().sum()), count + len(ratios_A)
        total, count = world.sum([total, count])
        return total / count

    return estimate


def _rows(batch: Batch, values_A: Sequence[float]) -> list[dict]:
    """One row an example, cut from the values of a batch's answers."""
    rows, first = [], 0
    for number, answers in zip(batch.numbers, batch.answers, strict=True):
        rows.append({"index": number, "logprobs": list(values_A[first : first + answers])})
        first += answers
    return rows


def _lookup(values: Mapping[int, Sequence[float]]) -> Reference:
    def logprobs(batch: Batch) -> torch.Tensor:
        flat = [value for number in batch.numbers for value in values[number]]
        return torch.tensor(flat, dtype=torch.float32, device=batch.tokens_T.device)

    return logprobs
