"""A checkpoint as a lazy stream of named tensors, whatever format its files have."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from umedtrain.model.config import LlamaConfig
from umedtrain.model.heads import RewardModel
from umedtrain.model.llama import Llama


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, not a Llama, or does not fit its own config."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config now, its tensors on demand.

    Presence, names and shapes of all tensors were checked against `config` when the checkpoint was opened.

    Attributes:
        path: the directory or file that was opened.
        config: shape and arithmetic of the model.
        is_reward_model: the tensors are those of a `RewardModel` (`score.weight` among them), not a `Llama`.
        names: our parameter names, in the order of the model.
        eos_ids: ids that end a turn or document according to the checkpoint itself; may be empty.
        bos_id: id that starts a document according to the checkpoint itself.
        pad_id: padding id of the checkpoint itself. Nothing here pads; it is kept for readers of an export.
        read: a name's tensor; use `tensor`.
    """

    path: Path
    config: LlamaConfig
    is_reward_model: bool
    names: tuple[str, ...]
    read: Callable[[str], torch.Tensor]
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of a parameter, on the CPU, in the dtype of the file.

        Where the format allows (safetensors; a single file of Meta's, but for q and k) it is a view of the
        memory-mapped file: a slice of it reads only what it covers. Do not write to it.

        To start a `RewardModel` from a language model's checkpoint, ask for each backbone parameter without
        its leading `model.`, and make `score.weight` yourself: the checkpoint has none.

        Raises:
            CheckpointError: for a name that the checkpoint does not have, or a file that cannot be read.
        """
        if name not in self.names:
            kind = "reward model" if self.is_reward_model else "language model"
            raise CheckpointError(f"{self.path}: the {kind} checkpoint has no tensor {name!r}")
        return self.read(name)


def expected_shapes(config: LlamaConfig, is_reward_model: bool) -> dict[str, tuple[int, ...]]:
    """Our name and shape of every parameter that such a model has."""
    with torch.device("meta"):
        model = RewardModel(config) if is_reward_model else Llama(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def half_split_rows(weight_ED: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a q or k projection from the interleaved RoPE order to ours.

    Meta's and GGUF's Llamas rotate the pairs (2i, 2i + 1) of a head, ours and Hugging Face's the pairs
    (i, i + head_dim / 2): the same model with its rows renumbered.

    Shape suffixes: E rows (heads * head_dim), D hidden size.
    """
    pairs_HF2D = weight_ED.unflatten(0, (-1, head_dim // 2, 2))
    return pairs_HF2D.transpose(1, 2).flatten(0, 2)


def check_shapes(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: Callable[[str], str],
) -> None:
    """Raise one CheckpointError for the first missing, unexpected or misshapen tensor, and count the others.

    Names are those of the file.

    Args:
        where: file and name, for people, of a tensor that is in `found`.
    """
    problems = [f"{path}: tensor {name} is missing" for name in expected if name not in found]
    problems += [f"{where(name)}: unexpected tensor" for name in found if name not in expected]
    problems += [
        f"{where(name)}: shape {list(found[name])} found, {list(shape)} wanted by the config"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise CheckpointError(problems[0] + more)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        CheckpointError: when there is no such file, or it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file; is {file.parent} a checkpoint directory?") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, a JSON object is wanted")
    return content
