"""config.json <-> LlamaConfig."""

import dataclasses
from pathlib import Path

import pytest

from tests.weights.samples import TINY
from umedtrain.model.config import PRESETS, RopeScaling
from umedtrain.weights import CheckpointError
from umedtrain.weights.hf_config import config_from_hf, config_to_hf

FILE = Path("some/config.json")
SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def raw(**changes) -> dict:
    content = config_to_hf(TINY, False) | changes
    return {key: value for key, value in content.items() if value is not ...}  # ... leaves a key out


@pytest.mark.parametrize("is_reward_model", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_there_and_back(preset, is_reward_model):
    assert config_from_hf(config_to_hf(PRESETS[preset], is_reward_model), FILE) == (
        PRESETS[preset],
        is_reward_model,
    )


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(rope_theta=1e4, rope_scaling=LLAMA3), dict(rope_theta=1e4, rope_scaling=SCALING)),
        (
            dict(rope_scaling={**LLAMA3, "type": "llama3", "rope_type": "llama3"}),
            dict(rope_scaling=SCALING),
        ),
        (
            dict(rope_scaling={("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()}),
            dict(rope_scaling=SCALING),
        ),
        (
            dict(rope_theta=..., rope_scaling=..., rope_parameters=LLAMA3 | {"rope_theta": 1e6}),
            dict(rope_theta=1e6, rope_scaling=SCALING),
        ),
        (
            dict(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 2e4}),
            dict(rope_theta=2e4, rope_scaling=None),
        ),
        # What transformers assumes for keys that old files leave out.
        (dict(rope_theta=..., rope_scaling=...), dict(rope_theta=1e4)),
        (dict(rms_norm_eps=...), dict(rms_norm_eps=1e-6)),
        (dict(max_position_embeddings=...), dict(max_position_embeddings=2048)),
        (dict(num_key_value_heads=...), dict(num_key_value_heads=4)),
        (dict(head_dim=...), dict(head_dim=4)),
        (dict(head_dim=None), dict(head_dim=4)),
        (dict(head_dim=6), dict(head_dim=6)),
        (dict(tie_word_embeddings=...), dict(tie_word_embeddings=False)),
        (dict(tie_word_embeddings=True), dict(tie_word_embeddings=True)),
        (dict(architectures=None), {}),
        (dict(attention_bias=..., mlp_bias=..., hidden_act=...), {}),
    ],
)
def test_what_other_writers_write(changes, expected):
    config, is_reward_model = config_from_hf(raw(**changes), FILE)
    assert config == dataclasses.replace(TINY, **expected)
    assert not is_reward_model


@pytest.mark.parametrize(
    "changes, problem",
    [
        (dict(model_type="mistral"), "model_type is 'mistral'"),
        (dict(model_type=...), "model_type is None"),
        (dict(architectures=["LlamaForTokenClassification"]), "architectures is"),
        (dict(attention_bias=True), "attention_bias is True, only False"),
        (dict(mlp_bias=True), "mlp_bias is True"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu', only 'silu'"),
        (dict(quantization_config={"bits": 4}), "quantization_config is an object"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling has rope_type 'linear'"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_type 'yarn'"),
        (dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}), "rope_parameters has rope_type"),
        (
            dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        ),
        (dict(rope_scaling=LLAMA3 | {"factor": None}), "rope_scaling.factor must be a number"),
        (dict(rope_scaling=LLAMA3 | {"factor": 0}), "rope_scaling.factor must be positive"),
        (dict(rope_scaling=LLAMA3 | {"high_freq_factor": 1.0}), "must exceed"),
        (dict(rope_scaling=[8.0]), "rope_scaling must be an object"),
        (dict(rope_theta="big"), "rope_theta must be a number, got 'big'"),
        (dict(rms_norm_eps=None, hidden_size=...), "hidden_size is missing"),
        (dict(vocab_size=...), "vocab_size is missing"),
        (dict(vocab_size="60"), "vocab_size must be a whole number, got '60'"),
        (dict(num_hidden_layers=2.0), "num_hidden_layers must be a whole number"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be positive"),
        (dict(num_attention_heads=3, head_dim=...), "not a multiple of num_attention_heads"),
        (dict(num_attention_heads=0, head_dim=...), "num_attention_heads"),
        (dict(num_key_value_heads=3), "must be a multiple of num_key_value_heads"),
        (dict(head_dim=5), "head_dim must be even"),
        (dict(initializer_range="x"), "initializer_range must be a number"),
    ],
)
def test_refusals_name_file_and_key(changes, problem):
    with pytest.raises(CheckpointError) as error:
        config_from_hf(raw(**changes), FILE)
    assert problem in str(error.value)
    assert str(error.value).startswith("some/config.json: ")
