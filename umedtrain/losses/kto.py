"""KTO: answers that are judged good or bad, one by one. Pure functions of sequence log-probabilities.

Shape suffixes: N answers, P pairs. As in `preference`: log-probabilities are fp32 sums over an answer's tokens,
terminator included, and losses are not averaged.
"""

import math

import torch

from umedtrain.losses.preference import check_beta, check_shapes


def kto(
    policy_N: torch.Tensor,
    reference_N: torch.Tensor,
    desirable_N: torch.Tensor,
    kl: torch.Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7), per answer, fp32 [N].

        rho = log pi(y) - log ref(y)                z = max(0, kl)
        loss = w_D (1 - sigmoid(beta (rho - z)))    where desirable
        loss = w_U (1 - sigmoid(beta (z - rho)))    elsewhere

    z receives no gradient. With the policy equal to the reference and kl = 0 the loss is w / 2. Divide the sum by the
    number of answers of the whole optimizer step.

    Args:
        policy_N: log-probabilities of the answers.
        reference_N: the reference's.
        desirable_N: bool, whether the answer is a good one. A rank may hold only good or only bad ones.
        kl: the mean of rho over prompts with *another* prompt's answer, which estimates KL(pi || ref). One number for
            the whole optimizer step: sum rho and count over all ranks, then divide. It is clamped here, after that;
            a mean of values that ranks clamped on their own is too large. (TRL averages the ranks' means, which is
            the same while ranks hold equally many.)
        desirable_weight: the paper's lambda_D.
        undesirable_weight: the paper's lambda_U. With n_D good and n_U bad answers, the paper (eq. 8) wants
            lambda_D n_D / (lambda_U n_U) between 1 and 4/3.

    Raises:
        ValueError: unless beta > 0 and the weights are not negative; for shapes that differ, labels that are not bool,
            or a `kl` that is not one number.
    """
    check_beta(beta)
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
    check_shapes(policy_N=policy_N, reference_N=reference_N, desirable_N=desirable_N)
    if desirable_N.dtype != torch.bool:
        raise ValueError(f"desirable_N must be bool, got {desirable_N.dtype}")
    above_N = policy_N - reference_N - _reference_point(kl, "kl", policy_N).detach()
    # 1 - sigmoid(x) is written sigmoid(-x), which does not cancel.
    desirable_loss_N = desirable_weight * torch.sigmoid(-beta * above_N)
    undesirable_loss_N = undesirable_weight * torch.sigmoid(beta * above_N)
    return torch.where(desirable_N, desirable_loss_N, undesirable_loss_N)


def kto_pair(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    reference_chosen_P: torch.Tensor,
    reference_rejected_P: torch.Tensor,
    chosen_kl: torch.Tensor | float,
    rejected_kl: torch.Tensor | float,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    """KTO on pairs, with each side's KL estimated from the other side's answers, per pair, fp32 [P].

        z_c = max(0, chosen_kl)        z_r = max(0, rejected_kl)
        loss = 1/2 (1 - sigmoid(beta (rho(chosen) - z_r))) + 1/2 (1 - sigmoid(beta (z_c - rho(rejected))))

    This is `loss_type="kto_pair"` of TRL's DPOTrainer before 0.9.5, after eq. 7 of the HALOs technical report
    ("Human-Centered Loss Functions", Contextual AI 2023). KTO's authors withdrew it in favour of `kto` (TRL's pull
    request 1734); UltraMedical's training configurations name it. TRL listed the two halves one after the other and
    averaged over both; here each pair's two halves are averaged, which gives the same mean over pairs. With the
    policy equal to the reference and both estimates 0 the loss is 1/2.

    Args:
        chosen_kl: the mean of rho over the chosen answers of the whole optimizer step, over all ranks; clamped here.
            TRL took it over the micro-batch and let gradient through. A tensor that carries a graph does the same
            here; detach it, or give a number, for an estimate that is constant as the paper wants it.
        rejected_kl: the same of the rejected answers.

    Raises:
        ValueError: unless beta > 0; for log-probabilities of different shapes, or an estimate that is not one number.
    """
    check_beta(beta)
    check_shapes(
        policy_chosen_P=policy_chosen_P,
        policy_rejected_P=policy_rejected_P,
        reference_chosen_P=reference_chosen_P,
        reference_rejected_P=reference_rejected_P,
    )
    z_c = _reference_point(chosen_kl, "chosen_kl", policy_chosen_P)
    z_r = _reference_point(rejected_kl, "rejected_kl", policy_chosen_P)
    chosen_loss_P = torch.sigmoid(-beta * (policy_chosen_P - reference_chosen_P - z_r))
    rejected_loss_P = torch.sigmoid(beta * (policy_rejected_P - reference_rejected_P - z_c))
    return 0.5 * chosen_loss_P + 0.5 * rejected_loss_P


def _reference_point(kl: torch.Tensor | float, name: str, like: torch.Tensor) -> torch.Tensor:
    """max(0, kl) as a tensor of no dimension."""
    kl = torch.as_tensor(kl, dtype=like.dtype, device=like.device)
    if kl.ndim != 0:
        raise ValueError(f"{name} must be one number for the whole step, got shape {tuple(kl.shape)}")
    return kl.clamp(min=0)
