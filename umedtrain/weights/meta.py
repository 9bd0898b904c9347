"""Reading Meta's own releases: params.json and consolidated.*.pth, one file per tensor-parallel rank."""

from pathlib import Path
from typing import Any

import torch

from umedtrain.model.config import LlamaConfig, RopeScaling
from umedtrain.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_shapes,
    expected_shapes,
    half_split_rows,
    read_json,
)

Shards = list[tuple[Path, dict[str, torch.Tensor]]]

# Our names within a layer -> Meta's.
_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_REFUSED = ("quantization_args", "lora_args", "vision_model", "moe_args")
# The constants of Meta's `apply_scaling` besides the factor (llama-models, models/llama3/model.py).
_LOW_FREQUENCY, _HIGH_FREQUENCY, _ORIGINAL_LENGTH, _LLAMA31_FACTOR = 1.0, 4.0, 8192, 8.0


def open_meta(path: Path, *, rope_factor: float | None = None) -> Checkpoint:
    """Open a directory of Meta's release; shards are memory-mapped, and merged tensor by tensor when read.

    params.json does not say everything:

    - The feed-forward size is taken from the tensors, and so is the vocabulary when params.json has -1.
    - Without `rope_theta` it is 10,000, as in Llama 2, whose code had it fixed.
    - `use_scaled_rope` does not come with its factor. Meta's code uses 8 for every model, and Llama 3.1 and
      3.3 are published with 8 everywhere; Llama 3.2 1B and 3B are published with 32 by Hugging Face. These
      two are the only ones with tied embeddings, so for a tied model the factor must be given: as
      `rope_factor`, or as "rope_scaling_factor" in params.json. Others get 8 when neither is given.
    - Embeddings count as tied when `output.weight` is absent or equal to `tok_embeddings.weight`.
    - `max_position_embeddings`, which changes no result, is 131,072 with scaled RoPE, 4096 without
      `rope_theta` (Llama 2), else 8192.

    Raises:
        CheckpointError: naming the file, and the tensor or key, that is missing, damaged or does not fit.
    """
    file = path / "params.json"
    params = read_json(file)
    for key in _REFUSED:
        if params.get(key):
            raise CheckpointError(f"{file}: {key} is not implemented; only plain text models are")
    shards = _load_shards(path)
    merged = _merged_shapes(shards, _integer(params, "dim", file))
    config = _config(params, merged, _is_tied(shards), rope_factor, file)
    expected = expected_shapes(config, is_reward_model=False)
    meta_names = _meta_names(config.num_hidden_layers)
    wanted = {meta_names[name]: shape for name, shape in expected.items()}
    if config.tie_word_embeddings:
        merged.pop("output.weight", None)
    files = shards[0][0] if len(shards) == 1 else path / "consolidated.*.pth"
    check_shapes(path, wanted, merged, lambda name: f"{files}: {name}")
    return Checkpoint(
        path=path,
        config=config,
        is_reward_model=False,
        names=tuple(expected),
        read=lambda name: _read(shards, config, name, meta_names[name]),
    )


def _read(shards: Shards, config: LlamaConfig, name: str, meta_name: str) -> torch.Tensor:
    pieces = [shard[meta_name] for _, shard in shards]
    dim = _split_dim(meta_name, tuple(pieces[0].shape), config.hidden_size)
    tensor = pieces[0] if dim is None or len(pieces) == 1 else torch.cat(pieces, dim=dim)
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        return half_split_rows(tensor, config.head_dim)
    return tensor


def _load_shards(path: Path) -> Shards:
    files = sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(f"{path}: params.json is there, but no consolidated.*.pth")
    for number, file in enumerate(files):
        if file.name != f"consolidated.{number:02d}.pth":
            raise CheckpointError(f"{path}: consolidated.{number:02d}.pth is missing, {file.name} is there")
    shards = [(file, _load_shard(file)) for file in files]
    for file, shard in shards:
        odd = shards[0][1].keys() ^ shard.keys()
        if odd:
            raise CheckpointError(f"{file}: holds other tensors than {files[0].name}, such as {min(odd)}")
    return shards


def _load_shard(file: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch.load raises whatever zip, pickle or mmap found wrong
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file}: damaged, incomplete or not a file of tensors ({reason}); copy or download it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{file}: a dictionary of tensors is wanted")
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{file}: tensor {name} has dtype {tensor.dtype}; quantised weights are not implemented"
            )
    state.pop("rope.freqs", None)  # a constant that Llama 2's files hold and that is computed here
    return state


