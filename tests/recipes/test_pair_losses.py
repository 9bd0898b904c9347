"""Every loss of recipes/dpo.py, on a batch of pairs."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.runs import pairs, sharded
from umedtrain import losses
from umedtrain.data.batch import collate
from umedtrain.data.loader import Loader
from umedtrain.data.mismatched import mismatched_loader
from umedtrain.model.llama import Llama
from umedtrain.recipes.dpo import LossConfig, check_loss, pair_loss
from umedtrain.training.reference import frozen_reference, kl_estimate
from umedtrain.training.tasks import PreferenceTask, answer_lengths, answer_logprobs

WITH_REFERENCE = ("sigmoid", "robust", "ipo", "hinge", "nca", "kto")
WITHOUT = ("simpo", "orpo")


def model_of(tiny_config, seed):
    model = Llama(tiny_config)
    model.init_weights(seed=seed)
    for parameter in model.parameters():
        parameter.data *= 5
    return model


def paired_kto(chosen_P, rejected_P, reference_chosen_P, reference_rejected_P, *, beta):
    """Every answer by itself, a pair's two together as much as an answer is of all answers."""
    policy_N, reference_N = torch.cat([chosen_P, rejected_P]), torch.cat([reference_chosen_P, reference_rejected_P])
    good_N = torch.arange(len(policy_N)) < len(chosen_P)
    return losses.kto(policy_N, reference_N, good_N, 0.0, beta=beta) / 2


@pytest.mark.parametrize("name", [*WITH_REFERENCE, *WITHOUT])
def test_the_task_computes_the_loss_of_that_name(tiny_config, name):
    policy, reference = model_of(tiny_config, 1), model_of(tiny_config, 2)
    batch = collate(pairs(4))
    config = LossConfig(
        name, beta=0.7, label_smoothing=0.1, gamma=0.3, reference="none" if name in WITHOUT else "model"
    )
    frozen = None if name in WITHOUT else frozen_reference(reference, chunk_bytes=2**20)
    total, metrics = PreferenceTask(pair_loss(config), frozen, beta=0.7)(policy, batch)

    with torch.no_grad():
        ours, theirs = (answer_logprobs(model, batch, chunk_bytes=2**20) for model in (policy, reference))
    lengths = answer_lengths(batch)
    assert lengths.tolist() == [len(s.tokens) for example in pairs(4) for s in example.segments[1:]]
    named = {"sigmoid": losses.dpo, "robust": losses.robust_dpo, "kto": paired_kto}
    function = named.get(name) or getattr(losses, name)
    inputs = [ours[0::2], ours[1::2]]
    inputs += [] if name in WITHOUT else [theirs[0::2], theirs[1::2]]
    inputs += [lengths[0::2], lengths[1::2]] if name in ("ipo", *WITHOUT) else []
    settings = {"beta": 0.7}
    settings |= {"label_smoothing": 0.1} if name in ("sigmoid", "robust") else {}
    settings |= {"gamma": 0.3} if name == "simpo" else {}
    torch.testing.assert_close(total, function(*inputs, **settings).sum())
    rewards = 0.7 * (ours - (0 if name in WITHOUT else theirs))
    torch.testing.assert_close(metrics["reward_chosen"], rewards[0::2].sum())
    total.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


@pytest.mark.parametrize("name", [*WITH_REFERENCE, *WITHOUT])
def test_a_batch_without_examples_keeps_every_parameter_connected(tiny_config, name):
    policy = model_of(tiny_config, 1)
    config = LossConfig(name, reference="none" if name in WITHOUT else "model")
    frozen = None if name in WITHOUT else frozen_reference(model_of(tiny_config, 2), chunk_bytes=2**20)
    total, _ = PreferenceTask(pair_loss(config), frozen)(policy, collate([]))
    total.backward()
    assert float(total.detach()) == 0.0
    assert all(float(parameter.grad.abs().sum()) == 0.0 for parameter in policy.parameters())


@pytest.mark.parametrize(
    "name, reference, wanted",
    [("sigmoid", "none", "cache or model"), ("simpo", "cache", "none"), ("orpo", "model", "none")],
)
def test_a_loss_and_a_reference_that_do_not_go_together_are_refused(name, reference, wanted):
    with pytest.raises(ValueError) as error:
        pair_loss(LossConfig(name, reference=reference))
    assert str(error.value) == f"dpo.reference is '{reference}'; with dpo.loss '{name}' it must be {wanted}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LossConfig(beta=0.0), "dpo.beta must be positive and finite, got 0.0"),
        (LossConfig("kto", beta=-1.0), "dpo.beta must be positive and finite, got -1.0"),
        (LossConfig("kto", undesirable_weight=-1.0), "dpo.undesirable_weight must be at least 0 and finite, got -1.0"),
        (LossConfig("robust", label_smoothing=0.5), "dpo.label_smoothing must be in [0, 0.5), got 0.5"),
        (LossConfig(nll=-0.1), "dpo.nll must be 0 or a positive number, got -0.1"),
    ],
)
def test_settings_out_of_range_are_named(config, message):
    with pytest.raises(ValueError) as error:
        check_loss(config)
    assert str(error.value) == message


def estimate_on(world, max_tokens):
    """Estimates for the steps of an epoch and the first of the next; the loss with the first of them."""
    loader = Loader([pairs(9)], batch_size=4, max_tokens=max_tokens, seed=3, rank=world.rank, num_ranks=world.size)
    policy, reference = (sharded(Llama, world, seed=seed) for seed in (1, 2))
    frozen = frozen_reference(reference, chunk_bytes=2**20)
    estimate = kl_estimate(mismatched_loader(loader), frozen, world, chunk_bytes=2**20)
    task = PreferenceTask(pair_loss(LossConfig("kto", beta=0.5)), frozen, beta=0.5, estimate_kl=estimate)
    task = task.at_step(policy, 0)
    loss, metrics = 0.0, 0.0
    for batch in loader.batch(0):
        value, sums = task(policy, batch)
        loss, metrics = loss + float(value.detach()), metrics + float(sums["kl"])
    return [estimate(policy, step) for step in range(4)], *world.sum([loss, metrics])


def test_the_kl_of_a_step_is_one_number_however_it_is_dealt_out(world):
    values, loss, logged = estimate_on(world, 1000)
    assert values[3] == values[0] != values[1], "three steps, and again from the first"
    assert logged == pytest.approx(4 * values[0])
    for other in (estimate_on(world, 22), *run_ranks(2, estimate_on, 22)):
        assert other[0] == pytest.approx(values, abs=1e-5)
        assert other[1:] == pytest.approx((loss, logged), abs=1e-4)

    # By hand: the mean over the step's prompts with another prompt's answer; kl = 0 is another loss if kl > 0.
    loader = Loader([pairs(9)], batch_size=4, max_tokens=1000, seed=3)
    policy, reference = (sharded(Llama, world, seed=seed) for seed in (1, 2))
    (batch,) = mismatched_loader(loader).batch(0)
    with torch.no_grad():
        ours, theirs = (answer_logprobs(model, batch, chunk_bytes=2**20) for model in (policy, reference))
        (batch,) = loader.batch(0)
        policy_A, reference_A = (answer_logprobs(model, batch, chunk_bytes=2**20) for model in (policy, reference))
    assert values[0] == pytest.approx(float((ours - theirs).mean()), abs=1e-5)
    good_A = torch.tensor([True, False] * 4)
    by_hand = losses.kto(policy_A, reference_A, good_A, values[0], beta=0.5).sum() / 2
    assert loss == pytest.approx(float(by_hand), abs=1e-4)
