"""Supervised fine-tuning."""

import torch


def sft(logp_N: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """Summed negative log-likelihood -sum(w * logp), fp32 scalar.

    Divide it by the number of targets of the whole optimizer step, over all ranks and micro-batches.
    """
    return -(logp_N if weights_N is None else logp_N * weights_N).sum()
