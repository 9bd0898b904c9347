"""Llama 2 and 3 as plain PyTorch modules over a packed stream of tokens.

The model knows nothing of batches, padding or parallelism: it maps a flat stream of tokens and the layout that cuts it
into segments to hidden states. On a GPU, norms, rotations, the MLP's product and attention are Triton kernels
(`umedtrain.model.fused`). Parameter names are Hugging Face's without the leading `model.`.

Shape suffixes: T tokens, D hidden size, F intermediate size, H query heads, G key-value heads, K head dimension,
V vocabulary.
"""

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from umedtrain.model.attention import attention
from umedtrain.model.config import LlamaConfig
from umedtrain.model.fused import kernels_for
from umedtrain.model.layout import Layout
from umedtrain.model.rope import rope_frequencies, rope_tables, rotate

Rotation = tuple[torch.Tensor, torch.Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019, arXiv 1910.07467), normalised in fp32, result in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if kernels := kernels_for(x_TD):
            return kernels.rms_norm(x_TD, self.weight, self.eps, casting="hf")
        return F.rms_norm(x_TD.float(), (x_TD.shape[-1],), eps=self.eps).to(x_TD.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; no biases."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor, rotation: Rotation, layout: Layout) -> torch.Tensor:
        q_THK = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TGK = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TGK = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q_THK, k_TGK = rotate(q_THK, k_TGK, *rotation)
        return self.o_proj(attention(q_THK, k_TGK, v_TGK, layout).flatten(1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = self.gate_proj(x_TD), self.up_proj(x_TD)
        if kernels := kernels_for(x_TD):
            return self.down_proj(kernels.swiglu(gate_TF, up_TF, casting="hf"))
        return self.down_proj(F.silu(gate_TF) * up_TF)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TD: torch.Tensor, rotation: Rotation, layout: Layout) -> torch.Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotation, layout)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Llama(nn.Module):
    """A Llama language model over packed streams.

    `model(tokens_T, layout)` returns the hidden states after the final norm; logits are made only where a caller
    wants them, by `logits` or, without ever holding [T, V], by `umedtrain.token_logprobs`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """[V, D]: the output projection, which is the embedding itself when the two are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens_T: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Hidden states [T, D] of int64 tokens [T]."""
        if tokens_T.shape != (layout.num_tokens,):
            raise ValueError(f"tokens_T has shape {tuple(tokens_T.shape)}, the layout has {layout.num_tokens} tokens")
        # Recomputed every time (a few microseconds) so that no buffer has to survive meta-device construction,
        # casting or sharding: the angles are always formed in fp32.
        rotation = rope_tables(rope_frequencies(self.config, device=tokens_T.device), layout.positions_T)
        x_TD = self.embed_tokens(tokens_T)
        for layer in self.layers:
            x_TD = layer(x_TD, rotation, layout)
        return self.norm(x_TD)

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits [T, V] of hidden states, in the dtype of the weights."""
        return F.linear(hidden_TD, self.lm_head_weight)

    @torch.no_grad()
    def init_weights(self, *, seed: int) -> None:
        """Fill every parameter with `initial_weight`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, self.config, seed=seed))


def initial_weight(name: str, shape: Sequence[int], config: LlamaConfig, *, seed: int) -> torch.Tensor:
    """The fresh value, fp32 on the CPU, of one parameter: a pure function of its name, its shape and the seed.

    Norms are ones, the rest normals of standard deviation `initializer_range`. Projections into the residual stream
    are scaled down by sqrt(2 * layers) (GPT-2's rule), so that the stream's variance does not grow with depth. A
    reward head, `score.weight`, has standard deviation 1 / sqrt(D + 1) (Stiennon et al. 2020, arXiv 2009.01325).
    """
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.initializer_range
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= (2 * config.num_hidden_layers) ** 0.5
    elif name == "score.weight":
        std = (config.hidden_size + 1) ** -0.5
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(tuple(shape), generator=generator) * std
