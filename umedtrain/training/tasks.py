"""What a training step computes: a task turns a batch into a summed loss, and says what the sum is divided by.

Shape suffixes: T tokens, D hidden size, N targets, S segments, P pairs.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from umedtrain import losses
from umedtrain.data.batch import Batch
from umedtrain.losses import token_logprobs

Sums = dict[str, torch.Tensor]
"""Metrics as sums over a batch; the loop divides them by the global count."""


class Task(Protocol):
    """One kind of training. `unit` names what is counted: targets or pairs."""

    unit: str

    def count(self, batch: Batch) -> int:
        """How many units the batch holds; known before the forward pass."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Sums]:
        """Loss summed over the batch, connected to every parameter, and metrics as sums."""
        ...


def batch_logprobs(model: nn.Module, batch: Batch, *, chunk_bytes: int) -> torch.Tensor:
    """fp32 [N]: log-probability of each target of the batch."""
    hidden_TD = model(batch.tokens_T, batch.layout)
    return token_logprobs(hidden_TD[batch.rows_N], model.lm_head_weight, batch.targets_N, chunk_bytes=chunk_bytes)


def segment_sums(logp_N: torch.Tensor, batch: Batch) -> torch.Tensor:
    """fp32 [S]: log-probabilities summed over each segment's targets."""
    sums_S = torch.zeros(batch.layout.num_segments, dtype=torch.float32, device=logp_N.device)
    return sums_S.index_add(0, batch.segment_of_N, logp_N)


def split_pairs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen and rejected of values that alternate chosen, rejected; ([P], [P])."""
    return values[0::2], values[1::2]


@dataclass(frozen=True)
class SFTTask:
    """Supervised fine-tuning: negative log-likelihood of the targets."""

    chunk_bytes: int = 512 * 2**20
    unit: str = "targets"

    def count(self, batch: Batch) -> int:
        return batch.num_targets

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Sums]:
        return losses.sft(batch_logprobs(model, batch, chunk_bytes=self.chunk_bytes)), {}


@dataclass(frozen=True)
class DPOTask:
    """Direct preference optimisation against a frozen copy of the model that training started from.

    A batch's examples are a prompt with two children: chosen, rejected. `nll` adds that many times the chosen
    answer's negative log-likelihood, which keeps both answers' probabilities from sinking together (Pang et al.
    2024, arXiv 2404.19733), here per pair and summed over the answer's tokens.
    """

    reference: nn.Module
    beta: float = 0.1
    label_smoothing: float = 0.0
    nll: float = 0.0
    chunk_bytes: int = 512 * 2**20
    unit: str = "pairs"

    def count(self, batch: Batch) -> int:
        return batch.num_examples

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Sums]:
        policy_P, other_P = split_pairs(self._answers(model, batch))
        with torch.no_grad():
            reference_P, reference_other_P = split_pairs(self._answers(self.reference, batch))
        loss_P = losses.dpo(
            policy_P,
            other_P,
            reference_P,
            reference_other_P,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        loss = loss_P.sum() - self.nll * policy_P.sum()
        reward_P = self.beta * (policy_P - reference_P).detach()
        other_reward_P = self.beta * (other_P - reference_other_P).detach()
        return loss, {
            "dpo_loss": loss_P.detach().sum(),
            "accuracy": _accuracy(reward_P, other_reward_P),
            "reward_chosen": reward_P.sum(),
            "reward_rejected": other_reward_P.sum(),
            "logp_chosen": policy_P.detach().sum(),
            "logp_rejected": other_P.detach().sum(),
        }

    def _answers(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """fp32: log-probability of each answer, chosen and rejected by turns."""
        sums_S = segment_sums(batch_logprobs(model, batch, chunk_bytes=self.chunk_bytes), batch)
        return sums_S[list(batch.layout.leaves[: 2 * batch.num_examples])]


@dataclass(frozen=True)
class RewardTask:
    """Bradley-Terry reward modelling on pairs."""

    unit: str = "pairs"

    def count(self, batch: Batch) -> int:
        return batch.num_examples

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Sums]:
        rewards = model(batch.tokens_T, batch.layout)
        # A batch without examples holds one filler token; its reward is cut away but keeps the graph connected.
        chosen_P, rejected_P = split_pairs(rewards[: 2 * batch.num_examples])
        loss = losses.bradley_terry(chosen_P, rejected_P).sum() + 0.0 * rewards.sum()
        return loss, {
            "accuracy": _accuracy(chosen_P.detach(), rejected_P.detach()),
            "margin": (chosen_P - rejected_P).detach().sum(),
            "reward_chosen": chosen_P.detach().sum(),
            "reward_rejected": rejected_P.detach().sum(),
        }


def _accuracy(better_P: torch.Tensor, worse_P: torch.Tensor) -> torch.Tensor:
    """Number of pairs ranked rightly; a tie counts half."""
    return (better_P > worse_P).float().sum() + 0.5 * (better_P == worse_P).float().sum()
