"""The one training loop, for every task.

A step's loss is (sum over all ranks and micro-batches) / (global count): the count is known before the first forward
pass, each micro-batch's sum is divided by it, and gradients are summed over ranks. So the same examples give the same
loss and gradient however they are cut into micro-batches and ranks.
"""

import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from umedtrain.config import CheckpointConfig, LogConfig, OptimizerConfig
from umedtrain.data.loader import Loader
from umedtrain.distributed.world import World
from umedtrain.training.checkpoint import Checkpoints
from umedtrain.training.metrics import Metrics
from umedtrain.training.optimizer import build_optimizer, learning_rate
from umedtrain.training.tasks import Task


def train(
    model: nn.Module,
    loader: Loader,
    task: Task,
    *,
    run: Path,
    world: World,
    optimizer_config: OptimizerConfig,
    checkpoint_config: CheckpointConfig,
    log_config: LogConfig,
) -> dict[str, float]:
    """Train a sharded model on all of the loader's steps, going on from the run folder's last checkpoint if any.

    Returns the run's totals: steps, tokens, targets, seconds and tokens per second of the steps that this call ran,
    and the last step's loss.

    Raises:
        ValueError: when the folder's checkpoint belongs to other data or another model.
        FloatingPointError: on every rank, when a gradient is not finite; weights are left as they were.
    """
    optimizer = build_optimizer(model, optimizer_config)
    checkpoints = Checkpoints(run / "checkpoints", world, keep=checkpoint_config.keep)
    start = _resume(checkpoints, model, optimizer, loader)
    metrics = Metrics(run, world, log_config, start_step=start, num_steps=loader.num_steps)
    totals = {"tokens": 0.0, "targets": 0.0, "seconds": 0.0}
    values: dict[str, float] = {}
    try:
        for step in range(start, loader.num_steps):
            lr = learning_rate(optimizer_config, step, loader.num_steps)
            values = train_step(
                model,
                optimizer,
                loader,
                task,
                step,
                lr,
                world=world,
                max_grad_norm=optimizer_config.max_grad_norm,
            )
            metrics.log(step + 1, values)
            for name in totals:
                totals[name] += values[name]
            done = step + 1
            last = done == loader.num_steps
            if checkpoint_config.every_steps and (last or done % checkpoint_config.every_steps == 0):
                checkpoints.save(done, model, optimizer, {"step": done, **loader.state_dict()})
    finally:
        metrics.close()
    return {
        "steps": float(loader.num_steps),
        **totals,
        "tokens_per_second": totals["tokens"] / totals["seconds"] if totals["seconds"] else 0.0,
        "loss": values.get("loss", math.nan),
    }


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    task: Task,
    step: int,
    lr: float,
    *,
    world: World,
    max_grad_norm: float,
) -> dict[str, float]:
    """One optimizer step on this rank's micro-batches; returns global metrics, equal on all ranks."""
    started = time.perf_counter()
    batches = [batch.to(world.device) for batch in loader.batch(step)]
    local = [
        sum(map(task.count, batches)),
        sum(b.num_tokens for b in batches),
        sum(b.num_targets for b in batches),
    ]
    count, tokens, targets = world.sum(local)
    task = task.at_step(model, step)
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        loss_sum, metric_sums = task(model, batch)
        # A step without a single unit has loss 0 and gradient 0, not 0 / 0.
        (loss_sum / max(count, 1.0)).backward()
        for name, value in {"loss": loss_sum.detach(), **metric_sums}.items():
            sums[name] = sums.get(name, 0.0) + value.double()
    grad_norm = clip_gradients(model, max_grad_norm)
    if not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"step {step + 1}: the gradient norm is {grad_norm}; nothing was updated. Lower optimizer.lr, or look for "
            f"a broken record among the examples of this step"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    totals = world.sum([float(value) for value in sums.values()])
    means = {name: total / max(count, 1.0) for name, total in zip(sums, totals, strict=True)}
    seconds = time.perf_counter() - started
    return {
        **task.report(means),
        "lr": lr,
        "grad_norm": grad_norm,
        task.unit: count,
        "tokens": tokens,
        "targets": targets,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradient down to a global 2-norm of `max_norm` (0: leave it); returns the norm before."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def _resume(checkpoints: Checkpoints, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Loader) -> int:
    """Load the last checkpoint if there is one; returns the number of steps already done."""
    path = checkpoints.latest()
    if path is None:
        return 0
    progress = checkpoints.load(path, model, optimizer)
    step = progress.pop("step")
    try:
        loader.check_state(progress)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; use another run folder for another run") from None
    return step
