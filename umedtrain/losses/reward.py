"""Losses of reward models. Shape suffix: P pairs."""

import torch
import torch.nn.functional as F


def bradley_terry(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(r(chosen) - r(rejected)), per pair, fp32 [P] (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1).

    Divide the sum by the number of pairs of the whole optimizer step.
    """
    return -F.logsigmoid(chosen_P.float() - rejected_P.float())
