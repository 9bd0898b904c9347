"""Preference learning of a Llama on pairs: DPO and its kin.

    torchrun --nproc-per-node 8 recipes/dpo.py recipes/configs/llama3_8b/dpo.toml --dpo.beta 0.1

A prompt is computed once and both answers read it. The reference is the model that training starts from. Leaves a
Hugging Face directory in OUTPUT/export.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from umedtrain import losses
from umedtrain.config import PairsConfig, TrainingConfig
from umedtrain.data.care import load_pairs
from umedtrain.data.example import encode_preference
from umedtrain.data.loader import Loader
from umedtrain.distributed.world import World
from umedtrain.model.llama import Llama
from umedtrain.training.build import build_loader, build_model, build_tokenizer, export_model, name_weights
from umedtrain.training.loop import train
from umedtrain.training.reference import build_reference
from umedtrain.training.run import finish_run, launch, start_run
from umedtrain.training.tasks import PairLoss, PreferenceTask


@dataclass(frozen=True)
class LossConfig:
    """Preference learning from pairs."""

    loss: Literal["sigmoid", "robust", "ipo", "hinge", "nca", "simpo", "orpo"] = "sigmoid"
    """Loss of a pair: DPO's own (sigmoid) or one of its kin; umedtrain.losses has their formulas. simpo and orpo have
    no reference."""
    beta: float = 0.1
    """Strength of the pull towards the reference model; the papers' beta, IPO's tau, ORPO's lambda."""
    label_smoothing: float = 0.0
    """sigmoid and robust: assumed probability that a pair is labelled the wrong way round."""
    gamma: float = 0.5
    """simpo: margin that the chosen answer's reward must have."""
    nll: float = 0.0
    """Weight of the chosen answer's negative log-likelihood, added to the loss."""
    reference: Literal["cache", "model", "none"] = "cache"
    """What the model that training starts from says of the answers: computed once and kept in OUTPUT/reference, so that
    training holds one model only; computed in every step by a frozen copy; or, for losses that have none, nothing."""


@dataclass(frozen=True)
class PairTrainingConfig(TrainingConfig):
    """What every recipe has that learns from pairs."""

    dpo: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True)
class DPOConfig(PairTrainingConfig):
    """Preference learning of a Llama on pairs: DPO and its kin."""

    output: str = "runs/dpo"
    """Folder of the run."""
    pairs: PairsConfig = field(default_factory=PairsConfig)


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
    sources, drops, report = load_pairs(config.data.files, config.pairs, encode)
    loader = build_loader(sources, config.data, config.batch, world)

    model = build_model(Llama, config.model, config.parallel, tokenizer, world, seed=config.batch.seed)
    start = name_weights(config.model, seed=config.batch.seed)
    totals = learn(config, model, model, loader, folder, world, weights=start)

    export_model(model, folder / "export", tokenizer, world)
    finish_run(folder, {**totals, "dropped": drops.summary(), "data": report}, world)
    return folder / "export"


def learn(
    config: PairTrainingConfig,
    model: Llama,
    reference: Llama,
    loader: Loader,
    folder: Path,
    world: World,
    *,
    weights: str,
) -> dict[str, float]:
    """Train `model` on the loader's pairs and return the run's totals.

    Args:
        reference: as it is now, the reference; may be `model` itself.
        folder: the run's.
        weights: name of the reference's weights.
    """
    task = PreferenceTask(
        pair_loss(config.dpo),
        build_reference(
            config.dpo.reference,
            reference,
            loader,
            folder / "reference",
            world,
            parallel=config.parallel,
            weights=weights,
            progress=config.log.progress,
        ),
        beta=config.dpo.beta,
        nll=config.dpo.nll,
        chunk_bytes=config.parallel.logits_megabytes * 2**20,
    )
    return train(
        model,
        loader,
        task,
        run=folder,
        world=world,
        optimizer_config=config.optimizer,
        checkpoint_config=config.checkpoint,
        log_config=config.log,
    )


def pair_loss(config: LossConfig) -> PairLoss:
    """The loss function with its settings put in.

    Raises:
        ValueError: for a loss without the reference that it needs, or with one that it does not have.
    """
    if (config.loss in ("simpo", "orpo")) != (config.reference == "none"):
        wanted = "none" if config.loss in ("simpo", "orpo") else "cache or model"
        raise ValueError(f"dpo.reference is {config.reference!r}; with dpo.loss {config.loss!r} it must be {wanted}")
    beta, smoothing = config.beta, config.label_smoothing
    match config.loss:
        case "sigmoid":
            return lambda policy, ref, _: losses.dpo(*policy, *ref, beta=beta, label_smoothing=smoothing)
        case "robust":
            return lambda policy, ref, _: losses.robust_dpo(*policy, *ref, beta=beta, label_smoothing=smoothing)
        case "ipo":
            return lambda policy, ref, lengths: losses.ipo(*policy, *ref, *lengths, beta=beta)
        case "hinge":
            return lambda policy, ref, _: losses.hinge(*policy, *ref, beta=beta)
        case "nca":
            return lambda policy, ref, _: losses.nca(*policy, *ref, beta=beta)
        case "simpo":
            return lambda policy, _, lengths: losses.simpo(*policy, *lengths, beta=beta, gamma=config.gamma)
        case "orpo":
            return lambda policy, _, lengths: losses.orpo(*policy, *lengths, beta=beta)


def main() -> None:
    """Entry point of `torchrun recipes/dpo.py`."""
    launch(DPOConfig, run)


if __name__ == "__main__":
    main()
