"""Losses of reward models. Shape suffix: P pairs.

Each gives one value per pair and averages nothing: divide the sum by the number of pairs of the whole optimizer step.
"""

import torch
import torch.nn.functional as F


def bradley_terry(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, margin_P: torch.Tensor | None = None
) -> torch.Tensor:
    """-log sigmoid(r(chosen) - r(rejected) - margin), per pair, fp32 [P].

    Without margins the loss of Bradley and Terry (1952) that Ouyang et al. use (2022, arXiv 2203.02155, eq. 1). A
    margin asks for that much more between the rewards of answers that differ more (Touvron et al. 2023, arXiv
    2307.09288, eq. 2).
    """
    difference_P = chosen_P.float() - rejected_P.float()
    return -F.logsigmoid(difference_P if margin_P is None else difference_P - margin_P.float())


def centering(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> torch.Tensor:
    """(r(chosen) + r(rejected))^2, per pair, fp32 [P]; added to the loss with a small weight such as 0.01.

    `bradley_terry` sees differences only, so that rewards are known up to a constant for each prompt. This term makes
    a pair's rewards lie around 0 (Eisenstein et al. 2023, arXiv 2312.09244).
    """
    return (chosen_P.float() + rejected_P.float()).square()
