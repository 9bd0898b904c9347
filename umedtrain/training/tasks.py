"""What a training step computes: a task turns a batch into a summed loss, and says what the sum is divided by.

Shape suffixes: T tokens, D hidden size, N targets, S segments, A answers, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from umedtrain import losses
from umedtrain.data.batch import Batch
from umedtrain.losses import token_cross_entropy, token_logprobs

Reference = Callable[[Batch], torch.Tensor]
"""From a batch to the log-probability of each of its answers under the reference model, fp32 [A]."""
Pair = tuple[torch.Tensor, torch.Tensor]
"""A value of each pair's better answer and one of its worse: [P] and [P]."""
PairLoss = Callable[..., torch.Tensor]
"""From policy log-probabilities (`Pair`), reference log-probabilities (`Pair` or None) and lengths in tokens (`Pair`)
to a loss per pair, fp32 [P]; `kl` is the step's estimate of the KL divergence, for a task that makes one."""
KLEstimate = Callable[[nn.Module, int], float]
"""From the policy and a step's number to an estimate of KL(policy || reference), one for all ranks. Collective."""
Sums = dict[str, torch.Tensor]
"""Metrics as sums over a batch; the loop divides them by the global count."""
Means = dict[str, float]


class Task(Protocol):
    """One kind of training. `unit` names what is counted: targets, pairs or prompts."""

    unit: str

    def at_step(self, model: nn.Module, step: int) -> "Task":
        """The task with what a step's loss needs to know of more than one micro-batch. Collective."""
        ...

    def count(self, batch: Batch) -> int:
        """How many units the batch holds; known before the forward pass."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Sums]:
        """Loss summed over the batch, connected to every parameter, and metrics as sums."""
        ...

    def report(self, means: Means) -> Means:
        """What is logged of a step: `means` are the sums over the whole step, divided by the global count."""
        ...


def answer_logprobs(model: nn.Module, batch: Batch, *, chunk_bytes: int) -> torch.Tensor:
    """fp32 [A]: log-probability of each answer of the batch, summed over its targets."""
    hidden_ND = model(batch.tokens_T, batch.layout)[batch.rows_N]
    logp_N = token_logprobs(hidden_ND, model.lm_head_weight, batch.targets_N, chunk_bytes=chunk_bytes)
    sums_S = torch.zeros(batch.layout.num_segments, dtype=torch.float32, device=logp_N.device)
    return sums_S.index_add(0, batch.segment_of_N, logp_N)[list(batch.leaves)]


def answer_lengths(batch: Batch) -> torch.Tensor:
    """fp32 [A]: targets of each answer of the batch."""
    lengths_S = torch.bincount(batch.segment_of_N, minlength=batch.layout.num_segments)
    return lengths_S[list(batch.leaves)].float()


@dataclass(frozen=True)
class SFTTask:
    """Supervised fine-tuning: negative log-likelihood of the targets."""

    chunk_bytes: int = 512 * 2**20
    unit: str = "targets"

    def at_step(self, model: nn.Module, step: int) -> "SFTTask":
        return self

    def count(self, batch: Batch) -> int:
        return batch.num_targets

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Sums]:
        hidden_ND = model(batch.tokens_T, batch.layout)[batch.rows_N]
        loss = token_cross_entropy(hidden_ND, model.lm_head_weight, batch.targets_N, chunk_bytes=self.chunk_bytes)
        return loss, {}

    def report(self, means: Means) -> Means:
        return means


@dataclass(frozen=True)
class PreferenceTask:
    """Learning from pairs: DPO and its kin.

    A batch's examples are a prompt with its answers as children, and pairs of them.

    Attributes:
        loss: see `PairLoss`; one of `umedtrain.losses` with its settings put in.
        reference: the reference model's log-probabilities; None for a loss without a reference.
        beta: scale of the implicit rewards beta (log pi - log ref) that are logged.
        nll: adds that many times the chosen answer's negative log-likelihood, which keeps both answers'
            probabilities from sinking together (Pang et al. 2024, arXiv 2404.19733), here per pair and summed over the
            answer's tokens.
        chunk_bytes: see `token_logprobs`.
        estimate_kl: for a loss that takes `kl`.
        kl: what it says of the step.
    """

    loss: PairLoss
    reference: Reference | None
    beta: float = 0.1
    nll: float = 0.0
    chunk_bytes: int = 512 * 2**20
    estimate_kl: KLEstimate | None = None
    kl: float | None = None
    unit: str = "pairs"

    def at_step(self, model: nn.Module, step: int) -> "PreferenceTask":
        return replace(self, kl=self.estimate_kl(model, step)) if self.estimate_kl else self

    def count(self, batch: Batch) -> int:
        return batch.num_pairs

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Sums]:
        def pairs(values_A: torch.Tensor) -> Pair:
            return values_A[batch.better_P], values_A[batch.worse_P]

        policy_A = answer_logprobs(model, batch, chunk_bytes=self.chunk_bytes)
        reference_A = self.reference(batch) if self.reference else None
        chosen_P, rejected_P = pairs(policy_A)
        loss_P = self.loss(
            (chosen_P, rejected_P),
            None if reference_A is None else pairs(reference_A),
            pairs(answer_lengths(batch)),
            **({} if self.kl is None else {"kl": self.kl}),
        )
        # The last addend keeps a batch without pairs connected to the parameters.
        loss = (loss_P - self.nll * chosen_P).sum() + 0.0 * policy_A.sum()
        rewards_A = self.beta * (policy_A.detach() - (0.0 if reference_A is None else reference_A))
        better_P, worse_P = pairs(rewards_A)
        return loss, {
            "preference_loss": loss_P.detach().sum(),
            "accuracy": _ranked_rightly(better_P, worse_P).sum(),
            "reward_chosen": better_P.sum(),
            "reward_rejected": worse_P.sum(),
            "logp_chosen": chosen_P.detach().sum(),
            "logp_rejected": rejected_P.detach().sum(),
            **({} if self.kl is None else {"kl": torch.full_like(loss_P, self.kl).sum()}),
        }

    def report(self, means: Means) -> Means:
        return means


@dataclass(frozen=True)
class RewardTask:
    """Bradley-Terry reward modelling; the pairs of one prompt count as one together.

    Prompts with many answers thus do not outweigh those with few (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).

    Logged, over all pairs with these weights: `margin`, the reward of the chosen answer less that of the rejected one;
    `probability`, the mean of sigmoid(margin); `confidence`, the mean of sigmoid(|margin|), which is the `accuracy`
    that the model expects of itself; mean and standard deviation of both sides' rewards; `length_correlation`,
    Pearson's of an answer's reward and its tokens, left out where either is the same for all.

    Attributes:
        margin_scale: the loss asks for a margin of that many times `Batch.margins_P`; see `losses.bradley_terry`.
        center: weight of `losses.centering`.
    """

    margin_scale: float = 0.0
    center: float = 0.0
    unit: str = "prompts"

    def at_step(self, model: nn.Module, step: int) -> "RewardTask":
        return self

    def count(self, batch: Batch) -> int:
        return batch.num_examples

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Sums]:
        rewards = model(batch.tokens_T, batch.layout)
        better_P, worse_P = rewards[batch.better_P], rewards[batch.worse_P]
        preference_P = losses.bradley_terry(better_P, worse_P, margin_P=self.margin_scale * batch.margins_P)
        loss_P = preference_P + self.center * losses.centering(better_P, worse_P)
        # A batch without examples holds one filler token, whose reward keeps the graph connected.
        loss = (batch.weights_P * loss_P).sum() + 0.0 * rewards.sum()
        # In float64, for `report` subtracts the square of a mean from the mean of a square.
        better_P, worse_P = better_P.detach().double(), worse_P.detach().double()
        lengths_A = answer_lengths(batch).double()
        better_length_P, worse_length_P = lengths_A[batch.better_P], lengths_A[batch.worse_P]
        values = {
            "preference_loss": preference_P.detach(),
            "accuracy": _ranked_rightly(better_P, worse_P),
            "margin": better_P - worse_P,
            "probability": (better_P - worse_P).sigmoid(),
            "confidence": (better_P - worse_P).abs().sigmoid(),
            "reward_chosen": better_P,
            "reward_rejected": worse_P,
            "_one": torch.ones_like(better_P),
            "_chosen^2": better_P.square(),
            "_rejected^2": worse_P.square(),
            "_length": (better_length_P + worse_length_P) / 2,
            "_length^2": (better_length_P.square() + worse_length_P.square()) / 2,
            "_reward*length": (better_P * better_length_P + worse_P * worse_length_P) / 2,
        }
        return loss, {name: (batch.weights_P * value_P).sum() for name, value_P in values.items()}

    def report(self, means: Means) -> Means:
        # An example's weights, being fp32, do not quite add up to one.
        exact = {name: value / (means["_one"] or 1.0) for name, value in means.items()}
        chosen, rejected, length = exact["reward_chosen"], exact["reward_rejected"], exact["_length"]
        reward = (chosen + rejected) / 2
        shown = {name: value for name, value in means.items() if not name.startswith("_")}
        shown["reward_chosen_std"] = _variance(exact["_chosen^2"], chosen) ** 0.5
        shown["reward_rejected_std"] = _variance(exact["_rejected^2"], rejected) ** 0.5
        variances = _variance((exact["_chosen^2"] + exact["_rejected^2"]) / 2, reward)
        variances *= _variance(exact["_length^2"], length)
        if variances:
            shown["length_correlation"] = (exact["_reward*length"] - reward * length) / variances**0.5
        return shown


def _variance(mean_of_square: float, mean: float) -> float:
    """0 where nothing but rounding is left of it."""
    variance = mean_of_square - mean * mean
    return variance if variance > 1e-12 * mean_of_square else 0.0


def _ranked_rightly(better_P: torch.Tensor, worse_P: torch.Tensor) -> torch.Tensor:
    """fp32 [P]: 1 for a pair ranked rightly, one half for a tie."""
    return (better_P > worse_P).float() + 0.5 * (better_P == worse_P).float()
