"""Reading a Hugging Face directory: config.json and one or many safetensors files, memory-mapped."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from umedtrain.weights.checkpoint import Checkpoint, CheckpointError, check_shapes, expected_shapes, read_json
from umedtrain.weights.hf_config import config_from_hf

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"

_FLOATS = ("F64", "F32", "F16", "BF16")


def open_huggingface(path: Path) -> Checkpoint:
    """Open a directory with config.json and safetensors files; reads only their headers.

    Raises:
        CheckpointError: naming the file and tensor or key, for everything that does not fit.
    """
    file = path / "config.json"
    raw = read_json(file)
    config, is_reward_model = config_from_hf(raw, file)
    shards = _open_shards(path)
    expected = expected_shapes(config, is_reward_model)
    hf_name = {name: to_hf_name(name, is_reward_model) for name in expected}
    found = {}
    for name, (shard_file, shard) in shards.items():
        if name.endswith(".rotary_emb.inv_freq"):  # old exports hold this constant, which is computed here
            continue
        header = shard.get_slice(name)
        if header.get_dtype() not in _FLOATS:
            raise CheckpointError(
                f"{shard_file}: tensor {name} has dtype {header.get_dtype()}; quantised weights are not implemented"
            )
        found[name] = tuple(header.get_shape())
    if config.tie_word_embeddings and found.pop("lm_head.weight", None) is not None:
        _check_tied(shards)
    wanted = {hf_name[name]: shape for name, shape in expected.items()}
    check_shapes(path, wanted, found, lambda name: f"{shards[name][0]}: {name}")

    def read(name: str) -> torch.Tensor:
        shard_file, shard = shards[hf_name[name]]
        try:
            return shard.get_tensor(hf_name[name])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard_file}: tensor {name} cannot be read ({error})") from error

    generation_file = path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    # The two files disagree in many published checkpoints; every id that either calls an end is one.
    eos_ids = _ids(generation, "eos_token_id", generation_file) + _ids(raw, "eos_token_id", file)
    return Checkpoint(
        path=path,
        config=config,
        is_reward_model=is_reward_model,
        names=tuple(expected),
        read=read,
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        bos_id=next(iter(_ids(raw, "bos_token_id", file)), None),
        pad_id=next(iter(_ids(raw, "pad_token_id", file)), None),
    )


def to_hf_name(name: str, is_reward_model: bool) -> str:
    """Hugging Face's name of our parameter: their language model holds a backbone `model`, ours is one."""
    return name if is_reward_model or name == "lm_head.weight" else f"model.{name}"


def _open_shards(path: Path) -> dict[str, tuple[Path, Any]]:
    """File and handle of every tensor, by Hugging Face's name."""
    if (path / INDEX_FILE).exists():
        return _open_indexed(path)
    if not (path / SINGLE_FILE).exists():
        hint = ""
        if any(path.glob("pytorch_model*.bin")):
            hint = "; pytorch_model*.bin files are not read: save the model with safetensors first"
        raise CheckpointError(f"{path}: neither {INDEX_FILE} nor {SINGLE_FILE} is there{hint}")
    shard = _open_shard(path / SINGLE_FILE)
    return {name: (path / SINGLE_FILE, shard) for name in shard.keys()}  # noqa: SIM118 (not a dict)


def _open_indexed(path: Path) -> dict[str, tuple[Path, Any]]:
    index = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path / INDEX_FILE}: weight_map is missing or empty")
    opened = {}
    for name, file_name in index.items():
        if file_name not in opened:
            if not (path / str(file_name)).exists():
                raise CheckpointError(
                    f"{path / str(file_name)}: no such shard, but {INDEX_FILE} says that it holds {name}"
                )
            opened[file_name] = _open_shard(path / file_name)
    shards = {}
    for file_name, shard in opened.items():
        for name in shard.keys():  # noqa: SIM118 (not a dict)
            if name in shards:
                raise CheckpointError(f"{path / file_name}: tensor {name} is also in {shards[name][0].name}")
            shards[name] = (path / file_name, shard)
    for name, file_name in index.items():
        if name not in shards:
            raise CheckpointError(f"{path / file_name}: tensor {name} is missing, though {INDEX_FILE} lists it")
    return shards


def _open_shard(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: damaged or incomplete safetensors file ({error}); copy or download it again"
        ) from error


def _check_tied(shards: dict[str, tuple[Path, Any]]) -> None:
    """Some exports of tied models repeat the embedding as lm_head: fine as long as it is the same."""
    embedding = shards.get("model.embed_tokens.weight")
    if embedding is None:
        return  # reported as missing
    file, shard = shards["lm_head.weight"]
    if not torch.equal(shard.get_tensor("lm_head.weight"), embedding[1].get_tensor("model.embed_tokens.weight")):
        raise CheckpointError(
            f"{file}: lm_head.weight differs from model.embed_tokens.weight, but config.json says that they are tied"
        )


def _ids(raw: dict[str, Any], key: str, file: Path) -> list[int]:
    value = raw.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) for item in ids):
        raise CheckpointError(f"{file}: {key} must be an id or a list of ids, got {value!r}")
    return ids
