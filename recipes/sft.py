"""Supervised fine-tuning of a Llama on conversations.

    torchrun --nproc-per-node 8 recipes/sft.py recipes/configs/llama3_8b/sft.toml --optimizer.lr 1e-5

Reads conversation files, packs them without padding, trains on the assistant's tokens, and leaves a Hugging Face
directory in OUTPUT/export. Start the same command again to go on after an interruption.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from umedtrain.config import TrainingConfig
from umedtrain.data.example import encode_conversation
from umedtrain.data.sources import load_sources
from umedtrain.distributed.world import World
from umedtrain.model.llama import Llama
from umedtrain.records import read_conversations
from umedtrain.training.build import build_loader, build_model, build_tokenizer, export_model
from umedtrain.training.loop import train
from umedtrain.training.run import finish_run, launch, start_run
from umedtrain.training.tasks import SFTTask


@dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning of a Llama on conversations."""

    output: str = "runs/sft"
    """Folder of the run."""


def run(config: SFTConfig, world: World) -> Path:
    """Train, export, and return the exported directory."""
    folder = Path(config.output)
    if not start_run(folder, config, world):
        return folder / "export"

    tokenizer = build_tokenizer(config.model)
    encode = partial(
        encode_conversation,
        tokenizer=tokenizer,
        max_tokens=config.data.max_tokens,
        too_long=config.data.too_long,
        train_on=config.data.train_on,
        template=config.data.template,
        trim=config.data.trim,
    )
    sources, drops = load_sources(config.data.files, read_conversations, encode)
    loader = build_loader(sources, config.data, config.batch, world)

    model = build_model(Llama, config.model, config.parallel, tokenizer, world, seed=config.batch.seed)
    totals = train(
        model,
        loader,
        SFTTask(chunk_bytes=config.parallel.logits_megabytes * 2**20),
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
    """Entry point of `torchrun recipes/sft.py`."""
    launch(SFTConfig, run)


if __name__ == "__main__":
    main()
