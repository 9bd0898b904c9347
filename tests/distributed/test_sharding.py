"""Sharded models on 1, 2 and 4 gloo ranks against the plain model in one process."""

import functools

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.runs import whole
from umedtrain.losses import token_logprobs
from umedtrain.model.config import LlamaConfig
from umedtrain.model.heads import RewardModel
from umedtrain.model.layout import Layout
from umedtrain.model.llama import Llama, initial_weight

TREE = Layout.tree([(6, None), (3, 0), (3, 0)])


def config(kind):
    return LlamaConfig(101, 32, 64, 2, 4, 2, 8, tie_word_embeddings=kind == "tied")


def stream():
    return torch.randint(101, (4, 12), generator=torch.Generator().manual_seed(3))


def loss_of(model, tokens, kind):
    if kind == "reward":
        rewards = model(tokens, TREE)
        return rewards[0] - rewards[1]
    hidden = model(tokens, Layout.packed([12]))
    return -token_logprobs(hidden[:-1], model.lm_head_weight, tokens[1:]).sum()


def sharded(world, kind, dtype, checkpointing, shard):
    from umedtrain.distributed.sharding import fill_model, full_tensors, gather_model, shard_model

    with torch.device("meta"):
        model = (RewardModel if kind == "reward" else Llama)(config(kind))
    shard_model(model, world.mesh(shard), dtype=getattr(torch, dtype), activation_checkpointing=checkpointing)
    fill_model(model, lambda name, size: initial_weight(name, size, config(kind), seed=1), world.device)
    for tokens in stream()[world.rank :: world.size]:
        (loss_of(model, tokens, kind) / 4).backward()
    grads = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    weights = dict(full_tensors(model))
    copy = gather_model(model, world.device, dtype=torch.float32)
    assert all(torch.equal(weights[name], parameter) for name, parameter in copy.named_parameters())
    return grads, weights


@functools.cache
def plain(kind):
    model = (RewardModel if kind == "reward" else Llama)(config(kind))
    model.init_weights(seed=1)
    for tokens in stream():
        (loss_of(model, tokens, kind) / 4).backward()
    return {n: p.grad for n, p in model.named_parameters()}, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("num_ranks", "kind", "dtype", "checkpointing", "shard"),
    [
        (1, "untied", "float32", False, 0),
        (2, "tied", "float32", True, 0),
        (2, "reward", "float32", False, 0),
        (2, "untied", "bfloat16", True, 0),
        (4, "untied", "float32", False, 2),
    ],
)
def test_gradients_are_summed_over_ranks(num_ranks, kind, dtype, checkpointing, shard):
    results = run_ranks(num_ranks, sharded, kind, dtype, checkpointing, shard)
    grads, weights = plain(kind)
    tolerance = 3e-2 if dtype == "bfloat16" else 1e-5
    for rank_grads, rank_weights in results:
        for name in grads:
            assert torch.equal(rank_weights[name], weights[name])
            assert rank_grads[name].dtype == torch.float32
            error = (rank_grads[name] - grads[name]).norm() / grads[name].norm()
            assert error < tolerance, name


def refused_mesh(world):
    with pytest.raises(ValueError, match=r"parallel\.shard = 2 does not divide the 1 processes"):
        world.mesh(2)
    return world.sum([1.5, 2.0])


def test_a_world_that_does_not_divide_is_refused():
    assert run_ranks(1, refused_mesh) == [[1.5, 2.0]]


def samples_while_training(world):
    """Sample from the sharded model, train a step, sample again, train again."""
    from umedtrain.distributed.sharding import fill_model, full_tensors, gather_model, shard_model
    from umedtrain.sampling import Sampler, SamplingParams

    with torch.device("meta"):
        model = Llama(config("untied"))
    shard_model(model, world.mesh(0), dtype=torch.float32)
    fill_model(model, lambda name, size: 9 * initial_weight(name, size, config("untied"), seed=1), world.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    params = SamplingParams(max_tokens=12, temperature=1.0, n=3, seed=4)
    rounds = []
    for tokens in stream()[:2]:
        copy = gather_model(model, world.device, dtype=torch.float32)
        outputs = Sampler(copy, eos_ids=()).generate([[5, 6, 7], [8]], params)
        rounds.append([[sample.tokens for sample in of_prompt] for of_prompt in outputs])
        # Every rank computes the same loss, and gradients are summed over ranks.
        (loss_of(model, tokens, "untied") / (12 * world.size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return rounds, dict(full_tensors(model))


def test_a_live_sharded_model_is_sampled_from_between_steps():
    alone = run_ranks(1, samples_while_training)[0]
    for rounds, weights in run_ranks(2, samples_while_training):
        assert rounds == alone[0]
        assert rounds[0] != rounds[1]
        for name, value in weights.items():
            torch.testing.assert_close(value, alone[1][name], rtol=1e-4, atol=1e-5)
