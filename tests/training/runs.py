"""Small training runs for the tests of this folder, as functions that a rank can be given."""

from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from umedtrain import losses
from umedtrain.config import CheckpointConfig, LogConfig, OptimizerConfig
from umedtrain.data.example import Example, Segment
from umedtrain.data.loader import Loader
from umedtrain.distributed.sharding import fill_model, full_tensors, shard_model
from umedtrain.model.config import LlamaConfig
from umedtrain.model.heads import RewardModel
from umedtrain.model.llama import Llama, initial_weight
from umedtrain.training.loop import train
from umedtrain.training.reference import frozen_reference
from umedtrain.training.tasks import PreferenceTask, RewardTask, SFTTask

CONFIG = LlamaConfig(67, 32, 48, 2, 4, 2, 8)


def conversations(count, seed=0):
    """Segments of 3 to 20 tokens of which the later half are targets."""
    random = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(random.integers(3, 21))
        mask = np.arange(length) >= length // 2
        examples.append(Example((Segment(random.integers(0, 67, length).astype(np.int32), mask),)))
    return examples


def pairs(count, seed=0):
    """A prompt of 2 to 9 tokens with two answers of 1 to 6."""
    random = np.random.default_rng(seed)

    def segment(low, high, learned, parent):
        length = int(random.integers(low, high))
        return Segment(random.integers(0, 67, length).astype(np.int32), np.full(length, learned), parent)

    return [
        Example((segment(2, 10, False, None), segment(1, 7, True, 0), segment(1, 7, True, 0)), pairs=((0, 1),))
        for _ in range(count)
    ]


def sharded(kind, world, *, seed=1, dtype=torch.float32):
    with torch.device("meta"):
        model = kind(CONFIG)
    shard_model(model, world.mesh(0), dtype=dtype)
    # Five times the usual size, so that the model is far from uniform.
    fill_model(model, lambda name, size: 5 * initial_weight(name, size, CONFIG, seed=seed), world.device)
    return model


def whole(tensor):
    """A sharded tensor's value; a single rank does not shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def dpo_loss(**settings):
    return lambda policy, reference, _: losses.dpo(*policy, *reference, **settings)


def build_task(name, world):
    if name == "sft":
        return Llama, SFTTask()
    if name == "reward":
        return RewardModel, RewardTask()
    reference = sharded(Llama, world)
    return Llama, PreferenceTask(dpo_loss(beta=0.5), frozen_reference(reference, chunk_bytes=2**20), beta=0.5)


def run(world, folder, task_name, options):
    """Train; returns (totals, weights). `options`: count, batch, max_tokens, epochs, every, lr, die_at."""
    kind, task = build_task(task_name, world)
    examples = (conversations if task_name == "sft" else pairs)(options.get("count", 16))
    loader = Loader(
        [examples],
        batch_size=options.get("batch", 16),
        max_tokens=options.get("max_tokens", 64),
        epochs=options.get("epochs", 1),
        seed=3,
        rank=world.rank,
        num_ranks=world.size,
    )
    model = sharded(kind, world)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    totals = train(
        model,
        loader,
        task,
        run=folder,
        world=world,
        optimizer_config=OptimizerConfig(lr=options.get("lr", 1e-2), weight_decay=0.1, warmup_ratio=0.2),
        checkpoint_config=CheckpointConfig(every_steps=options.get("every", 0), keep=2),
        log_config=LogConfig(progress=False),
    )
    return totals, dict(full_tensors(model))


def gradients(world, task_name, max_tokens):
    """Loss, count and whole gradients of one step on 16 examples."""
    kind, task = build_task(task_name, world)
    examples = (conversations if task_name == "sft" else pairs)(16)
    loader = Loader([examples], batch_size=16, max_tokens=max_tokens, rank=world.rank, num_ranks=world.size)
    model = sharded(kind, world)
    batches = loader.batch(0)
    count = world.sum([sum(map(task.count, batches))])[0]
    total = 0.0
    for batch in batches:
        loss, _ = task(model, batch)
        (loss / count).backward()
        total += loss.item()
    grads = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return world.sum([total])[0] / count, count, len(batches), grads
