"""Direct preference optimisation of a Llama on preference pairs.

    torchrun --nproc-per-node 8 recipes/dpo.py recipes/configs/llama3_8b/dpo.toml --dpo.beta 0.1

A prompt is computed once and both answers read it. The reference is the model that training starts from. Leaves a
Hugging Face directory in OUTPUT/export.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from umedtrain.config import TrainingConfig
from umedtrain.data.example import encode_preference
from umedtrain.data.loader import Loader
from umedtrain.data.sources import load_sources
from umedtrain.distributed.world import World
from umedtrain.model.llama import Llama
from umedtrain.records import read_preferences
from umedtrain.text.tokenizer import Tokenizer
from umedtrain.training.build import build_loader, build_model, build_tokenizer, export_model
from umedtrain.training.loop import train
from umedtrain.training.reference import cached_reference, frozen_reference
from umedtrain.training.run import finish_run, launch, start_run
from umedtrain.training.tasks import DPOTask, Reference
from umedtrain.weights.fingerprint import weights_fingerprint


@dataclass(frozen=True)
class LossConfig:
    """Direct preference optimisation."""

    beta: float = 0.1
    """Strength of the pull towards the reference model."""
    label_smoothing: float = 0.0
    """Assumed probability that a pair is labelled the wrong way round (cDPO)."""
    nll: float = 0.0
    """Weight of the chosen answer's negative log-likelihood, added to the loss."""
    reference: Literal["cache", "model"] = "cache"
    """What the model that training starts from says of the answers: computed once and kept in OUTPUT/reference, so that
    training holds one model only, or computed in every step by a frozen copy."""


@dataclass(frozen=True)
class DPOConfig(TrainingConfig):
    """Direct preference optimisation of a Llama on preference pairs."""

    output: str = "runs/dpo"
    """Folder of the run."""
    dpo: LossConfig = field(default_factory=LossConfig)


def run(config: DPOConfig, world: World) -> Path:
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
    loader = build_loader(sources, config.data, config.batch, world)

    model = build_model(Llama, config.model, config.parallel, tokenizer, world, seed=config.batch.seed)
    totals = train(
        model,
        loader,
        DPOTask(
            reference=reference_of(config, model, tokenizer, loader, world),
            beta=config.dpo.beta,
            label_smoothing=config.dpo.label_smoothing,
            nll=config.dpo.nll,
            chunk_bytes=config.parallel.logits_megabytes * 2**20,
        ),
        run=folder,
        world=world,
        optimizer_config=config.optimizer,
        checkpoint_config=config.checkpoint,
        log_config=config.log,
    )

    export_model(model, folder / "export", tokenizer, world)
    finish_run(folder, {**totals, "dropped": drops.summary()}, world)
    return folder / "export"


def reference_of(config: DPOConfig, model: Llama, tokenizer: Tokenizer, loader: Loader, world: World) -> Reference:
    """What the model that training starts from says of the answers; `model` is still that model."""
    chunk_bytes = config.parallel.logits_megabytes * 2**20
    if config.dpo.reference == "model":
        frozen = build_model(Llama, config.model, config.parallel, tokenizer, world, seed=config.batch.seed)
        return frozen_reference(frozen, chunk_bytes=chunk_bytes)
    start = config.model
    weights = weights_fingerprint(start.path) if start.path else f"{start.preset}, seed {config.batch.seed}"
    return cached_reference(
        model,
        loader,
        Path(config.output) / "reference",
        world,
        weights=weights,
        dtype=config.parallel.dtype,
        chunk_bytes=chunk_bytes,
        progress=config.log.progress,
    )


def main() -> None:
    """Entry point of `torchrun recipes/dpo.py`."""
    launch(DPOConfig, run)


if __name__ == "__main__":
    main()
