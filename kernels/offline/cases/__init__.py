"""Launches at the shapes of real models, for compiling without a GPU: one file for each file of kernels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of one model and of the stream that it sees."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tokens: int


LLAMA_8B = LlamaShape("8b", 4096, 14336, 32, 8, 128, 128256, 8192)
LLAMA_70B = LlamaShape("70b", 8192, 28672, 64, 8, 128, 128256, 8192)
