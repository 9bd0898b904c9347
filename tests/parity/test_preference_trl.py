"""Preference losses against TRL's: the loss code of its trainers, run on log-probabilities that we choose.

The trainers get everything from a model's outputs; here a stand-in hands them token log-probabilities, so that value
and gradient are compared over the range of numbers that training meets. TRL averages over the micro-batch where ours
gives one loss per pair or answer, to be divided by the count of the whole step.
"""

import warnings
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")
import trl

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that experimental trainers are experimental
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

from umedtrain import losses

PAIRS, TOKENS = 7, 12
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def completion_mask(count: int, generator: torch.Generator) -> torch.Tensor:
    """[count, TOKENS + 1]: a prompt of at least one token, an answer of at least one, padding."""
    mask = torch.zeros(count, TOKENS + 1, dtype=torch.long)
    for row in mask:
        start, end = sorted((torch.randperm(TOKENS, generator=generator)[:2] + 1).tolist())
        row[start : end + 1] = 1
    return mask


class StandInModel:
    """Gives the token log-probabilities that it was made with, 0 outside the answers; a leaf to take gradients of."""

    training = True

    def __init__(self, mask: torch.Tensor, generator: torch.Generator, *, scale: float = 1.0):
        self.mask = mask[:, 1:]
        self.logp = (-scale * torch.rand(self.mask.shape, generator=generator)).requires_grad_()

    @property
    def sums(self) -> torch.Tensor:
        return (self.logp * self.mask).sum(1)

    @property
    def lengths(self) -> torch.Tensor:
        return self.mask.sum(1)

    def __call__(self, **_inputs):
        zeros = torch.zeros(self.mask.shape)
        return SimpleNamespace(
            log_probs=self.logp * self.mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
        )


def stand_in_trainer(**options) -> SimpleNamespace:
    """What the trainers' loss code reads of `self`."""
    return SimpleNamespace(
        accelerator=ACCELERATOR,
        precompute_ref_logps=True,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        label_smoothing=0.0,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )


class Pairs:
    """A batch of TRL's DPO trainer with a stand-in policy and reference."""

    def __init__(self, *, seed: int = 0, count: int = PAIRS):
        generator = torch.Generator().manual_seed(seed)
        mask = completion_mask(2 * count, generator)
        self.count = count
        self.policy = StandInModel(mask, generator)
        reference = self.policy.sums.detach() + 3 * torch.randn(2 * count, generator=generator)
        self.reference = reference.chunk(2)
        self.inputs = {
            "input_ids": torch.zeros_like(mask),
            "attention_mask": torch.ones_like(mask),
            "completion_mask": mask,
            "ref_chosen_logps": self.reference[0],
            "ref_rejected_logps": self.reference[1],
        }

    @property
    def sums(self) -> tuple[torch.Tensor, ...]:
        """Ours: log-probabilities of the policy's and of the reference's chosen and rejected answers."""
        return *self.policy.sums.chunk(2), *self.reference

    @property
    def lengths(self) -> tuple[torch.Tensor, ...]:
        return self.policy.lengths.chunk(2)

    def theirs(self, loss_type: list[str], *, beta: float, label_smoothing: float = 0.0, weights=None) -> torch.Tensor:
        trainer = stand_in_trainer(
            beta=beta,
            loss_types=loss_type,
            loss_weights=weights or [1.0] * len(loss_type),
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            use_weighting=False,
        )
        trainer.label_smoothing = label_smoothing
        return trl.DPOTrainer._compute_loss(trainer, self.policy, self.inputs, return_outputs=False)


def assert_same_value_and_gradient(ours: torch.Tensor, theirs: torch.Tensor, leaf: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
    (wanted,) = torch.autograd.grad(theirs, leaf, retain_graph=True)
    (got,) = torch.autograd.grad(ours, leaf, retain_graph=True)
    assert wanted.abs().max() > 1e-3, "the comparison wants a gradient"
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(
    ("loss_type", "ours", "smoothing"),
    [
        ("sigmoid", losses.dpo, 0.0),
        ("hinge", losses.hinge, 0.0),
        ("nca_pair", losses.nca, 0.0),
        ("robust", partial(losses.robust_dpo, label_smoothing=0.2), 0.2),
        ("robust", partial(losses.robust_dpo, label_smoothing=0.0), 0.0),
    ],
)
def test_losses_of_the_dpo_trainer(loss_type, ours, smoothing, beta):
    pairs = Pairs()
    theirs = pairs.theirs([loss_type], beta=beta, label_smoothing=smoothing)
    loss_P = ours(*pairs.sums, beta=beta)
    assert loss_P.shape == (PAIRS,)
    assert_same_value_and_gradient(loss_P.sum() / PAIRS, theirs, pairs.policy.logp)


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0])
def test_ipo_divides_by_the_same_lengths(beta):
    """Theirs divides each answer's log-ratio by its number of tokens and cannot do otherwise; ours does by default."""
    pairs = Pairs()
    theirs = pairs.theirs(["ipo"], beta=beta)
    ours = losses.ipo(*pairs.sums, *pairs.lengths, beta=beta).sum() / PAIRS
    assert_same_value_and_gradient(ours, theirs, pairs.policy.logp)
    of_sums = losses.ipo(*pairs.sums, beta=beta, length_normalize=False).sum() / PAIRS
    assert abs(of_sums - theirs) > 0.1, "answers of several tokens tell the two conventions apart"


