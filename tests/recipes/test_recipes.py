"""The recipes, one after the other, as a user runs them, on two ranks."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import umedtrain as ut
from tests.ranks import run_ranks
from tests.recipes.material import torchrun
from umedtrain.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
    read_config,
    write_config,
)
from umedtrain.recipes import dpo, evaluate, generate, reward, sft


def training(files, name, model):
    """Sections of a training config."""
    return {
        "model": model,
        "data": DataConfig(files=(str(files / name),), max_tokens=400),
        "batch": BatchConfig(examples=4, micro_batch_tokens=800, max_steps=2),
        "optimizer": OptimizerConfig(lr=1e-3),
        "parallel": ParallelConfig(dtype="float32"),
        "checkpoint": CheckpointConfig(every_steps=2),
        "log": LogConfig(progress=False),
    }


def sft_config(files, output):
    model = ModelConfig(preset="half-m", tokenizer=str(files / "tokenizer.model"))
    return sft.SFTConfig(output=str(output), **training(files, "conversations.jsonl", model))


def later_stages(world, files, runs):
    """Everything after SFT; returns each stage's result."""
    files, runs = Path(files), Path(runs)
    start = ModelConfig(path=str(runs / "sft" / "export"))
    pairs = training(files, "preferences.jsonl", start)
    reward_model = reward.run(reward.RewardConfig(output=str(runs / "reward"), **pairs), world)
    policy = dpo.run(dpo.DPOConfig(output=str(runs / "dpo"), **pairs), world)
    sampling = SamplingConfig(max_tokens=6, n=2)
    completions = generate.run(
        generate.GenerateConfig(
            output=str(runs / "generate"),
            model=str(policy),
            prompts=(str(files / "prompts.jsonl"),),
            dtype="float32",
            sampling=sampling,
        ),
        world,
    )
    evaluate_config = evaluate.EvaluateConfig(
        output=str(runs / "evaluate"),
        model=str(policy),
        reward_model=str(reward_model),
        questions=(str(files / "questions.jsonl"),),
        preferences=(str(files / "preferences.jsonl"),),
        max_tokens=400,
        dtype="float32",
        sampling=sampling,
    )
    results = evaluate.run(evaluate_config, world, show=False)
    return [str(reward_model), str(policy), str(completions), results]


@pytest.fixture(scope="module")
def chain(files, tmp_path_factory):
    """(folder of all runs, output of SFT's process, results of the later stages by rank)."""
    runs = tmp_path_factory.mktemp("runs")
    write_config(sft_config(files, runs / "sft"), runs / "sft.toml")
    process = torchrun("sft", runs / "sft.toml", "--batch.max-steps", "3", timeout=120)
    assert process.returncode == 0, process.stderr
    return runs, process, run_ranks(2, later_stages, str(files), str(runs))


@pytest.mark.parametrize(("name", "steps"), [("sft", 3), ("reward", 2), ("dpo", 2)])
def test_a_training_run_leaves_everything(chain, files, name, steps):
    folder = chain[0] / name
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == steps
    assert summary["loss"] == metrics[-1]["loss"]
    source = files / ("conversations.jsonl" if name == "sft" else "preferences.jsonl")
    reason = "longer than 400 tokens" if name == "sft" else "pair longer than 400 tokens"
    assert summary["dropped"] == {reason: {"count": 1, "first": [f"{source}:3"]}}
    assert json.loads((folder / "environment.json").read_text())["ranks"] == 2
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{steps:08d}"


def test_the_command_line_overrides_the_file_and_is_saved(chain, files):
    saved = read_config(sft.SFTConfig, chain[0] / "sft" / "config.toml")
    assert saved.batch.max_steps == 3
    assert saved.data == sft_config(files, "").data


def test_dpo_starts_at_ln_2(chain):
    first = json.loads((chain[0] / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_exports_load_here_and_in_transformers_to_the_same_numbers(chain):
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(7, 30)
    for name in ("sft", "dpo"):
        export = chain[0] / name / "export"
        ours = ut.load_model(export)
        with torch.no_grad():
            logits = ours.logits(ours(ids, ut.Layout.packed([len(ids)])))
            theirs = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)(ids[None]).logits[0]
        torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5)
    assert isinstance(ut.load_model(chain[0] / "reward" / "export"), ut.RewardModel)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chain[0] / "dpo" / "export")
    messages = [{"role": "user", "content": "Which organ causes fever?"}]
    expected = ut.render_chat(messages, ut.load_tokenizer(chain[0] / "dpo" / "export"), add_generation_prompt=True)[0]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected


def test_dpo_changed_the_policy_but_not_its_shape(chain):
    before, after = (ut.load_model(chain[0] / name / "export") for name in ("sft", "dpo"))
    assert before.config == after.config
    assert not torch.equal(before.embed_tokens.weight, after.embed_tokens.weight)


def test_generate_writes_every_prompt_in_order(chain):
    rows = [json.loads(line) for line in Path(chain[2][0][2]).read_text().splitlines()]
    assert [row["id"] for row in rows] == ["30", "31", "32", "33", "34"]
    assert all(len(row[key]) == 2 for row in rows for key in ("completions", "logprobs", "finish_reasons"))
    assert json.loads((chain[0] / "generate" / "summary.json").read_text())["prompts"] == 5


def test_evaluate_agrees_on_all_ranks_and_counts_what_it_drops(chain, files):
    first, second = (stages[3] for stages in chain[2])
    assert first == second
    questions = first["questions"][str(files / "questions.jsonl")]
    assert (questions["questions"], questions["samples"], questions["chance"]) == (6, 2, 0.25)
    assert {"greedy", "mean", "majority", "best_of_n", "oracle"} <= set(questions["accuracy"])
    pairs = first["preferences"][str(files / "preferences.jsonl")]
    assert pairs["pairs"] == 8
    assert pairs["dropped"]["pair longer than 400 tokens"]["count"] == 1
    assert json.loads((chain[0] / "evaluate" / "results.json").read_text()) == json.loads(json.dumps(first))
    assert "Dropped: pair longer than 400 tokens: 1." in (chain[0] / "evaluate" / "results.md").read_text()


def test_a_run_that_found_no_data_does_not_keep_its_folder(files, world, tmp_path):
    config = sft_config(files, tmp_path / "sft")
    mistyped = dataclasses.replace(config, data=dataclasses.replace(config.data, files=(str(tmp_path / "no.jsonl"),)))
    with pytest.raises((ValueError, OSError), match=r"no\.jsonl"):
        sft.run(mistyped, world)
    assert (tmp_path / "sft" / "config.toml").exists()
    assert (sft.run(config, world) / "config.json").exists()


def test_a_finished_run_is_skipped_and_another_config_refused(chain, files, world):
    folder = chain[0] / "sft"
    saved = read_config(sft.SFTConfig, folder / "config.toml")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.parent.name == "export"}
    assert sft.run(saved, world) == folder / "export"
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(ValueError, match=r"sft holds a run with another batch.max_steps; choose another output folder"):
        sft.run(sft_config(files, folder), world)
    assert read_config(sft.SFTConfig, folder / "config.toml") == saved
