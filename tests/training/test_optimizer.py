import math

import pytest
from torch import nn

from umedtrain.config import OptimizerConfig
from umedtrain.training.optimizer import build_optimizer, learning_rate


def curve(steps=100, **options):
    config = OptimizerConfig(lr=2.0, **options)
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_reaches_the_peak():
    rates = curve(warmup_ratio=0.1, schedule="constant")
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert set(rates[10:]) == {2.0}


def test_cosine_by_hand():
    rates = curve(warmup_ratio=0.0, schedule="cosine", min_lr_ratio=0.1)
    for step in (0, 25, 50, 99):
        assert rates[step] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 100))))


def test_linear_by_hand():
    rates = curve(warmup_ratio=0.2, schedule="linear")
    assert rates[20] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(2.0 / 80)


def test_one_step_is_a_whole_schedule():
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_ratio=0.1), 0, 1) == 1.0


def test_only_matrices_are_decayed():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    matrices, vectors = build_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    assert [p.ndim for p in matrices["params"]] == [2]
    assert matrices["weight_decay"] == 0.1
    assert len(vectors["params"]) == 2
    assert vectors["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("lr", math.nan), ("weight_decay", -1.0), ("warmup_ratio", 1.5), ("min_lr_ratio", -0.1)],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"optimizer.{field}"):
        build_optimizer(nn.Linear(1, 1), OptimizerConfig(**{field: value}))