@pytest.mark.parametrize("beta", [0.3, 5.0])
def test_dpo_of_means_is_their_sigmoid_norm(beta):
    pairs = Pairs()
    chosen_length, rejected_length = pairs.lengths
    means = [sums / lengths for sums, lengths in zip(pairs.sums, (chosen_length, rejected_length) * 2, strict=True)]
    ours = losses.dpo(*means, beta=beta).sum() / PAIRS
    assert_same_value_and_gradient(ours, pairs.theirs(["sigmoid_norm"], beta=beta), pairs.policy.logp)


@pytest.mark.parametrize("seed", range(4))
def test_smoothed_dpo_is_their_aot_of_one_pair(seed):
    """Their "sigmoid" ignores label smoothing; "aot" smooths as cDPO does, after a sort that one pair does not feel."""
    pairs = Pairs(seed=seed, count=1)
    theirs = pairs.theirs(["aot"], beta=0.3, label_smoothing=0.2)
    ours = losses.dpo(*pairs.sums, beta=0.3, label_smoothing=0.2).sum()
    assert_same_value_and_gradient(ours, theirs, pairs.policy.logp)


def test_alpha_times_nll_is_their_sft_addend():
    """Theirs is one mean over the micro-batch's chosen tokens; the published one divides by each answer's length."""
    pairs = Pairs()
    theirs = pairs.theirs(["sigmoid", "sft"], beta=0.3, weights=[1.0, 0.7])
    dpo_P, chosen_P, length_P = losses.dpo(*pairs.sums, beta=0.3), pairs.sums[0], pairs.lengths[0]
    ours = dpo_P.sum() / PAIRS + 0.7 * losses.sft(chosen_P) / length_P.sum()
    assert_same_value_and_gradient(ours, theirs, pairs.policy.logp)
    published = (dpo_P - 0.7 * chosen_P / length_P).sum() / PAIRS
    assert abs(published - theirs) > 1e-3, "answers of different lengths tell the two conventions apart"


def cpo_loss(sums: tuple[torch.Tensor, ...], loss_type: str, **options) -> torch.Tensor:
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR, alpha=0.0, loss_type=loss_type, **({"label_smoothing": 0.0} | options)
    )
    return CPOTrainer.cpo_loss(trainer, *sums)[0]


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 0.5), (2.5, 0.0), (10.0, 3.0)])
def test_simpo_of_the_cpo_trainer(beta, gamma):
    """Theirs takes means (`average_log_prob` is on for this loss) and the margin as it is written in the paper."""
    pairs = Pairs()
    sums, lengths = pairs.sums[:2], pairs.lengths
    means = tuple(logp / length for logp, length in zip(sums, lengths, strict=True))
    theirs = cpo_loss(means, "simpo", beta=beta, simpo_gamma=gamma)
    ours = losses.simpo(*sums, *lengths, beta=beta, gamma=gamma)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert_same_value_and_gradient(ours.sum() / PAIRS, theirs.mean(), pairs.policy.logp)


@pytest.mark.parametrize(
    ("loss_type", "ours", "options"),
    [
        ("sigmoid", partial(losses.dpo, label_smoothing=0.2), {"label_smoothing": 0.2}),
        ("hinge", losses.hinge, {}),
        ("ipo", partial(losses.ipo, length_normalize=False), {}),
    ],
)
def test_losses_of_the_cpo_trainer_have_no_reference(loss_type, ours, options):
    """Ours with a reference of zeros. For "ipo" their log-probabilities are means already, hence no lengths in ours."""
    pairs = Pairs()
    sums, none = pairs.sums[:2], torch.zeros(PAIRS)
    loss_P = ours(*sums, none, none, beta=0.3)
    theirs_P = cpo_loss(sums, loss_type, beta=0.3, **options)
    torch.testing.assert_close(loss_P, theirs_P, atol=1e-5, rtol=1e-6)
    assert_same_value_and_gradient(loss_P.sum() / PAIRS, theirs_P.mean(), pairs.policy.logp)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_odds_ratio_of_the_orpo_trainer(beta):
    """Theirs is beta times log sigmoid, subtracted later from a negative log-likelihood; ours is a loss to be added."""
    pairs = Pairs()
    sums, lengths = pairs.sums[:2], pairs.lengths
    means = [logp / length for logp, length in zip(sums, lengths, strict=True)]
    trainer = SimpleNamespace(accelerator=ACCELERATOR, beta=beta)
    theirs, _, _, log_sigmoid, _ = ORPOTrainer.odds_ratio_loss(trainer, *means)
    ours = losses.odds_ratio(*sums, *lengths)
    torch.testing.assert_close(ours.mean(), -log_sigmoid, atol=1e-5, rtol=0)
    assert_same_value_and_gradient(beta * ours.sum() / PAIRS, -theirs.mean(), pairs.policy.logp)
    # With the paper's first addend; theirs is one mean over the micro-batch's tokens, the prompts' included.
    whole = losses.orpo(*sums, *lengths, beta=beta).sum() / PAIRS
    assert_same_value_and_gradient(whole, -means[0].mean() - theirs.mean(), pairs.policy.logp)


