"""Preference losses against Liger's: its loss functions alone, and its fused layers from hidden states on.

Liger averages over the pairs (KTO: the answers) of the target that it is given; ours give one loss each.
"""

from functools import partial

import pytest
import torch

pytest.importorskip("liger_kernel")
from liger_kernel.chunked_loss import (
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction
from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction
from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction
from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction

from umedtrain import losses

PAIRS, TOKENS, HIDDEN, VOCAB = 4, 9, 16, 23
TARGET = torch.zeros(2 * PAIRS, TOKENS)  # the loss functions read the number of rows only

# Their loss type and options, and ours. "ipo" is missing there: it would need the answers' lengths.
WITH_REFERENCE = pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"loss_type": "sigmoid"}, losses.dpo),
        ({"loss_type": "hinge"}, losses.hinge),
        ({"loss_type": "nca_pair"}, losses.nca),
        ({"loss_type": "robust", "label_smoothing": 0.2}, partial(losses.robust_dpo, label_smoothing=0.2)),
    ],
    ids=["dpo", "hinge", "nca", "robust_dpo"],
)


def assert_same_value_and_gradients(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
    wanted = torch.autograd.grad(theirs, leaves)
    got = torch.autograd.grad(ours, leaves)
    for ours_grad, theirs_grad in zip(got, wanted, strict=True):
        assert theirs_grad.abs().max() > 1e-3, "the comparison wants a gradient"
        torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-5, rtol=1e-5)


