"""Preference learning of a Llama on pairs: DPO and its kin.

    torchrun --nproc-per-node 8 recipes/dpo.py recipes/configs/llama3_8b/dpo.toml --dpo.beta 0.1

A prompt is computed once and both answers read it. The reference is the model that training starts from. Leaves a
Hugging Face directory in OUTPUT/export.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from umedtrain import losses
from umedtrain.config import PairsConfig, TrainingConfig
from umedtrain.data.care import load_pairs
from umedtrain.data.example import encode_preference
from umedtrain.data.loader import Loader
from umedtrain.data.mismatched import mismatched_loader
from umedtrain.data.ranking import merge_pairs
from umedtrain.distributed.world import World
from umedtrain.model.llama import Llama
from umedtrain.training.build import build_loader, build_model, build_tokenizer, export_model, name_weights
from umedtrain.training.loop import train
from umedtrain.training.reference import build_reference, kl_estimate
from umedtrain.training.run import finish_run, launch, start_run
from umedtrain.training.tasks import Pair, PairLoss, PreferenceTask


@dataclass(frozen=True)
class LossConfig:
    """Preference learning from pairs."""

    loss: Literal["sigmoid", "robust", "ipo", "hinge", "nca", "kto", "simpo", "orpo"] = "sigmoid"
    """Loss of a pair: DPO's own (sigmoid) or one of its kin; umedtrain.losses has their formulas. simpo and orpo have
    no reference. kto takes a pair apart into a good and a bad answer."""
    beta: float = 0.1
    """Strength of the pull towards the reference model; the papers' beta, IPO's tau, ORPO's lambda."""
    label_smoothing: float = 0.0
    """sigmoid and robust: assumed probability that a pair is labelled the wrong way round."""
    gamma: float = 0.5
    """simpo: margin that the chosen answer's reward must have."""
    desirable_weight: float = 1.0
    """kto: weight of good answers."""
    undesirable_weight: float = 1.0
    """kto: weight of bad answers."""
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
    merge_pairs: bool = False
    """Make the pairs of a prompt one example, in which prompt and answers are computed once each; batch.examples then
    counts prompts. Every pair counts alike in the loss, so that prompts with many pairs count more."""


def run(config: DPOConfig, world: World) -> Path:
    """Train, export, and return the exported directory."""
    folder = Path(config.output)
    check_loss(config.dpo)
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
    kept_out = folder / "held_out.jsonl" if world.is_main else None
    sources, drops, report = load_pairs(config.data.files, config.pairs, encode, kept_out=kept_out)
    if config.merge_pairs:
        sources = [merge_pairs(examples, max_tokens=config.data.max_tokens) for examples in sources]
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
    kind, chunk_bytes = config.dpo.reference, config.parallel.logits_megabytes * 2**20
    options = {"parallel": config.parallel, "weights": weights, "progress": config.log.progress}
    frozen = build_reference(kind, reference, loader, folder / "reference", world, **options)
    estimate = None
    if config.dpo.loss == "kto":
        others, of_others = mismatched_loader(loader), frozen
        if kind == "cache":
            of_others = build_reference(kind, reference, others, folder / "reference-mismatched", world, **options)
        estimate = kl_estimate(others, of_others, world, chunk_bytes=chunk_bytes)
    task = PreferenceTask(
        pair_loss(config.dpo),
        frozen,
        beta=config.dpo.beta,
        nll=config.dpo.nll,
        chunk_bytes=chunk_bytes,
        estimate_kl=estimate,
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
        case "kto":
            return partial(_kto, config)
        case "simpo":
            return lambda policy, _, lengths: losses.simpo(*policy, *lengths, beta=beta, gamma=config.gamma)
        case "orpo":
            return lambda policy, _, lengths: losses.orpo(*policy, *lengths, beta=beta)


def _kto(config: LossConfig, policy: Pair, reference: Pair, _: Pair, *, kl: float = 0.0) -> torch.Tensor:
    """The mean of a good and a bad answer's loss, so that the mean over pairs is that over answers."""
    weights = {"desirable_weight": config.desirable_weight, "undesirable_weight": config.undesirable_weight}
    loss_P = torch.zeros_like(policy[0])
    for policy_P, reference_P, good in zip(policy, reference, (True, False), strict=True):
        good_P = torch.full_like(policy_P, good, dtype=torch.bool)
        loss_P = loss_P + losses.kto(policy_P, reference_P, good_P, kl, beta=config.beta, **weights) / 2
    return loss_P


def check_loss(config: LossConfig) -> None:
    """Refuse settings that would fail only when the reference has been computed.

    Raises:
        ValueError: naming the setting.
    """
    if not 0 <= config.nll < math.inf:
        raise ValueError(f"dpo.nll must be 0 or a positive number, got {config.nll}")
    loss, one = pair_loss(config), torch.ones(1)
    try:
        loss((-one, -one), (-one, -one), (one, one))
    except ValueError as error:  # begins with the setting's name
        raise ValueError(f"dpo.{error}") from None


def main() -> None:
    """Entry point of `torchrun recipes/dpo.py`."""
    launch(DPOConfig, run)


if __name__ == "__main__":
    main()
