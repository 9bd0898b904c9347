"""Losses: pure functions on small tensors."""

from umedtrain.losses.kto import kto, kto_pair
from umedtrain.losses.logprobs import token_cross_entropy, token_logprobs
from umedtrain.losses.preference import dpo, hinge, ipo, nca, odds_ratio, orpo, robust_dpo, simpo
from umedtrain.losses.reward import bradley_terry, centering
from umedtrain.losses.sft import sft

__all__ = [
    "bradley_terry",
    "centering",
    "dpo",
    "hinge",
    "ipo",
    "kto",
    "kto_pair",
    "nca",
    "odds_ratio",
    "orpo",
    "robust_dpo",
    "sft",
    "simpo",
    "token_cross_entropy",
    "token_logprobs",
]