def log_probabilities(*, per_token: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Chosen and rejected of the policy, as leaves, and of the reference."""
    generator = torch.Generator().manual_seed(0)
    scale = 1.5 if per_token else 30.0
    policy = [-scale * (0.1 + torch.rand(PAIRS, generator=generator)) for _ in range(2)]
    reference = [logp + torch.randn(PAIRS, generator=generator) for logp in policy]
    return [logp.requires_grad_() for logp in policy], reference


@WITH_REFERENCE
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_functions_with_a_reference(options, ours, beta):
    policy, reference = log_probabilities()
    theirs = LigerFusedLinearDPOFunction.preference_loss_fn(*policy, TARGET, *reference, beta=beta, **options)[0]
    assert_same_value_and_gradients(ours(*policy, *reference, beta=beta).sum() / PAIRS, theirs, policy)


def test_smoothed_dpo_is_their_cpo_with_a_reference_of_zeros():
    """Their "sigmoid" ignores label smoothing; CPO's smooths as cDPO does."""
    policy, _ = log_probabilities()
    none = torch.zeros(PAIRS)
    theirs = LigerFusedLinearCPOFunction.preference_loss_fn(*policy, TARGET, beta=0.3, label_smoothing=0.2)[0]
    ours = losses.dpo(*policy, none, none, beta=0.3, label_smoothing=0.2)
    assert_same_value_and_gradients(ours.sum() / PAIRS, theirs, policy)


def test_simpo_loss_function():
    """Theirs takes means: answers of one token to ours."""
    policy, _ = log_probabilities(per_token=True)
    ones = torch.ones(PAIRS, dtype=torch.long)
    theirs = LigerFusedLinearSimPOFunction.preference_loss_fn(*policy, TARGET, beta=2.0, gamma=0.7)[0]
    ours = losses.simpo(*policy, ones, ones, beta=2.0, gamma=0.7)
    assert_same_value_and_gradients(ours.sum() / PAIRS, theirs, policy)


def test_orpo_loss_function():
    """Theirs takes means and gives the second addend only, times beta."""
    policy, _ = log_probabilities(per_token=True)
    ones = torch.ones(PAIRS, dtype=torch.long)
    theirs = LigerFusedLinearORPOFunction.preference_loss_fn(*policy, TARGET, beta=0.4)[0]
    ours = 0.4 * losses.odds_ratio(*policy, ones, ones)
    assert_same_value_and_gradients(ours.sum() / PAIRS, theirs, policy)


@pytest.mark.parametrize("kl", [0.0, 1.5])
def test_kto_loss_function(kl):
    """Theirs has no weights and takes the KL as it is, so a clamped one; ours clamps what it is given."""
    (policy, _), (reference, _) = log_probabilities()
    desirable = torch.tensor([True, False, True, True])
    theirs = LigerFusedLinearKTOFunction.preference_loss_fn(
        policy, desirable, TARGET[:PAIRS], reference, beta=0.3, kl=torch.tensor(kl)
    )[0]
    ours = losses.kto(policy, reference, desirable, kl, beta=0.3)
    assert_same_value_and_gradients(ours.sum() / PAIRS, theirs, [policy])
    unclamped = LigerFusedLinearKTOFunction.preference_loss_fn(
        policy, desirable, TARGET[:PAIRS], reference, beta=0.3, kl=torch.tensor(-1.0)
    )[0]
    clamped = losses.kto(policy, reference, desirable, -1.0, beta=0.3).sum() / PAIRS
    assert torch.equal(clamped, losses.kto(policy, reference, desirable, 0.0, beta=0.3).sum() / PAIRS)
    assert abs(clamped - unclamped) > 1e-3


class Rows:
    """Hidden states, their targets and an output projection, of a policy and of a reference."""

    def __init__(self, rows: int):
        generator = torch.Generator().manual_seed(1)
        self.target = torch.randint(VOCAB, (rows, TOKENS), generator=generator)
        for row in self.target:
            start, end = sorted(torch.randperm(TOKENS + 1, generator=generator)[:2].tolist())
            row[:start] = row[end:] = -100
        shape = rows, TOKENS, HIDDEN
        self.hidden, self.reference_hidden = (torch.randn(shape, generator=generator) for _ in range(2))
        self.weight, self.reference_weight = (torch.randn(VOCAB, HIDDEN, generator=generator) / 4 for _ in range(2))
        self.leaves = [self.hidden.requires_grad_(), self.weight.requires_grad_()]
        self.reference = {"ref_input": self.reference_hidden, "ref_weight": self.reference_weight}

    @property
    def lengths(self) -> torch.Tensor:
        return (self.target != -100).sum(1)

    def sums(self) -> torch.Tensor:
        return self._sums(self.hidden, self.weight)

    def reference_sums(self) -> torch.Tensor:
        return self._sums(self.reference_hidden, self.reference_weight)

    def _sums(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logp_N = losses.token_logprobs(hidden.view(-1, HIDDEN), weight, self.target.view(-1))
        return logp_N.view(self.target.shape).sum(1)


@WITH_REFERENCE
def test_fused_losses_with_a_reference(options, ours):
    rows = Rows(2 * PAIRS)
    layer = LigerFusedLinearDPOLoss(beta=0.3, compiled=False, **options)
    theirs, _ = layer(rows.weight, rows.hidden, rows.target, **rows.reference)
    loss_P = ours(*rows.sums().chunk(2), *rows.reference_sums().chunk(2), beta=0.3)
    assert_same_value_and_gradients(loss_P.sum() / PAIRS, theirs, rows.leaves)


def test_fused_dpo_with_alpha_times_nll():
    """Their addend is one mean over the chosen answers' tokens; the published one divides by each answer's length."""
    rows = Rows(2 * PAIRS)
    layer = LigerFusedLinearDPOLoss(beta=0.3, alpha=0.7, compute_nll_loss=True, compiled=False)
    theirs, _ = layer(rows.weight, rows.hidden, rows.target, **rows.reference)
    chosen_P, rejected_P = rows.sums().chunk(2)
    length_P = rows.lengths[:PAIRS]
    dpo_P = losses.dpo(chosen_P, rejected_P, *rows.reference_sums().chunk(2), beta=0.3)
    published = (dpo_P - 0.7 * chosen_P / length_P).sum() / PAIRS
    assert abs(published - theirs) > 1e-3, "answers of different lengths tell the two conventions apart"
    ours = dpo_P.sum() / PAIRS + 0.7 * losses.sft(chosen_P) / length_P.sum()
    assert_same_value_and_gradients(ours, theirs, rows.leaves)


@pytest.mark.parametrize("nll", [False, True])
def test_fused_simpo(nll):
    """Their layer adds the chosen answers' negative log-likelihood unless told not to; the paper's loss has none."""
    rows = Rows(2 * PAIRS)
    layer = LigerFusedLinearSimPOLoss(beta=2.0, gamma=0.7, alpha=0.6, compute_nll_loss=nll, compiled=False)
    theirs, _ = layer(rows.weight, rows.hidden, rows.target)
    chosen_P, rejected_P = rows.sums().chunk(2)
    ours = losses.simpo(chosen_P, rejected_P, *rows.lengths.chunk(2), beta=2.0, gamma=0.7).sum() / PAIRS
    if nll:
        ours = ours + 0.6 * losses.sft(chosen_P) / rows.lengths[:PAIRS].sum()
    assert_same_value_and_gradients(ours, theirs, rows.leaves)


def test_fused_orpo():
    """Their first addend is one mean over the chosen answers' tokens, so ours is `odds_ratio` beside that mean."""
    rows = Rows(2 * PAIRS)
    layer = LigerFusedLinearORPOLoss(beta=0.4, compiled=False)
    theirs, _ = layer(rows.weight, rows.hidden, rows.target)
    chosen_P, rejected_P = rows.sums().chunk(2)
    odds_ratio_P = losses.odds_ratio(chosen_P, rejected_P, *rows.lengths.chunk(2))
    ours = losses.sft(chosen_P) / rows.lengths[:PAIRS].sum() + 0.4 * odds_ratio_P.sum() / PAIRS
    assert_same_value_and_gradients(ours, theirs, rows.leaves)


def test_fused_kto():
    rows = Rows(6)
    desirable = torch.tensor([True, False, False, True, False, False])
    layer = LigerFusedLinearKTOLoss(beta=0.3, compiled=False, use_ref_model=True)
    kl = torch.tensor(0.8)
    theirs, _ = layer(rows.hidden, rows.weight, rows.target, preference_labels=desirable, kl=kl, **rows.reference)
    ours = losses.kto(rows.sums(), rows.reference_sums(), desirable, kl, beta=0.3)
    assert_same_value_and_gradients(ours.sum() / 6, theirs, rows.leaves)
