"""Every loss of recipes/dpo.py, on a batch of pairs."""

import pytest
import torch

from tests.training.runs import pairs
from umedtrain import losses
from umedtrain.data.batch import collate
from umedtrain.model.llama import Llama
from umedtrain.recipes.dpo import LossConfig, pair_loss
from umedtrain.training.reference import frozen_reference
from umedtrain.training.tasks import PreferenceTask, answer_lengths, answer_logprobs

WITH_REFERENCE = ("sigmoid", "robust", "ipo", "hinge", "nca")
WITHOUT = ("simpo", "orpo")


def model_of(tiny_config, seed):
    model = Llama(tiny_config)
    model.init_weights(seed=seed)
    for parameter in model.parameters():
        parameter.data *= 5
    return model


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
    function = {"sigmoid": losses.dpo, "robust": losses.robust_dpo}.get(name) or getattr(losses, name)
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
