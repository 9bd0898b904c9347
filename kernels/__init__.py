"""Fused kernels for training and sampling Llama-3, in Triton, each with a twin in plain PyTorch.

    from umedtrain.kernels import rms_norm
    y_TD = rms_norm(x_TD, weight_D, 1e-5)

A function runs its Triton kernel on GPU tensors and its twin on all others; `impl="triton"` or `impl="torch"`, or the
environment variable UMEDTRAIN_KERNELS, override that. All are differentiable where that makes sense, operators for
`torch.compile`, and repeatable bit for bit. This package needs PyTorch and Triton only, nothing else of umedtrain.
`umedtrain.kernels.offline` proves the kernels without a GPU.
"""

from umedtrain.kernels._dispatch import use_triton
from umedtrain.kernels.adamw import adamw_step
from umedtrain.kernels.attention import attention
from umedtrain.kernels.attention_plan import AttentionPlan, attention_plan
from umedtrain.kernels.cross_entropy import cross_entropy
from umedtrain.kernels.grad_norm import clip_factor, grad_norm
from umedtrain.kernels.linear_loss import LinearLogprobs, linear_cross_entropy, linear_logprobs
from umedtrain.kernels.norm import add_rms_norm, rms_norm
from umedtrain.kernels.optimizer import AdamW
from umedtrain.kernels.paged_attention import paged_attention
from umedtrain.kernels.patch import patch_llama, unpatch_llama
from umedtrain.kernels.quantized import QuantizedWeight, quantize_int4, quantize_int8, quantized_linear
from umedtrain.kernels.rope import rope, rope_frequencies, rope_tables
from umedtrain.kernels.sampling import Sampled, sample
from umedtrain.kernels.swiglu import swiglu, swiglu_down

__all__ = [
    "AdamW",
    "AttentionPlan",
    "LinearLogprobs",
    "QuantizedWeight",
    "Sampled",
    "adamw_step",
    "add_rms_norm",
    "attention",
    "attention_plan",
    "clip_factor",
    "cross_entropy",
    "grad_norm",
    "linear_cross_entropy",
    "linear_logprobs",
    "paged_attention",
    "patch_llama",
    "quantize_int4",
    "quantize_int8",
    "quantized_linear",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_tables",
    "sample",
    "swiglu",
    "swiglu_down",
    "unpatch_llama",
    "use_triton",
]
