"""From a config to a tokenizer, a loader and a sharded model with its weights; and back to a Hugging Face directory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from umedtrain.config import BatchConfig, DataConfig, ModelConfig, ParallelConfig
from umedtrain.data.example import Example
from umedtrain.data.loader import Loader
from umedtrain.distributed.sharding import fill_model, full_tensors, shard_model
from umedtrain.distributed.world import World
from umedtrain.model.config import PRESETS, LlamaConfig
from umedtrain.model.heads import RewardModel
from umedtrain.model.llama import Llama, initial_weight
from umedtrain.text.tokenizer import Tokenizer, load_tokenizer
from umedtrain.weights import open_checkpoint, save_stream
from umedtrain.weights.fingerprint import weights_fingerprint

Model = TypeVar("Model", Llama, RewardModel)


_PROBE = (
    "A 54-year-old man has 38.5 °C, crackles and a productive cough.\n\nWhich drug: β-blocker (10 mg) or macrolide?"
)


def build_tokenizer(config: ModelConfig) -> Tokenizer:
    """The tokenizer that the config names, by default the checkpoint's own.

    Raises:
        ValueError: without a tokenizer, or for one that gives other ids than the one in the checkpoint's directory.
    """
    if not (config.tokenizer or config.path):
        raise ValueError("model.tokenizer is empty: name a tokenizer directory or file, or a checkpoint in model.path")
    tokenizer = load_tokenizer(config.tokenizer or config.path)
    if config.tokenizer and config.path and Path(config.path).is_dir():
        try:
            own = load_tokenizer(config.path)
        except (ValueError, ImportError):  # none there, or none that can be read here
            return tokenizer
        # `check_vocabulary` has more to say of a tokenizer that is too large.
        if tokenizer.vocab_size <= own.vocab_size and tokenizer.encode(_PROBE) != own.encode(_PROBE):
            raise ValueError(
                f"model.tokenizer {config.tokenizer} gives other ids than the tokenizer in {config.path}; leave "
                "model.tokenizer out, or name the one that the model was trained with"
            )
    return tokenizer


def build_loader(sources: Sequence[Sequence[Example]], data: DataConfig, batch: BatchConfig, world: World) -> Loader:
    """This rank's loader over the examples of each of the config's files."""
    return Loader(
        sources,
        weights=data.weights,
        batch_size=batch.examples,
        max_tokens=batch.micro_batch_tokens,
        epochs=batch.epochs,
        max_steps=batch.max_steps,
        seed=batch.seed,
        rank=world.rank,
        num_ranks=world.size,
    )


def build_model(
    kind: type[Model],
    config: ModelConfig,
    parallel: ParallelConfig,
    tokenizer: Tokenizer,
    world: World,
    *,
    seed: int,
) -> Model:
    """A sharded Llama or RewardModel: weights of `config.path`, or fresh ones of `config.preset`.

    A reward model may start from a language model; its head is then fresh. Every rank reads only its own rows of a
    checkpoint, and a fresh tensor depends on the seed and its name only, not on the number of ranks. `eos_ids` are
    those of the checkpoint.

    Raises:
        ValueError: for an unknown preset, a checkpoint that does not fit, or a tokenizer that does not fit the model.
    """
    checkpoint = open_checkpoint(config.path) if config.path else None
    shape = checkpoint.config if checkpoint else preset_shape(config.preset, tokenizer.vocab_size)
    check_vocabulary(tokenizer, shape, config.path)
    with torch.device("meta"):
        model = kind(shape)
    shard_model(
        model,
        world.mesh(parallel.shard),
        dtype=getattr(torch, parallel.dtype),
        activation_checkpointing=parallel.activation_checkpointing,
    )
    in_backbone = kind is RewardModel and checkpoint is not None and not checkpoint.is_reward_model

    def tensor(name: str, size: torch.Size) -> torch.Tensor:
        if checkpoint is None or (in_backbone and name == "score.weight"):
            return initial_weight(name, size, shape, seed=seed)
        return checkpoint.tensor(name.removeprefix("model.") if in_backbone else name)

    fill_model(model, tensor, world.device)
    model.eos_ids = checkpoint.eos_ids if checkpoint else ()
    return model


def name_weights(config: ModelConfig, *, seed: int) -> str:
    """What `build_model` starts from, in short; caches of what it computed are kept apart by this."""
    return weights_fingerprint(config.path) if config.path else f"{config.preset}, seed {seed}"


def preset_shape(preset: str, vocab_size: int) -> LlamaConfig:
    """A preset with the tokenizer's vocabulary."""
    if preset not in PRESETS:
        raise ValueError(f"model.preset {preset!r} is not one of {', '.join(PRESETS)}; or set model.path")
    return dataclasses.replace(PRESETS[preset], vocab_size=vocab_size)


def check_vocabulary(tokenizer: Tokenizer, shape: LlamaConfig, path: str) -> None:
    """Refuse a tokenizer with more ids than the model has embeddings."""
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model in {path} has only {shape.vocab_size} "
            "embeddings; set model.tokenizer to the one that belongs to the model"
        )


def export_model(model: Llama | RewardModel, directory: Path, tokenizer: Tokenizer, world: World) -> None:
    """Write the whole model as a Hugging Face directory. Collective; rank 0 writes, tensor by tensor."""
    stream = full_tensors(model)
    if world.is_main:
        save_stream(model.config, isinstance(model, RewardModel), stream, directory, tokenizer=tokenizer)
    else:
        for _ in stream:
            pass
    world.barrier()
