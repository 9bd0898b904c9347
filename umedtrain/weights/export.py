"""Writing a Hugging Face directory, tensor by tensor: whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from umedtrain.model.config import LlamaConfig
from umedtrain.model.heads import RewardModel
from umedtrain.model.llama import Llama
from umedtrain.weights.checkpoint import check_shapes, expected_shapes
from umedtrain.weights.hf_config import config_to_hf
from umedtrain.weights.huggingface import INDEX_FILE, SINGLE_FILE, to_hf_name

if TYPE_CHECKING:
    from umedtrain.text.tokenizer import Tokenizer

NamedTensors = Iterable[tuple[str, torch.Tensor]]

# Recognises, in config.json, a directory that may be replaced by a newer export.
_MARK = {"written_by": "umedtrain"}
# Tokens that never occur in text, in order of preference. The end of a turn must not serve as padding: code
# that finds a sequence's last token by "not the pad id" would then look at the wrong place.
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_250|>", "<pad>", "[PAD]")


def save_model(
    model: Llama | RewardModel,
    path: str | Path,
    *,
    tokenizer: "Tokenizer | None" = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a whole (unsharded) model, on any device, as a Hugging Face directory; see `save_stream`."""
    stream = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    save_stream(
        model.config,
        isinstance(model, RewardModel),
        stream,
        path,
        tokenizer=tokenizer,
        dtype=dtype,
        eos_ids=getattr(model, "eos_ids", ()),
    )


def save_stream(
    config: LlamaConfig,
    is_reward_model: bool,
    named_tensors: NamedTensors,
    path: str | Path,
    *,
    tokenizer: "Tokenizer | None" = None,
    extra_files: Sequence[Path] = (),
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    eos_ids: tuple[int, ...] = (),
    bos_id: int | None = None,
    pad_id: int | None = None,
) -> None:
    """Write a stream of parameters as a directory that `transformers` and the libraries around it load.

    Everything is written into `.NAME.partial` beside `path`, which is renamed when complete. Never more than
    `max_shard_bytes` of tensors are held in memory, or one tensor if that is larger. An earlier export at
    `path` is replaced, and only once the new one is complete.

    Args:
        is_reward_model: write `LlamaForSequenceClassification` with one label instead of `LlamaForCausalLM`.
        named_tensors: our names (`Llama` or `RewardModel`) and whole tensors, each once, in any order.
        path: the directory to write. It may exist if it is empty or an earlier export.
        tokenizer: written too, with its chat template; also decides the BOS, EOS and padding ids.
        extra_files: copied into the directory as they are.
        dtype: of the written tensors, default that of each; a reward head is always written in fp32.
        max_shard_bytes: size of a safetensors file, at most (but at least one tensor).
        eos_ids, bos_id, pad_id: special ids for a model without a tokenizer, or beyond what it knows.

    Raises:
        ValueError: when the tensors are not exactly those of such a model, or `path` holds something else.
        OSError: when the disk is full or not writable; what was at `path` is untouched.
    """
    target = Path(path)
    check_target(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        stream = _checked(config, is_reward_model, named_tensors, target)
        if dtype is not None:
            stream = ((n, t if n == "score.weight" else t.to(dtype)) for n, t in stream)
        stream = ((n, t.float() if n == "score.weight" else t) for n, t in stream)
        stored = _write_shards(stream, is_reward_model, partial, max_shard_bytes)
        ids = _special_ids(tokenizer, eos_ids, bos_id, pad_id)
        raw = config_to_hf(config, is_reward_model) | ids | _MARK
        raw["torch_dtype"] = str(stored).removeprefix("torch.")
        _write_json(partial / "config.json", raw)
        _write_json(partial / "generation_config.json", ids)
        if tokenizer is not None:
            from umedtrain.text.export import save_tokenizer

            save_tokenizer(tokenizer, partial)
        for file in extra_files:
            shutil.copyfile(file, partial / file.name)
        _replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_target(target: Path) -> None:
    """Refuse, before any work, to write where something else than an earlier export stands."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        ours = json.loads((target / "config.json").read_text(encoding="utf-8"))["written_by"] == "umedtrain"
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ValueError(f"{target} exists and was not written by umedtrain; name another directory or remove it first")


def _checked(
    config: LlamaConfig, is_reward_model: bool, named_tensors: NamedTensors, target: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream itself; raises at its end if it was not exactly the model's parameters."""
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in named_tensors:
        if name in found:
            raise ValueError(f"{target}: tensor {name} was given twice")
        found[name] = tuple(tensor.shape)
        yield name, tensor
    check_shapes(target, expected_shapes(config, is_reward_model), found, lambda name: f"{target}: {name}")


def _write_shards(stream: NamedTensors, is_reward_model: bool, directory: Path, max_shard_bytes: int) -> torch.dtype:
    """Write the safetensors files and their index; returns the dtype that most of the weights have."""
    shards: list[dict[str, int]] = []  # name -> bytes, of each file written
    sizes: dict[torch.dtype, int] = {}
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if pending:
            shards.append({name: tensor.nbytes for name, tensor in pending.items()})
            _save_file(pending, directory / f"shard-{len(shards)}")
            pending.clear()

    for name, tensor in stream:
        if sum(t.nbytes for t in pending.values()) + tensor.nbytes > max_shard_bytes:
            flush()
        # A view of a larger storage would be refused: take its own bytes.
        pending[to_hf_name(name, is_reward_model)] = tensor.cpu().contiguous()
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    flush()
    _name_shards(shards, directory)
    return max(sizes, key=lambda dtype: sizes[dtype])


def _name_shards(shards: list[dict[str, int]], directory: Path) -> None:
    """Give the files their names, which hold the number of files; write the index if there are several."""
    count = len(shards)
    if count == 1:
        (directory / "shard-1").rename(directory / SINGLE_FILE)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{count:05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(sum(names.values()) for names in shards)
    _write_json(
        directory / INDEX_FILE,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _save_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.parent}: weights could not be written ({error})") from error
    file.chmod(0o666 & ~_umask())  # the library writes files that only their owner can read


def _special_ids(
    tokenizer: "Tokenizer | None", eos_ids: tuple[int, ...], bos_id: int | None, pad_id: int | None
) -> dict[str, Any]:
    if tokenizer is not None:
        eos_ids = tuple(dict.fromkeys((*tokenizer.eos_ids, *eos_ids)))
        bos_id = tokenizer.bos_id if tokenizer.bos_id is not None else bos_id
        if pad_id is None:
            candidates = (tokenizer.special_id(name) for name in _PAD_TOKENS)
            pad_id = next((candidate for candidate in candidates if candidate is not None), None)
    if pad_id in eos_ids:
        pad_id = None
    ids = {"bos_token_id": bos_id, "eos_token_id": list(eos_ids) or None, "pad_token_id": pad_id}
    # bos and eos are written even when unknown: transformers would otherwise fill in Llama-2's.
    return {key: value for key, value in ids.items() if value is not None or key != "pad_token_id"}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _replace(partial: Path, target: Path) -> None:
    """Rename the complete directory to its place; for a moment an earlier export stands at `.NAME.old`."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
