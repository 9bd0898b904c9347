"""Training a reward model on preference pairs with the Bradley-Terry loss.

    torchrun --nproc-per-node 8 recipes/reward.py recipes/configs/llama3_8b/reward.toml --optimizer.lr 2e-6

A prompt is computed once and all its answers read it. Starts from a language model (fresh head) or a reward model, and
leaves a `LlamaForSequenceClassification` in OUTPUT/export.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from umedtrain.config import TrainingConfig
from umedtrain.data.example import encode_preference
from umedtrain.data.ranking import merge_pairs
from umedtrain.data.sources import load_sources
from umedtrain.distributed.world import World
from umedtrain.model.heads import RewardModel
from umedtrain.records import read_preferences
from umedtrain.training.build import build_loader, build_model, build_tokenizer, export_model
from umedtrain.training.loop import train
from umedtrain.training.run import finish_run, launch, start_run
from umedtrain.training.tasks import RewardTask


@dataclass(frozen=True)
class RewardConfig(TrainingConfig):
    """Training a reward model on preference pairs."""

    output: str = "runs/reward"
    """Folder of the run."""
    merge_pairs: bool = True
    """Make the pairs of a prompt one example, in which every answer is computed once; batch.examples then counts
    prompts. Without, every pair is an example of its own."""


def run(config: RewardConfig, world: World) -> Path:
    """Train, export, and return the exported directory."""
    folder = Path(config.output)
    if not start_run(folder, config, world):
        return folder / "export"

    tokenizer = build_tokenizer(config.model)
    encode = partial(
        encode_preference,
        tokenizer=tokenizer,
        max_tokens=config.data.max_tokens,
        template=config.data.template,
        trim=config.data.trim,
    )
    sources, drops = load_sources(config.data.files, read_preferences, encode)
    if config.merge_pairs:
        sources = [merge_pairs(examples, max_tokens=config.data.max_tokens) for examples in sources]
    loader = build_loader(sources, config.data, config.batch, world)

    model = build_model(RewardModel, config.model, config.parallel, tokenizer, world, seed=config.batch.seed)
    totals = train(
        model,
        loader,
        RewardTask(),
        run=folder,
        world=world,
        optimizer_config=config.optimizer,
        checkpoint_config=config.checkpoint,
        log_config=config.log,
    )

    export_model(model, folder / "export", tokenizer, world)
    finish_run(folder, {**totals, "dropped": drops.summary()}, world)
    return folder / "export"


def main() -> None:
    """Entry point of `torchrun recipes/reward.py`."""
    launch(RewardConfig, run)


if __name__ == "__main__":
    main()
