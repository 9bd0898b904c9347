"""Typed configuration: dataclasses, filled from a TOML file, then from the command line.

    torchrun --nproc-per-node 2 recipes/sft.py recipes/configs/demo/sft.toml --optimizer.lr 1e-5

A recipe's config is a dataclass of the sections below. Keys that no section has are errors that name the nearest
valid one; values of a wrong type are errors that name the key. `--help` lists every key.
"""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import tomli_w
import tyro

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A config file or option that cannot be used."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Where weights and tokenizer come from."""

    path: str = ""
    """Checkpoint directory (Hugging Face or Meta layout) to start from. Empty: fresh weights of `preset`."""
    preset: str = ""
    """Name of the shape to train from scratch, such as 1m or llama3-8b. Used when `path` is empty."""
    tokenizer: str = ""
    """Tokenizer directory or file. Empty: the one in `path`."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it becomes tokens."""

    files: tuple[str, ...] = ()
    """Files of records: .json, .jsonl or .parquet, each a source of its own."""
    weights: tuple[float, ...] = ()
    """How often each file's records are seen per epoch, one number per file. Empty: once each."""
    max_tokens: int = 2048
    """Longest example, in tokens; longer ones are handled as `too_long` says."""
    too_long: Literal["drop", "truncate"] = "drop"
    """Longer conversations are dropped and counted, or cut at their end. Preference pairs are always dropped."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Supervised fine-tuning only: which tokens are targets."""
    template: Literal["auto", "llama3", "llama3.1", "chatml", "plain"] = "auto"
    """Chat template. auto: the one that belongs to the tokenizer."""
    trim: bool = True
    """Strip white space around every message, as Hugging Face's Llama-3 template does."""


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """What is done about questionable preference pairs; whatever is found is counted in the run's summary.json."""

    held_out: tuple[str, ...] = ()
    """Files of pairs that are kept for evaluation: training pairs with one of their prompts are counted."""
    drop_held_out: bool = False
    """Drop the training pairs that share a prompt with `held_out`."""
    drop_not_higher: bool = False
    """Drop the pairs whose metadata do not give the chosen answer a higher score than the rejected one."""
    keep_out: float = 0.0
    """Share of all prompts whose pairs are not trained on but written to OUTPUT/held_out.jsonl, for evaluation. The
    same prompts in every run on the same files."""


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How much is seen per optimizer step, and for how long."""

    examples: int = 16
    """Examples (conversations or pairs) per optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: int = 8192
    """Tokens that one rank holds in one forward pass; must hold the longest example."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int = 0
    """Stop after this many optimizer steps. 0: as many as `epochs` asks for."""
    seed: int = 42
    """Seed of shuffling, mixture and fresh weights."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms are never decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global 2-norm. 0: never."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_ratio: float = 0.1
    """Share of all steps over which the learning rate rises linearly from 0."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak (cosine and linear)."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the model lies on the ranks."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of forward and backward. Master weights, optimizer states and gradient sums are always float32."""
    shard: int = 0
    """Ranks that share one copy of the model; the world size must be a multiple of it. 0: all ranks."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the layer again in the backward pass."""
    logits_megabytes: int = 512
    """Bound on the float32 logits that the loss holds at a time, in MB (2^20 bytes)."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming. A run that finds checkpoints of its own in its folder goes on from the last one."""

    every_steps: int = 500
    """Optimizer steps between checkpoints. 0: never."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run tells about itself, besides metrics.jsonl."""

    every_steps: int = 1
    """Optimizer steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `track`)."""
    progress: bool = True
    """Show a progress bar on rank 0."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What every training recipe has."""

    output: str = "runs/training"
    """Folder of the run."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn."""

    max_tokens: int = 1024
    """Longest completion, in tokens."""
    temperature: float = 0.7
    """0 takes the most likely token every time."""
    top_p: float = 0.9
    """Draw from the smallest set of tokens with this much probability."""
    top_k: int = 0
    """Draw from this many of the most likely tokens. 0: from all."""
    n: int = 1
    """Completions of each prompt."""
    seed: int = 42
    """Seed; a prompt's completions depend on it and on the prompt, on nothing else."""


def load_config(schema: type[Config], argv: Sequence[str]) -> Config:
    """The config of `argv`: an optional TOML file first, then `--section.key value` options that override it.

    Raises:
        ConfigError: for a file that is missing, malformed, has unknown keys or values of a wrong type.
        SystemExit: with a message on stderr for options that do not exist or cannot be parsed, and after `--help`.
    """
    argv = list(argv)
    from_file = schema()
    if argv and not argv[0].startswith("-"):
        from_file = read_config(schema, Path(argv.pop(0)))
    return tyro.cli(schema, default=from_file, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))


def read_config(schema: type[Config], path: Path) -> Config:
    """The config that a TOML file holds; keys that it leaves out keep their defaults."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    _reject_unknown_keys(schema, values, path, prefix="")
    try:
        return msgspec.convert(values, type=schema)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_config(config: Any, path: Path) -> None:
    """Write a config as TOML that `read_config` reads back to an equal one."""
    path.write_text(tomli_w.dumps(msgspec.to_builtins(config)), encoding="utf-8")


def _reject_unknown_keys(schema: type, values: dict[str, Any], path: Path, *, prefix: str) -> None:
    types = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in types:
            nearest = difflib.get_close_matches(key, types, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{path}: unknown key {prefix}{key}; did you mean {prefix}{nearest}?")
        if dataclasses.is_dataclass(types[key]) and isinstance(value, dict):
            _reject_unknown_keys(types[key], value, path, prefix=f"{prefix}{key}.")