def _merged_shapes(shards: Shards, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Meta's name and whole shape of every tensor."""
    shapes = {}
    for name, first in shards[0][1].items():
        shape = list(first.shape)
        dim = _split_dim(name, tuple(shape), hidden_size)
        for file, shard in shards[1:]:
            other = list(shard[name].shape)
            if len(other) != len(shape) or any(a != b for a, b in zip(other, first.shape, strict=True)):
                raise CheckpointError(
                    f"{file}: tensor {name} has shape {other}, but {list(first.shape)} in {shards[0][0].name}"
                )
            if dim is not None:
                shape[dim] += other[dim]
        shapes[name] = tuple(shape)
    return shapes


def _split_dim(meta_name: str, shape: tuple[int, ...], hidden_size: int) -> int | None:
    if len(shape) != 2:
        return None
    if meta_name == "tok_embeddings.weight":
        # Llama 3 splits the vocabulary, Llama 2 the width.
        return 0 if shape[1] == hidden_size else 1
    return 1 if meta_name.endswith(("attention.wo.weight", "feed_forward.w2.weight")) else 0


def _is_tied(shards: Shards) -> bool:
    if "output.weight" not in shards[0][1]:
        return True
    for _, shard in shards:
        embedding, output = shard.get("tok_embeddings.weight"), shard["output.weight"]
        # One row tells models apart without reading a gigabyte.
        if embedding is None or embedding.shape != output.shape or not torch.equal(embedding[0], output[0]):
            return False
    return all(torch.equal(shard["tok_embeddings.weight"], shard["output.weight"]) for _, shard in shards)


def _config(
    params: dict[str, Any],
    merged: dict[str, tuple[int, ...]],
    is_tied: bool,
    rope_factor: float | None,
    file: Path,
) -> LlamaConfig:
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in merged:
            raise CheckpointError(f"{file.parent}: tensor {name} is missing from consolidated.*.pth")
    dim, heads = _integer(params, "dim", file), _integer(params, "n_heads", file)
    if heads < 1 or dim % heads:
        raise CheckpointError(f"{file}: dim ({dim}) must be a multiple of n_heads ({heads})")
    vocab_size = _integer({"vocab_size": -1} | params, "vocab_size", file)
    scaled, is_llama2 = bool(params.get("use_scaled_rope")), "rope_theta" not in params
    try:
        return LlamaConfig(
            vocab_size=vocab_size if vocab_size > 0 else merged["tok_embeddings.weight"][0],
            hidden_size=dim,
            intermediate_size=merged["layers.0.feed_forward.w1.weight"][0],
            num_hidden_layers=_integer(params, "n_layers", file),
            num_attention_heads=heads,
            num_key_value_heads=heads if params.get("n_kv_heads") is None else _integer(params, "n_kv_heads", file),
            head_dim=dim // heads,
            rms_norm_eps=_number(params, "norm_eps", file),
            rope_theta=_number({"rope_theta": 10_000.0} | params, "rope_theta", file),
            rope_scaling=_rope_scaling(params, scaled, is_tied, rope_factor, file),
            tie_word_embeddings=is_tied,
            max_position_embeddings=131_072 if scaled else 4096 if is_llama2 else 8192,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _rope_scaling(
    params: dict[str, Any], scaled: bool, is_tied: bool, rope_factor: float | None, file: Path
) -> RopeScaling | None:
    factor = rope_factor
    if factor is None and params.get("rope_scaling_factor") is not None:
        factor = _number(params, "rope_scaling_factor", file)
    if not scaled:
        if factor is not None:
            raise CheckpointError(f"{file}: a RoPE factor of {factor} is given, but use_scaled_rope is not true")
        return None
    if factor is None:
        if is_tied:
            raise CheckpointError(
                f"{file}: use_scaled_rope is true and the embeddings are tied (as in Llama 3.2 1B and 3B), "
                'but the file does not say by which factor: add "rope_scaling_factor": 32.0 to it (Hugging '
                "Face's value for Llama 3.2; Meta's own code uses 8), or pass rope_factor"
            )
        factor = _LLAMA31_FACTOR
    return RopeScaling(float(factor), _LOW_FREQUENCY, _HIGH_FREQUENCY, _ORIGINAL_LENGTH)


def _meta_names(num_layers: int) -> dict[str, str]:
    """Our name of every parameter of a language model -> Meta's."""
    names = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}
    for layer in range(num_layers):
        names |= {f"layers.{layer}.{ours}": f"layers.{layer}.{theirs}" for ours, theirs in _LAYER.items()}
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()}


def _number(params: dict[str, Any], key: str, file: Path) -> float:
    value = params.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{file}: {key} must be a number, got {value!r}")
    return float(value)


def _integer(params: dict[str, Any], key: str, file: Path) -> int:
    value = params.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{file}: {key} must be a whole number, got {value!r}")
    return value
