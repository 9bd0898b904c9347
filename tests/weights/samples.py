"""Small random models and checkpoints for the tests of this folder."""

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from umedtrain.model.config import LlamaConfig
from umedtrain.model.heads import RewardModel
from umedtrain.model.llama import Llama

TINY = LlamaConfig(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)


def random_model(kind: type = Llama, *, seed: int = 0, **changes) -> Llama | RewardModel:
    model = kind(dataclasses.replace(TINY, **changes))
    model.init_weights(seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, so that no two tensors are alike
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return model


def assert_same_parameters(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    theirs = dict(wanted.named_parameters())
    assert dict(found.named_parameters()).keys() == theirs.keys()
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def edit_safetensors(file: Path, edit) -> None:
    """Rewrite a file after `edit(tensors)` changed the dictionary in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
