"""What the DPO recipe makes of a file of pairs."""

import dataclasses
import json
from pathlib import Path

import pytest

import umedtrain as ut
from tests.recipes.material import LETTERS, question, save_random_model, write_rows
from umedtrain.config import (
    BatchConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PairsConfig,
    ParallelConfig,
)
from umedtrain.recipes import dpo
from umedtrain.records import read_preferences


@pytest.fixture(scope="module")
def policy(files, tmp_path_factory):
    return save_random_model(files, tmp_path_factory.mktemp("policy") / "model", ut.Llama, scale=2)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Pairs of three prompts, four answers each, every answer better than all later ones."""
    rows = []
    for index in range(3):
        answers = ["because " * place + f"the answer is {letter}." for place, letter in enumerate(LETTERS)]
        rows += [
            {"prompt": question(index)[0], "chosen": answers[better], "rejected": answers[worse]}
            for better in range(4)
            for worse in range(better + 1, 4)
        ]
    return write_rows(tmp_path_factory.mktemp("pairs") / "ranked.jsonl", rows)


def config_of(policy, file, output, **changes):
    config = dpo.DPOConfig(
        output=str(output),
        model=ModelConfig(path=policy),
        data=DataConfig(files=(file,), max_tokens=600),
        batch=BatchConfig(examples=18, micro_batch_tokens=1200, epochs=3),
        optimizer=OptimizerConfig(lr=1e-3, schedule="constant", warmup_ratio=0.0),
        parallel=ParallelConfig(dtype="float32"),
        log=LogConfig(progress=False),
    )
    return dataclasses.replace(config, **changes)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_answers_of_a_prompt_together_are_the_same_training_with_fewer_tokens(policy, ranked, world, tmp_path):
    apart, together = tmp_path / "apart", tmp_path / "together"
    dpo.run(config_of(policy, ranked, apart), world)
    batch = BatchConfig(examples=3, micro_batch_tokens=1200, epochs=3)
    dpo.run(config_of(policy, ranked, together, merge_pairs=True, batch=batch), world)
    for one, other in zip(metrics(apart), metrics(together), strict=True):
        assert one["pairs"] == other["pairs"] == 18
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert other["tokens"] < one["tokens"] / 3
    assert metrics(together)[-1]["loss"] < 0.69


def test_what_is_kept_out_is_not_trained_on_and_is_there_to_be_read(policy, ranked, world, tmp_path):
    care = PairsConfig(keep_out=0.34)
    batch = BatchConfig(examples=20, micro_batch_tokens=1200)
    dpo.run(config_of(policy, ranked, tmp_path / "run", pairs=care, batch=batch), world)
    apart = read_preferences(tmp_path / "run" / "held_out.jsonl")
    assert len({pair.prompt[0]["content"] for pair in apart}) == 1
    assert len(apart) == 6
    assert metrics(tmp_path / "run")[0]["pairs"] == 12
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["kept out of training"] == {"count": 6, "prompts": 1}


def test_kto_needs_a_second_prompt(policy, ranked, world, tmp_path):
    rows = [json.loads(line) for line in Path(ranked).read_text().splitlines()[:2]]
    one = write_rows(tmp_path / "one.jsonl", rows)
    with pytest.raises(ValueError, match=r"dpo\.loss kto needs answers to other prompts"):
        dpo.run(config_of(policy, one, tmp_path / "run", dpo=dpo.LossConfig("kto")), world)