class Answers:
    """A batch of TRL's KTO trainer: answers, and the same prompts with other prompts' answers for the KL."""

    def __init__(self, labels: list[bool], *, kl: float, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        mask, kl_mask = (completion_mask(len(labels), generator) for _ in range(2))
        self.policy, self.mismatched = (StandInModel(which, generator) for which in (mask, kl_mask))
        self.labels = torch.tensor(labels)
        self.reference = self.policy.sums.detach() + 3 * torch.randn(len(labels), generator=generator)
        self.kl = torch.randn(len(labels), generator=generator)
        self.kl += kl - self.kl.mean()
        self.inputs = {
            "input_ids": torch.zeros_like(mask),
            "attention_mask": torch.ones_like(mask),
            "completion_mask": mask,
            "KL_input_ids": torch.zeros_like(kl_mask),
            "KL_attention_mask": torch.ones_like(kl_mask),
            "KL_completion_mask": kl_mask,
            "label": self.labels,
            "ref_logps": self.reference,
            "ref_KL_logps": self.mismatched.sums.detach() - self.kl,
        }

    training = True

    def __call__(self, *, input_ids: torch.Tensor, **inputs):
        return (self.mismatched if input_ids is self.inputs["KL_input_ids"] else self.policy)(**inputs)

    def theirs(self, *, accelerator=ACCELERATOR, **options) -> tuple[torch.Tensor, float]:
        """Their loss and the estimate of the KL that they used."""
        trainer = stand_in_trainer(loss_type="kto", calculate_KL=True, **options)
        trainer.accelerator = accelerator
        trainer._compute_kl_logps = partial(trl.KTOTrainer._compute_kl_logps, trainer)
        loss = trl.KTOTrainer._compute_loss(trainer, self, self.inputs, return_outputs=False)
        return loss, trainer._metrics["train"]["kl"][0]


@pytest.mark.parametrize("kl", [1.5, -0.8])
@pytest.mark.parametrize("labels", [[True, False, False, True, True, False, True], [True] * 3, [False] * 4])
def test_kto(labels, kl):
    """They clamp the mean over the batch's mismatched answers; ours takes that mean, clamped or not."""
    answers = Answers(labels, kl=kl)
    weights = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    theirs, their_kl = answers.theirs(**weights)
    assert their_kl == pytest.approx(max(0.0, kl), abs=1e-5)
    for estimate in (answers.kl.mean(), their_kl):
        loss_N = losses.kto(answers.policy.sums, answers.reference, answers.labels, estimate, **weights)
        assert loss_N.shape == (len(labels),)
        assert_same_value_and_gradient(loss_N.sum() / len(labels), theirs, answers.policy.logp)


def test_kto_over_two_ranks_clamps_after_the_reduction_and_differs_in_what_is_averaged():
    """They average the ranks' means; a global mean weights each rank by its answers, here 5 and 2 of them."""
    answers = Answers([True, False, False, True, True], kl=1.5)
    other_mean, other_count = -0.9, 2
    gathered = iter([lambda mean: torch.stack([mean, torch.tensor(other_mean)])])
    accelerator = SimpleNamespace(
        device=ACCELERATOR.device,
        gather=ACCELERATOR.gather,
        gather_for_metrics=lambda x: next(gathered, lambda unchanged: unchanged)(x),
    )
    weights = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    theirs, their_kl = answers.theirs(accelerator=accelerator, **weights)
    assert their_kl == pytest.approx((1.5 - 0.9) / 2, abs=1e-5)
    ours = losses.kto(answers.policy.sums, answers.reference, answers.labels, their_kl, **weights)
    assert_same_value_and_gradient(ours.sum() / 5, theirs, answers.policy.logp)
    global_mean = (answers.kl.sum() + other_mean * other_count) / (5 + other_count)
    assert global_mean.item() == pytest.approx((5 * 1.5 - 2 * 0.9) / 7, abs=1e-5)
    globally = losses.kto(answers.policy.sums, answers.reference, answers.labels, global_mean, **weights)
    assert abs(globally.sum() / 5 - theirs) > 1e-4
