"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) in the half-split layout, with Llama-3.1's scaling.

Shape suffixes: T tokens, H heads (G of keys), K head dimension, F = K / 2 frequencies.
"""

import math

import torch

from umedtrain.model.config import LlamaConfig, RopeScaling
from umedtrain.model.fused import kernels_for


def rope_frequencies(config: LlamaConfig, *, device: torch.device | str | None = None) -> torch.Tensor:
    """Angular frequency per token of each rotated pair, fp32 [F]: theta^(-2i / K), scaled if the config says so."""
    exponents_F = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies_F = 1.0 / config.rope_theta**exponents_F
    return frequencies_F if config.rope_scaling is None else _scale(frequencies_F, config.rope_scaling)


def _scale(frequencies_F: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama-3.1's rule: stretch long wavelengths by `factor`, keep short ones, interpolate between."""
    wavelengths_F = 2 * math.pi / frequencies_F
    turns_F = scaling.original_max_position_embeddings / wavelengths_F
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep_F = ((turns_F - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return frequencies_F * (keep_F + (1.0 - keep_F) / scaling.factor)


def rope_tables(frequencies_F: torch.Tensor, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, fp32 [T, 1, F], of every token's rotation angles (the angle is formed in fp32)."""
    angles_T1F = positions_T[:, None, None].float() * frequencies_F
    return angles_T1F.cos(), angles_T1F.sin()


def rotate(
    q_THK: torch.Tensor, k_TGK: torch.Tensor, cos_T1F: torch.Tensor, sin_T1F: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys rotated by `apply_rope`; on a GPU both at once, with one rounding where it has three."""
    if kernels := kernels_for(q_THK):
        # The tables are rounded as in `apply_rope`: every device, and FSDP, which casts them, turns by the same angles.
        return kernels.rope(q_THK, k_TGK, cos_T1F[:, 0].to(q_THK.dtype), sin_T1F[:, 0].to(q_THK.dtype))
    return apply_rope(q_THK, cos_T1F, sin_T1F), apply_rope(k_TGK, cos_T1F, sin_T1F)


def apply_rope(x_THK: torch.Tensor, cos_T1F: torch.Tensor, sin_T1F: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + F]) of every head; the result has the dtype of `x_THK`."""
    left, right = x_THK.chunk(2, dim=-1)
    cos, sin = cos_T1F.to(x_THK.dtype), sin_T1F.to(x_THK.dtype)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
