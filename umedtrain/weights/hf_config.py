"""config.json of a Hugging Face Llama <-> LlamaConfig."""

from pathlib import Path
from typing import Any

from umedtrain.model.config import LlamaConfig, RopeScaling
from umedtrain.weights.checkpoint import CheckpointError

LANGUAGE_MODEL, REWARD_MODEL = "LlamaForCausalLM", "LlamaForSequenceClassification"

# What transformers takes for a key that config.json leaves out.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_from_hf(raw: dict[str, Any], file: Path) -> tuple[LlamaConfig, bool]:
    """The config, and whether it is a reward model's, of the content of `file`.

    Understands `rope_scaling` beside `rope_theta` (transformers 4) and `rope_parameters` (transformers 5).

    Raises:
        CheckpointError: naming the file and the key, for anything that would make the model compute something
            else than this implementation does.
    """
    is_reward_model = _is_reward_model(raw, file)
    _refuse_unsupported(raw, file)
    rope_theta, scaling = _rope(raw, file)

    def integer(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{file}: {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{file}: {key} must be a whole number, got {value!r}")
        return value

    heads, hidden_size = integer("num_attention_heads"), integer("hidden_size")
    if raw.get("head_dim") is None and (heads < 1 or hidden_size % heads):
        raise CheckpointError(
            f"{file}: hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({heads}), and "
            "head_dim is not given"
        )
    try:
        config = LlamaConfig(
            vocab_size=integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=integer("intermediate_size"),
            num_hidden_layers=integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=integer("num_key_value_heads", heads),
            head_dim=integer("head_dim", hidden_size // heads),
            rms_norm_eps=_number(raw, "rms_norm_eps", file),
            rope_theta=rope_theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=integer("max_position_embeddings", _DEFAULTS["max_position_embeddings"]),
            initializer_range=_number(raw, "initializer_range", file),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return config, is_reward_model


def config_to_hf(config: LlamaConfig, is_reward_model: bool) -> dict[str, Any]:
    """The model's part of a config.json, in the layout that transformers 4.43 and later read."""
    raw: dict[str, Any] = {
        "architectures": [REWARD_MODEL if is_reward_model else LANGUAGE_MODEL],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    if config.rope_scaling is not None:
        fields = {key: getattr(config.rope_scaling, key) for key in _LLAMA3_FIELDS}
        raw["rope_scaling"] = {"rope_type": "llama3", **fields}
    if is_reward_model:
        # transformers derives num_labels from the number of names here.
        raw |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return raw


def _is_reward_model(raw: dict[str, Any], file: Path) -> bool:
    if raw.get("model_type") != "llama":
        raise CheckpointError(f"{file}: model_type is {raw.get('model_type')!r}, only 'llama' is implemented")
    architectures = raw.get("architectures") or [LANGUAGE_MODEL]
    if architectures not in ([LANGUAGE_MODEL], [REWARD_MODEL]):
        raise CheckpointError(
            f"{file}: architectures is {architectures}, only {LANGUAGE_MODEL} and {REWARD_MODEL} are implemented"
        )
    return architectures == [REWARD_MODEL]


def _refuse_unsupported(raw: dict[str, Any], file: Path) -> None:
    wanted = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}
    for key, value in wanted.items():
        if raw.get(key, value) != value:
            got = "an object" if isinstance(raw[key], dict) else repr(raw[key])
            raise CheckpointError(f"{file}: {key} is {got}, only {value!r} is implemented")


def _rope(raw: dict[str, Any], file: Path) -> tuple[float, RopeScaling | None]:
    key = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    rope = raw.get(key)
    if rope is None:
        return _number(raw, "rope_theta", file), None
    if not isinstance(rope, dict):
        raise CheckpointError(f"{file}: {key} must be an object, got {rope!r}")
    rope_theta = _number({"rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}, "rope_theta", file)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{file}: {key}.partial_rotary_factor other than 1 is not implemented")
    if kind == "default":
        return rope_theta, None
    if kind != "llama3":
        raise CheckpointError(f"{file}: {key} has rope_type {kind!r}, only 'default' and 'llama3' are implemented")
    values = []
    for field in _LLAMA3_FIELDS:
        if not isinstance(rope.get(field), int | float):
            raise CheckpointError(f"{file}: {key}.{field} must be a number, got {rope.get(field)!r}")
        values.append(rope[field])
    try:
        return rope_theta, RopeScaling(*values)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _number(raw: dict[str, Any], key: str, file: Path) -> float:
    value = raw.get(key)
    value = _DEFAULTS[key] if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{file}: {key} must be a number, got {value!r}")
    return float(value)
