"""umedtrain: post-training for Llama-3 on plain PyTorch.

Importing this package touches no GPU and no optional dependency.
"""

from umedtrain import losses
from umedtrain.losses import token_logprobs
from umedtrain.model.config import PRESETS, LlamaConfig, RopeScaling
from umedtrain.model.heads import RewardModel
from umedtrain.model.layout import Layout
from umedtrain.model.llama import Llama
from umedtrain.sampling import Sampler, SamplingParams
from umedtrain.text.chat import render_chat
from umedtrain.text.tokenizer import load_tokenizer
from umedtrain.weights import load_model, save_model

__all__ = [
    "PRESETS",
    "Layout",
    "Llama",
    "LlamaConfig",
    "RewardModel",
    "RopeScaling",
    "Sampler",
    "SamplingParams",
    "load_model",
    "load_tokenizer",
    "losses",
    "render_chat",
    "save_model",
    "token_logprobs",
]
