"""Training a reward model on preference pairs with the Bradley-Terry loss.

    torchrun --nproc-per-node 8 recipes/reward.py recipes/configs/llama3_8b/reward.toml --optimizer.lr 2e-6

A prompt is computed once and all its answers read it. Starts from a language model (fresh head) or a reward model, and
leaves a `LlamaForSequenceClassification` in OUTPUT/export.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from umedtrain.config import PairsConfig, TrainingConfig
from umedtrain.data.care import load_pairs
from umedtrain.data.example import encode_preference
from umedtrain.data.ranking import merge_pairs
from umedtrain.distributed.world import World
from umedtrain.model.heads import RewardModel
from umedtrain.training.build import build_loader, build_model, build_tokenizer, export_model
from umedtrain.training.loop import train
from umedtrain.training.run import finish_run, launch, start_run
from umedtrain.training.tasks import RewardTask


@dataclass(frozen=True)
class LossConfig:
    """The Bradley-Terry loss and what is added to it."""

    margin: bool = False
    """Ask for a larger difference of rewards where answers differ more: by metadata.chosen.score less
    metadata.rejected.score, for pairs that have both."""
    margin_scale: float = 1.0
    """How much reward a point of those scores is worth."""
    center: float = 0.0
    """Weight of (chosen reward + rejected reward)^2, which makes rewards lie around 0; 0.01 is a usual value."""


@dataclass(frozen=True)
class RewardConfig(TrainingConfig):
    """Training a reward model on preference pairs."""

    output: str = "runs/reward"
    """Folder of the run."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    merge_pairs: bool = True
    """Make the pairs of a prompt one example, in which every answer is computed once; batch.examples then counts
    prompts. Without, every pair is an example of its own."""
    reward: LossConfig = field(default_factory=LossConfig)


def run(config: RewardConfig, world: World) -> Path:
    """Train, export, and return the exported directory."""
    folder = Path(config.output)
    task = reward_task(config.reward)
    if not start_run(folder, config, world):
        return folder / "export"

    tokenizer = build_tokenizer(config.model)
    encode = partial(
        encode_preference,
        tokenizer=tokenizer,
        max_tokens=config.data.max_tokens,
        template=config.data.template,
        trim=config.data.trim,
        margins=config.reward.margin,
    )
    kept_out = folder / "held_out.jsonl" if world.is_main else None
    sources, drops, report = load_pairs(config.data.files, config.pairs, encode, kept_out=kept_out)
    if config.reward.margin and not report["pairs with scores"]:
        raise ValueError(
            f"{', '.join(config.data.files)}: reward.margin needs the numbers metadata.chosen.score and "
            "metadata.rejected.score, and no pair has both; add them, or leave reward.margin out"
        )
    if config.merge_pairs:
        sources = [merge_pairs(examples, max_tokens=config.data.max_tokens) for examples in sources]
    loader = build_loader(sources, config.data, config.batch, world)

    model = build_model(RewardModel, config.model, config.parallel, tokenizer, world, seed=config.batch.seed)
    totals = train(
        model,
        loader,
        task,
        run=folder,
        world=world,
        optimizer_config=config.optimizer,
        checkpoint_config=config.checkpoint,
        log_config=config.log,
    )

    export_model(model, folder / "export", tokenizer, world)
    finish_run(folder, {**totals, "dropped": drops.summary(), "data": report}, world)
    return folder / "export"


def reward_task(config: LossConfig) -> RewardTask:
    """The task with its settings put in.

    Raises:
        ValueError: for a setting out of range.
    """
    if not 0 < config.margin_scale < math.inf:
        raise ValueError(f"reward.margin_scale must be a positive number, got {config.margin_scale}")
    if not 0 <= config.center < math.inf:
        raise ValueError(f"reward.center must be 0 or a positive number, got {config.center}")
    return RewardTask(margin_scale=config.margin_scale if config.margin else 0.0, center=config.center)


def main() -> None:
    """Entry point of `torchrun recipes/reward.py`."""
    launch(RewardConfig, run)


if __name__ == "__main__":
    main()
