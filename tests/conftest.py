"""Settings for all tests."""

import os

import pytest
import torch

# Whatever imports Triton first decides whether kernels are compiled or, as tests/kernels wants, interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")

from umedtrain.distributed.world import finalize, initialize
from umedtrain.model.config import LlamaConfig, RopeScaling


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Two threads on a busy two-core machine are far slower than one.
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world():
    """This process as the only rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MASTER_ADDR", raising=False)
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        yield initialize()
        finalize()


@pytest.fixture
def tiny_config() -> LlamaConfig:
    """Grouped queries, untied, with a RoPE scaling that acts within a few tokens."""
    return LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16),
    )
