"""Losses: pure functions on small tensors."""

from umedtrain.losses.logprobs import token_logprobs
from umedtrain.losses.preference import dpo
from umedtrain.losses.reward import bradley_terry
from umedtrain.losses.sft import sft

__all__ = ["bradley_terry", "dpo", "sft", "token_logprobs"]
