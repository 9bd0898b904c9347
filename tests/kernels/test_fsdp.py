"""Modules built of these kernels under FSDP2: two gloo ranks get the gradients of one process."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.ranks import run_ranks

ROWS, HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 4, 24, 3, 8, 40, 11
RUNS = [
    ("torch", torch.float32, False),
    ("triton", torch.float32, False),
    ("triton", torch.float32, True),
    ("triton", torch.bfloat16, False),
]
"""Implementation, dtype of the gathered parameters, activation checkpointing."""


class Layer(nn.Module):
    """A Llama layer without attention: norm, q and k rotated, their product as a gate, norm, MLP."""

    def __init__(self, impl):
        super().__init__()
        self.impl = impl
        self.first_norm = nn.Parameter(torch.ones(HIDDEN))
        self.second_norm = nn.Parameter(torch.ones(HIDDEN))
        self.qk = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=False)
        self.down = nn.Parameter(torch.empty(HIDDEN, INTERMEDIATE))

    def forward(self, x_TD, cos_TF, sin_TF):
        from umedtrain.kernels.norm import add_rms_norm, rms_norm
        from umedtrain.kernels.rope import rope
        from umedtrain.kernels.swiglu import swiglu, swiglu_down

        normed_TD = rms_norm(x_TD, self.first_norm, 1e-5, impl=self.impl)
        q_THK, k_THK = self.qk(normed_TD).unflatten(-1, (2 * HEADS, HEAD_DIM)).chunk(2, dim=1)
        q_THK, k_THK = rope(q_THK, k_THK, cos_TF, sin_TF, impl=self.impl)
        mixed_TD = swiglu(q_THK.flatten(1), k_THK.flatten(1), impl=self.impl)
        normed_TD, x_TD = add_rms_norm(mixed_TD, x_TD, self.second_norm, 1e-5, impl=self.impl)
        gate_TF, up_TF = self.gate_up(normed_TD).chunk(2, dim=-1)
        return x_TD + swiglu_down(gate_TF, up_TF, self.down, impl=self.impl)


class Head(nn.Module):
    """Both ways from hidden states to a loss, through one weight."""

    def __init__(self, impl):
        super().__init__()
        self.impl = impl
        self.weight = nn.Parameter(torch.empty(VOCAB, HIDDEN))

    def forward(self, x_TD, targets_T, weights_T):
        from umedtrain.kernels.cross_entropy import cross_entropy
        from umedtrain.kernels.linear_loss import linear_cross_entropy

        loss_T = cross_entropy(x_TD @ self.weight.T, targets_T, impl=self.impl)
        fused = linear_cross_entropy(x_TD, self.weight, targets_T, weights_T, impl=self.impl)
        return (loss_T * weights_T).sum() + 2 * fused


def build(impl):
    model = nn.ModuleList([Layer(impl), Layer(impl), Head(impl)])
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if parameter.ndim == 1 else 0.3 * noise
    return model


def batch(ranks):
    """Rows, and random weights for the loss, of each rank."""
    generator = torch.Generator().manual_seed(6)
    return torch.randn(2, ranks, ROWS, HIDDEN, generator=generator)


def loss_of(model, rows_TD, weights_TD, dtype):
    from umedtrain.kernels.rope import rope_frequencies, rope_tables

    tables = rope_tables(rope_frequencies(HEAD_DIM, 10000.0), torch.arange(ROWS) * 7)
    x_TD = rows_TD.to(dtype)
    *layers, head = model
    for layer in layers:
        x_TD = layer(x_TD, *tables)
    return (x_TD.float() * weights_TD).sum() + head(x_TD, torch.tensor([3, -100, 0, 10]), weights_TD[:, 0])


def sharded_gradients(world, impl, dtype, checkpointing):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from umedtrain.kernels.offline import interpreter

    interpreter.install()
    model = build(impl)
    # By default FSDP casts all that a layer is called with, the fp32 tables of the rotation too.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model:
        if checkpointing:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        fully_shard(layer, mesh=world.mesh(0), mp_policy=policy, reshard_after_forward=True)
    rows, weights = batch(world.size)[:, world.rank]
    loss_of(model, rows, weights, dtype).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def all_sharded_gradients(world):
    return [sharded_gradients(world, *run) for run in RUNS]


def plain_gradients(dtype):
    """The mean over the ranks' batches, in one process; computed in `dtype`, averaged in fp32."""
    model, grads = build("torch").to(dtype), {}
    for rows, weights in zip(*batch(2), strict=True):
        loss_of(model, rows, weights, dtype).backward()
        for name, parameter in model.named_parameters():
            grads[name] = grads.get(name, 0) + parameter.grad.float() / 2
            parameter.grad = None
    return grads


def test_gradients_are_the_mean_over_ranks():
    for of_rank in run_ranks(2, all_sharded_gradients):
        for (_, dtype, _), grads in zip(RUNS, of_rank, strict=True):
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
            for name, want in plain_gradients(dtype).items():
                assert grads[name].dtype == torch.float32
                assert (grads[name] - want).norm() < tolerance * want.norm(), (name, dtype)
