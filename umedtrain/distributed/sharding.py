"""Sharded models: FSDP2 around every layer, weights filled shard by shard, gathered tensor by tensor.

The order is stated once, in `shard_model`: activation checkpointing, then FSDP. Gradients are *summed* over ranks: the
loop divides the loss by the global count, so an average over ranks would be a second, wrong division.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from umedtrain.model.heads import RewardModel
from umedtrain.model.llama import Block, Llama


def shard_model(
    model: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype, activation_checkpointing: bool = False
) -> None:
    """Shard a Llama or RewardModel, usually still on the meta device, over `mesh` in place.

    Parameters stay fp32; they are gathered in `dtype` layer by layer, and gradients are reduced in fp32. The root
    unit (embedding, last norm, output projection) stays gathered between forward and backward, so that
    `token_logprobs` can use `lm_head_weight` for all of its chunks without gathering it again.

    A single rank that computes in fp32 has nothing to gather, cast or sum: its model stays as it is, for FSDP would
    keep a second copy of the weights that it uses.

    Args:
        mesh: with dimensions (replicate, shard), from `World.mesh`.
        dtype: of forward and backward.
        activation_checkpointing: recompute each layer in the backward pass.
    """
    backbone = model.model if isinstance(model, RewardModel) else model
    assert isinstance(backbone, Llama)
    if activation_checkpointing:
        for layer in backbone.layers:
            checkpoint_layer(layer)
    if mesh.size() == 1 and dtype == torch.float32:
        return
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in backbone.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    if isinstance(model, RewardModel):
        # The head must see fp32 weights, so it is a unit of its own.
        fully_shard(model.score, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Neither setter reaches into submodules. Gloo has no pre-multiplied sum, hence the second line.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Give back what forward passes without a backward pass left gathered.

    The root unit stays gathered until a backward pass ends; until then `model.parameters()` are not the sharded ones,
    and an optimizer built on them would train copies.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def checkpoint_layer(layer: Block) -> None:
    """Recompute `layer` in the backward pass instead of keeping its activations.

    Replacing `forward` keeps the module, its parameter names and the hooks around it (FSDP's gathering) as they are.
    """
    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@torch.no_grad()
def fill_model(model: nn.Module, tensor: Callable[[str, torch.Size], torch.Tensor], device: torch.device) -> None:
    """Give every parameter of a (sharded or plain) meta-device model storage on `device` and its value.

    Args:
        tensor: returns the whole tensor of a name and shape, on the CPU. It may be a memory-mapped view: of a
            sharded parameter only this rank's rows are read.
    """
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        full = tensor(name, parameter.shape)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(local_shard(full, parameter) if isinstance(parameter, DTensor) else full)


def local_shard(full: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    """The part of `full` that this rank holds of `parameter`; empty when there are more ranks than rows."""
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():
            chunks = full.chunk(parameter.device_mesh.size(dim), dim=placement.dim)
            rank = parameter.device_mesh.get_local_rank(dim)
            full = chunks[rank] if rank < len(chunks) else full.narrow(placement.dim, 0, 0)
    return full


def copy_sharded(model: Llama | RewardModel, mesh: DeviceMesh, *, dtype: torch.dtype) -> Llama | RewardModel:
    """Another model with the weights that a sharded model has now, sharded over the same mesh."""
    with torch.device("meta"):
        copy = type(model)(model.config)
    shard_model(copy, mesh, dtype=dtype)
    copy.to_empty(device=next(model.parameters()).device)
    copy.load_state_dict(model.state_dict())
    return copy


@torch.no_grad()
def full_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter's name and whole value on the CPU, one at a time. Collective: all ranks must iterate."""
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        yield name, full.detach().cpu()


@torch.no_grad()
def gather_model(model: Llama | RewardModel, device: torch.device, *, dtype: torch.dtype) -> Llama | RewardModel:
    """A whole, unsharded copy of a sharded model on every rank, for sampling and scoring.

    Takes one copy of the model in `dtype` per rank. Collective: all ranks must call it. The copy does not follow
    later updates of the sharded model. It has the model's `eos_ids`, if there are any.
    """
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.to_empty(device=device).to(dtype)
    if isinstance(copy, RewardModel):
        copy.score.float()
    targets = dict(copy.named_parameters())
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        targets[name].copy_(full)
    copy.eos_ids = getattr(model, "eos_ids", ())
    return copy.requires_grad_(False).eval()
