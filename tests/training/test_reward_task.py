"""The reward model's loss and metrics against numbers computed pair by pair."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.training.runs import pairs
from umedtrain.data.batch import collate
from umedtrain.data.example import Example
from umedtrain.data.ranking import merge_pairs
from umedtrain.model.heads import RewardModel
from umedtrain.model.layout import Layout
from umedtrain.training.tasks import RewardTask


@pytest.fixture
def model(tiny_config) -> RewardModel:
    model = RewardModel(tiny_config)
    model.init_weights(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5
    return model


def examples() -> list[Example]:
    """Four pairs of prompts of their own, and one prompt with four answers in three pairs."""
    single = [dataclasses.replace(one, margins=(float(n),)) for n, one in enumerate(pairs(4))]
    prompt = pairs(1, seed=5)[0].segments[0]
    answers = [segment for one in pairs(2, seed=6) for segment in one.segments[1:]]
    several = [
        Example((prompt, answers[better], answers[worse]), pairs=((0, 1),), margins=(0.5,))
        for better, worse in ((0, 1), (0, 2), (3, 2))
    ]
    return merge_pairs([*single, *several], max_tokens=100)


@torch.no_grad()
def by_hand(model: RewardModel, given: list[Example]) -> dict[str, np.ndarray]:
    """A value for each pair: rewards, lengths, margin and weight."""
    rows = []
    for example in given:
        prompt, *answers = (torch.from_numpy(part.tokens).long() for part in example.segments)
        rewards = [float(model(torch.cat([prompt, a]), Layout.packed([len(prompt) + len(a)]))[0]) for a in answers]
        for (better, worse), margin in zip(example.pairs, example.margins, strict=True):
            lengths = len(answers[better]), len(answers[worse])
            rows.append((rewards[better], rewards[worse], *lengths, margin, 1 / len(example.pairs)))
    return dict(zip(("better", "worse", "l_better", "l_worse", "margin", "weight"), np.array(rows).T, strict=True))


@pytest.mark.parametrize(("scale", "center"), [(0.0, 0.0), (2.0, 0.0), (0.0, 0.3), (0.7, 0.1)])
def test_loss_by_hand(model, scale, center):
    batch = collate(examples())
    loss, sums = RewardTask(margin_scale=scale, center=center)(model, batch)
    rows = by_hand(model, examples())
    preference = np.log1p(np.exp(-(rows["better"] - rows["worse"] - scale * rows["margin"])))
    wanted = rows["weight"] @ (preference + center * (rows["better"] + rows["worse"]) ** 2)
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    assert float(sums["preference_loss"]) == pytest.approx(rows["weight"] @ preference, rel=1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_metrics_are_those_of_all_pairs_together_however_they_are_cut_up(model):
    given, task = examples(), RewardTask()
    rows = by_hand(model, given)
    shares = rows["weight"] / rows["weight"].sum()
    margin = rows["better"] - rows["worse"]

    def std(values, shares):
        return math.sqrt(shares @ values**2 - (shares @ values) ** 2)

    rewards, lengths = (np.concatenate([rows[a], rows[b]]) for a, b in (("better", "worse"), ("l_better", "l_worse")))
    sides = np.concatenate([shares, shares]) / 2
    covariance = sides @ (rewards * lengths) - (sides @ rewards) * (sides @ lengths)
    wanted = {
        "accuracy": shares @ (margin > 0),
        "margin": shares @ margin,
        "probability": shares @ (1 / (1 + np.exp(-margin))),
        "confidence": shares @ (1 / (1 + np.exp(-abs(margin)))),
        "reward_chosen": shares @ rows["better"],
        "reward_rejected": shares @ rows["worse"],
        "reward_chosen_std": std(rows["better"], shares),
        "reward_rejected_std": std(rows["worse"], shares),
        "length_correlation": covariance / std(rewards, sides) / std(lengths, sides),
    }
    for parts in ([given], [given[:2], given[2:4], [], given[4:]]):
        totals: dict[str, float] = {}
        for part in parts:
            for name, value in task(model, collate(part))[1].items():
                totals[name] = totals.get(name, 0.0) + float(value)
        found = task.report({name: total / len(given) for name, total in totals.items()})
        assert found.pop("preference_loss") > 0
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_correlation_that_does_not_exist_is_left_out(model):
    task = RewardTask()
    prompt, answer, _ = pairs(1)[0].segments
    other = dataclasses.replace(answer, tokens=answer.tokens[::-1] + 1)
    three = [Example((prompt, answer, other), pairs=((0, 1),))] * 3
    sums = task(model, collate([dataclasses.replace(three[0], pairs=((0, 1), (1, 0), (0, 1)))] * 3))[1]
    found = task.report({name: float(value) / 3 for name, value in sums.items()})
    assert "length_correlation" not in found
    sums = task(model, collate(three))[1]
    assert task.report({name: float(value) / 3 for name, value in sums.items()})["reward_chosen_std"] == 0.0


def test_a_step_without_examples_reports_numbers(model):
    task = RewardTask()
    sums = task(model, collate([]))[1]
    found = task.report({name: float(value) for name, value in sums.items()})
    assert set(found.values()) == {0.0}
