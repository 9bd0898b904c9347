"""Sampling from a model: many prompts, n samples each."""

from umedtrain.sampling.params import Output, SamplingParams
from umedtrain.sampling.sampler import Sampler

__all__ = ["Output", "Sampler", "SamplingParams"]
