"""The table over several seeds of the pipeline."""

import json

import numpy as np
import pytest

from umedtrain.recipes.over_seeds import accuracies, read_summaries, steps
from umedtrain.recipes.ultramedical import MODELS, SHOWN


def summary(seed, split="validation", questions=50):
    random = np.random.default_rng(seed)
    result = {"seed": seed, "split": split}
    for rank, model in enumerate(MODELS):
        scores = {method: (random.random(questions) < 0.3 + 0.2 * rank).astype(float).tolist() for method in SHOWN}
        result[model] = {
            "questions": questions,
            "chance": 0.05,
            "majority_class": 0.1,
            "accuracy": {method: {"value": float(np.mean(values))} for method, values in scores.items()},
            "scores": scores,
            "unparsed": {"greedy": 0.0},
            "reward_accuracy": {"value": 0.7 + seed / 100},
        }
    return result


def write(folder, value):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(value))
    return folder


def cells(table, *start):
    line = next(line for line in table.splitlines() if line.startswith("| " + " | ".join(start) + " |"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_every_seed_and_their_mean_and_range_stand_in_the_table(tmp_path):
    summaries = read_summaries([write(tmp_path / str(seed), summary(seed)) for seed in (2, 0, 1)])
    assert [s["seed"] for s in summaries] == [0, 1, 2]
    table = accuracies(summaries)
    values = [s["DPO"]["accuracy"]["greedy"]["value"] for s in summaries]
    for seed, value in enumerate(values):
        assert cells(table, "DPO", str(seed))[2] == f"{value:.3f}"
    assert cells(table, "DPO", "all")[2].startswith(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}")
    assert cells(table, "SFT", "all")[-1].startswith("0.710 (0.700 to 0.720")


def test_steps_are_paired_differences_of_each_seed(tmp_path):
    summaries = read_summaries([write(tmp_path / str(seed), summary(seed)) for seed in (0, 1)])
    row = cells(steps(summaries), "SFT -> DPO, greedy")
    gains = [s["DPO"]["accuracy"]["greedy"]["value"] - s["SFT"]["accuracy"]["greedy"]["value"] for s in summaries]
    assert [cell.split(" ")[0] for cell in row[1:3]] == [f"{gain:+.3f}" for gain in gains]
    assert row[3].startswith(f"{np.mean(gains):.3f} (")


@pytest.mark.parametrize(
    "second, message",
    [
        (summary(0), "the runs have the seeds [0, 0]; every run needs its own"),
        (summary(1, split="test"), "the runs evaluated different splits: validation, test"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(tmp_path, second, message):
    runs = [write(tmp_path / "first", summary(0)), write(tmp_path / "second", second)]
    with pytest.raises(ValueError) as error:
        read_summaries(runs)
    assert str(error.value) == message


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a finished run"):
        read_summaries([tmp_path])
