"""What the reward recipe adds to the loss."""

import json
from pathlib import Path

import pytest
import torch

import umedtrain as ut
from tests.recipes.material import preference, write_rows
from umedtrain.config import BatchConfig, DataConfig, LogConfig, ModelConfig, OptimizerConfig, ParallelConfig
from umedtrain.recipes import reward


def config_of(files, output, pairs, **loss):
    return reward.RewardConfig(
        output=str(output),
        model=ModelConfig(preset="half-m", tokenizer=str(files / "tokenizer.model")),
        data=DataConfig(files=(pairs,), max_tokens=400),
        batch=BatchConfig(examples=4, micro_batch_tokens=400, max_steps=3),
        optimizer=OptimizerConfig(lr=1e-3),
        parallel=ParallelConfig(dtype="float32"),
        log=LogConfig(progress=False),
        reward=reward.LossConfig(**loss),
    )


def scored(index):
    metadata = {"chosen": {"score": 5}, "rejected": {"score": 5 - index}} if index != 3 else {}
    return {**preference(index, words=1 + index % 3), "metadata": metadata}


def metrics(export):
    return [json.loads(line) for line in (Path(export).parent / "metrics.jsonl").read_text().splitlines()]


def test_margins_and_centring_reach_the_loss(files, world, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [scored(index) for index in range(8)])
    runs = {
        name: reward.run(config_of(files, tmp_path / name, path, **loss), world)
        for name, loss in {
            "plain": {},
            "margin": {"margin": True, "margin_scale": 0.5},
            "center": {"center": 0.1},
        }.items()
    }
    logged = {name: metrics(run) for name, run in runs.items()}
    for lines in logged.values():
        wanted = {"probability", "confidence", "reward_chosen_std", "reward_rejected_std", "length_correlation"}
        assert wanted <= set(lines[0])
        assert not any(name.startswith("_") for name in lines[0])
    plain, margin, center = (logged[name][0] for name in ("plain", "margin", "center"))
    # A fresh head is the same for all three, and nearly says nothing: the first loss is ln 2, or asks for the margins.
    assert plain["reward_chosen"] == margin["reward_chosen"] == center["reward_chosen"]
    assert margin["loss"] > plain["loss"] + 0.2
    assert center["loss"] > center["preference_loss"] == plain["loss"]
    heads = [ut.load_model(run).score.weight for run in runs.values()]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_margins_that_nobody_wrote_down(files, world, tmp_path):
    config = config_of(files, tmp_path / "run", str(files / "preferences.jsonl"), margin=True)
    with pytest.raises(ValueError) as error:
        reward.run(config, world)
    message = str(error.value)
    assert message.startswith(f"{files / 'preferences.jsonl'}: reward.margin needs the numbers metadata.chosen.score")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"margin_scale": 0.0}, "reward.margin_scale must be a positive number, got 0.0"),
        ({"margin_scale": float("nan")}, "reward.margin_scale must be a positive number, got nan"),
        ({"center": -0.1}, "reward.center must be 0 or a positive number, got -0.1"),
    ],
)
def test_settings_out_of_range_leave_no_folder_behind(files, world, tmp_path, loss, message):
    with pytest.raises(ValueError, match=message):
        reward.run(config_of(files, tmp_path / "run", str(files / "preferences.jsonl"), **loss), world)
    assert not (tmp_path / "run").exists()
