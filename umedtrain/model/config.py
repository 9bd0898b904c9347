"""The shape of a Llama model, and the shapes that have names."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's frequency-dependent stretching of RoPE (``rope_type: llama3`` in a checkpoint's config).

    Wavelengths longer than ``original_max_position_embeddings / low_freq_factor`` tokens are stretched by
    ``factor``, those shorter than ``original_max_position_embeddings / high_freq_factor`` are kept, and those
    between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if getattr(self, name) <= 0:
                raise ValueError(f"rope_scaling.{name} must be positive, got {getattr(self, name)}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor ({self.high_freq_factor}) must exceed "
                f"rope_scaling.low_freq_factor ({self.low_freq_factor})"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """Everything that decides the shapes and the arithmetic of a Llama; field names are Hugging Face's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta"
        )
        for name in sizes.split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @property
    def num_parameters(self) -> int:
        """Number of weights of the language model (tied weights counted once)."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + self.hidden_size


_LLAMA31_ROPE = RopeScaling(8.0, 1.0, 4.0, 8192)
_LLAMA32_ROPE = RopeScaling(32.0, 1.0, 4.0, 8192)


def _llama3(hidden: int, ffn: int, layers: int, heads: int, head_dim: int, **kwargs: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        **kwargs,
    )


def _small(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    """A model for laptops; its vocabulary is set to the tokenizer's when it is built."""
    return LlamaConfig(
        vocab_size=1536,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        # Llama's 0.02 is 1.3 / sqrt(4096); at these widths it leaves attention flat for the first half million tokens.
        initializer_range=hidden**-0.5,
    )


# Shapes only: a checkpoint's own config.json always wins over a preset.
PRESETS: dict[str, LlamaConfig] = {
    "half-m": _small(128, 352, 2, 4, 2),
    "1m": _small(128, 352, 4, 4, 2),
    "5m": _small(256, 704, 6, 4, 2),
    "20m": _small(448, 1216, 8, 7, 7),
    "llama3.2-1b": _llama3(
        2048,
        8192,
        16,
        32,
        64,
        rope_scaling=_LLAMA32_ROPE,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
    ),
    "llama3.2-3b": _llama3(
        3072,
        8192,
        28,
        24,
        128,
        rope_scaling=_LLAMA32_ROPE,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
    ),
    "llama3-8b": _llama3(4096, 14_336, 32, 32, 128),
    "llama3.1-8b": _llama3(4096, 14_336, 32, 32, 128, rope_scaling=_LLAMA31_ROPE, max_position_embeddings=131_072),
    "llama3-70b": _llama3(8192, 28_672, 80, 64, 128),
    "llama3.1-70b": _llama3(8192, 28_672, 80, 64, 128, rope_scaling=_LLAMA31_ROPE, max_position_embeddings=131_072),
}
