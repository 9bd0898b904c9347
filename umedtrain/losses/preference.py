"""Losses on pairs of answers. Pure functions of sequence log-probabilities.

Shape suffix: P pairs. A sequence's log-probability is the fp32 sum over its answer's tokens, terminator included.
"""

import torch
import torch.nn.functional as F


def dpo(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    reference_chosen_P: torch.Tensor,
    reference_rejected_P: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), per pair, fp32 [P].

        h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))
        loss = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)

    e is `label_smoothing`: the probability that a pair is labelled the wrong way round (cDPO; Mitchell 2023, "A note
    on DPO with noisy preferences"). With the policy equal to the reference the loss is ln 2. Divide the sum by the
    number of pairs of the whole optimizer step.

    Raises:
        ValueError: unless beta > 0 and 0 <= label_smoothing < 0.5.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    h_P = (policy_chosen_P - reference_chosen_P) - (policy_rejected_P - reference_rejected_P)
    return -(1 - label_smoothing) * F.logsigmoid(beta * h_P) - label_smoothing * F.logsigmoid(-beta * h_P)
