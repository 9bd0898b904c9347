"""Opening a checkpoint of any known format, and loading it into a module."""

from pathlib import Path

import torch

from umedtrain.model.heads import RewardModel
from umedtrain.model.llama import Llama
from umedtrain.weights.checkpoint import Checkpoint, CheckpointError
from umedtrain.weights.huggingface import open_huggingface


def open_checkpoint(path: str | Path, *, rope_factor: float | None = None) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        path: a Hugging Face directory (config.json, safetensors), a directory of Meta's release (params.json,
            consolidated.*.pth), or a .gguf file (needs `pip install 'umedtrain[gguf]'`).
        rope_factor: for Meta's format only, see `umedtrain.weights.meta.open_meta`.

    Raises:
        CheckpointError: naming the file, and the key or the tensor (with its shapes) that does not fit.
    """
    path = Path(path)
    if rope_factor is not None and (path.is_file() or (path / "config.json").exists()):
        raise CheckpointError(f"{path} says itself how its RoPE is scaled; leave out rope_factor")
    if path.suffix == ".gguf" and path.is_file():
        from umedtrain.weights.gguf import open_gguf

        return open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory or .gguf file")
    if (path / "config.json").exists():
        return open_huggingface(path)
    if (path / "params.json").exists():
        from umedtrain.weights.meta import open_meta

        return open_meta(path, rope_factor=rope_factor)
    raise CheckpointError(
        f"{path}: not a checkpoint: neither config.json (Hugging Face) nor params.json (Meta) is there"
    )


@torch.no_grad()
def load_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Llama | RewardModel:
    """Load a language model or, from a `LlamaForSequenceClassification` checkpoint, a reward model.

    The model is built without storage and filled tensor by tensor: at no time are there two copies of it.

    Args:
        path: anything that `open_checkpoint` opens.
        dtype: of the weights; a reward head stays fp32.
        device: where the weights go.

    Returns:
        The model, with an attribute `eos_ids`: ids that end a turn or document according to the checkpoint.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = (RewardModel if checkpoint.is_reward_model else Llama)(checkpoint.config)
    model.to(dtype)
    if isinstance(model, RewardModel):
        model.score.float()
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.copy_(checkpoint.tensor(name))
    model.eos_ids = checkpoint.eos_ids
    return model
