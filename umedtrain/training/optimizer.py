"""AdamW with decay groups, and the course of the learning rate."""

import math

import torch
from torch import nn

from umedtrain.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of a (sharded or plain) model; norms, being vectors, are not decayed.

    Raises:
        ValueError: for a learning rate, decay or ratio out of range.
    """
    if not config.lr > 0:
        raise ValueError(f"optimizer.lr must be positive, got {config.lr}")
    if config.weight_decay < 0:
        raise ValueError(f"optimizer.weight_decay must not be negative, got {config.weight_decay}")
    for name in ("warmup_ratio", "min_lr_ratio"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"optimizer.{name} must be between 0 and 1, got {getattr(config, name)}")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of `num_steps`: a pure function, so nothing to save.

    Linear warm-up to the peak, which is reached at the last warm-up step, then the schedule down to `min_lr_ratio`
    of the peak, which would be reached at step `num_steps`.
    """
    warmup_steps = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if config.schedule == "constant":
        share = 1.0
    elif config.schedule == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)
