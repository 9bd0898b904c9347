"""Online rounds: what they leave, and that being killed anywhere changes nothing."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

import umedtrain as ut
from tests.ranks import run_ranks
from tests.recipes.material import conversation, question, save_random_model, write_rows
from umedtrain.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
)
from umedtrain.evaluation import scoring
from umedtrain.recipes import dpo, online_dpo, sft
from umedtrain.records import read_preferences
from umedtrain.sampling import rollout as rollout_module
from umedtrain.training import loop
from umedtrain.training import reference as reference_module

PROMPTS = 12


@pytest.fixture(scope="module")
def made(files, world, tmp_path_factory):
    """Folder with a policy that has learned to answer, a reward model, and prompts with and without answers."""
    folder = tmp_path_factory.mktemp("made")
    rows = [conversation(index) for index in range(24)]
    config = sft.SFTConfig(
        output=str(folder / "sft"),
        model=ModelConfig(preset="half-m", tokenizer=str(files / "tokenizer.model")),
        data=DataConfig(files=(write_rows(folder / "talks.jsonl", rows),), max_tokens=400),
        batch=BatchConfig(examples=12, micro_batch_tokens=1200, epochs=12),
        optimizer=OptimizerConfig(lr=5e-3),
        parallel=ParallelConfig(dtype="float32"),
        log=LogConfig(progress=False),
    )
    sft.run(config, world)
    save_random_model(files, folder / "reward", ut.RewardModel, scale=1.5)
    write_rows(folder / "prompts.jsonl", [{"id": str(i), "prompt": question(i)[0]} for i in range(PROMPTS)])
    write_rows(folder / "questions.jsonl", [conversation(index) for index in range(PROMPTS)])
    return folder


def config_of(made, output, **changes):
    config = online_dpo.OnlineDPOConfig(
        output=str(output),
        rounds=2,
        reward_model=str(made / "reward"),
        model=ModelConfig(path=str(made / "sft" / "export")),
        data=DataConfig(files=(str(made / "prompts.jsonl"),), max_tokens=400),
        batch=BatchConfig(examples=2, micro_batch_tokens=400),
        optimizer=OptimizerConfig(lr=1e-3),
        parallel=ParallelConfig(dtype="float32"),
        checkpoint=CheckpointConfig(every_steps=2),
        log=LogConfig(progress=False),
        sampling=SamplingConfig(max_tokens=24, n=5, temperature=1.5, top_p=1.0, seed=5),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def whole(made, world, tmp_path_factory):
    """Folder of two undisturbed rounds; not to be written to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    online_dpo.run(config_of(made, folder), world)
    return folder


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def parts_of(folder):
    return sorted((row for part in folder.glob("part-*") for row in rows_of(part)), key=lambda row: row["index"])


def tokens_of(folder):
    """Of every answer of a round."""
    return [[answer["tokens"] for answer in row["answers"]] for row in parts_of(folder / "answers")]


def weights_of(folder):
    (file,) = (Path(folder) / "export").glob("*.safetensors")
    return file.read_bytes()


def metrics_of(folder):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows_of(folder / "metrics.jsonl")]


def assert_same_run(folder, other):
    assert weights_of(folder) == weights_of(other)
    for name in ("round-1", "round-2"):
        assert (folder / name / "pairs.jsonl").read_bytes() == (other / name / "pairs.jsonl").read_bytes()
        assert (folder / name / "answers.json").read_bytes() == (other / name / "answers.json").read_bytes()
        assert metrics_of(folder / name) == metrics_of(other / name)


def test_a_round_leaves_its_answers_rewards_pairs_and_figures(whole):
    summaries = json.loads((whole / "summary.json").read_text())["rounds"]
    for number, summary in enumerate(summaries, start=1):
        folder = whole / f"round-{number}"
        assert summary == json.loads((folder / "summary.json").read_text())
        rows, rewards = parts_of(folder / "answers"), [row["rewards"] for row in parts_of(folder / "rewards")]
        assert len(rows) == len(rewards) == summary["prompts"] == PROMPTS
        flat = [reward for group in rewards for reward in group]
        assert summary["rewards"]["count"] == len(flat) == 5 * PROMPTS
        assert summary["rewards"]["mean"] == pytest.approx(sum(flat) / len(flat))
        cut = sum(answer["finish_reason"] == "length" for row in rows for answer in row["answers"])
        assert summary["cut"] == cut < 2 * PROMPTS
        pairs = read_preferences(folder / "pairs.jsonl")
        none = sum(reason["count"] for reason in summary["without_pair"].values())
        assert len(pairs) + none == PROMPTS
        assert summary["pairs"] == len(pairs) > PROMPTS / 2
        assert summary["metrics"]["step"] == -(-len(pairs) // 2)
        for pair in pairs:
            finished = [
                (reward, answer["text"])
                for reward, answer in zip(rewards[int(pair.id)], rows[int(pair.id)]["answers"], strict=True)
                if answer["finish_reason"] == "stop"
            ]
            scores = [pair.metadata[side]["score"] for side in ("chosen", "rejected")]
            assert (scores[0], pair.chosen) == max(finished)
            assert (scores[1], pair.rejected) == min(finished)
    assert summaries[0]["rewards"]["mean"] != summaries[1]["rewards"]["mean"]


def test_the_rewards_are_those_of_the_rendered_dialogs(made, whole):
    model, tokenizer = ut.load_model(made / "reward"), ut.load_tokenizer(made / "reward")
    prompts, answers = [], []
    for prompt, row in zip(rows_of(made / "prompts.jsonl"), parts_of(whole / "round-1" / "answers"), strict=True):
        messages = [{"role": "user", "content": prompt["prompt"]}]
        prompts.append(ut.render_chat(messages, tokenizer, add_generation_prompt=True)[0])
        turns = [{"role": "assistant", "content": answer["text"]} for answer in row["answers"]]
        answers.append([ut.render_chat([*messages, turn], tokenizer)[0][len(prompts[-1]) :] for turn in turns])
    wanted = scoring.score_answers(model, prompts, answers)
    for row, rewards in zip(parts_of(whole / "round-1" / "rewards"), wanted, strict=True):
        assert row["rewards"] == pytest.approx(rewards, abs=1e-4)


def test_a_round_is_what_dpo_makes_of_its_pairs_and_the_next_samples_from_it(made, whole, world, tmp_path):
    config = config_of(made, tmp_path / "dpo")
    sections = {
        name: getattr(config, name) for name in ("model", "batch", "optimizer", "parallel", "checkpoint", "log")
    }
    data = dataclasses.replace(config.data, files=(str(whole / "round-1" / "pairs.jsonl"),))
    export = dpo.run(dpo.DPOConfig(output=config.output, data=data, **sections), world)
    assert metrics_of(tmp_path / "dpo") == metrics_of(whole / "round-1")

    model, tokenizer = ut.load_model(export), ut.load_tokenizer(export)
    params = ut.SamplingParams(max_tokens=24, n=5, temperature=1.5, seed=5 + 2)
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows_of(made / "prompts.jsonl")]
    outputs = ut.Sampler(model, tokenizer).generate(prompts, params)
    assert [[output.tokens for output in group] for group in outputs] == tokens_of(whole / "round-2")
    assert tokens_of(whole / "round-1") != tokens_of(whole / "round-2")


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def dies_at(monkeypatch, module, name, call, when=lambda *_, **__: True):
    """The function raises instead of its call number `call` (from 1), of those that `when` counts."""
    original, calls = getattr(module, name), []

    def wrapped(*args, **kwargs):
        if when(*args, **kwargs):
            calls.append(1)
        if len(calls) == call:
            raise Killed(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


def is_summary(path, _):
    return path.name == "summary.json"


MOMENTS = [
    ("before the first answer", online_dpo, "gather_model", 1),
    ("before the rewards", scoring, "score_answers", 1),
    ("before the pairs, after answers.json", online_dpo, "write_jsonl", 1),
    ("in the reference cache", reference_module, "answer_logprobs", 3),
    ("before a checkpoint", loop, "train_step", 2),
    ("after a checkpoint", loop, "train_step", 4),
    ("before the round's summary", online_dpo, "write_json", 1),
    ("between the rounds", online_dpo, "gather_model", 1),
    ("in the second round's answers", rollout_module, "_row", 5),
    ("in the second round's training", loop, "train_step", 4),
    ("before the export", online_dpo.build, "export_model", 1),
]


def test_killed_anywhere_it_goes_on_to_the_same_weights(made, whole, world, tmp_path, monkeypatch):
    config = config_of(made, tmp_path / "run")
    for _, module, name, call in MOMENTS:
        with monkeypatch.context() as patch:
            # Few prompts between two writes, so that an interruption leaves some of the answers.
            rollout = online_dpo.rollout
            patch.setattr(online_dpo, "rollout", lambda *a, _rollout=rollout, **k: _rollout(*a, **k, chunk=3))
            when = is_summary if name == "write_json" else lambda *_, **__: True
            dies_at(patch, module, name, call, when)
            with pytest.raises(Killed):
                online_dpo.run(config, world)
    online_dpo.run(config, world)
    assert_same_run(tmp_path / "run", whole)
    before = weights_of(tmp_path / "run")
    assert online_dpo.run(config, world) == tmp_path / "run" / "export"
    assert weights_of(tmp_path / "run") == before


def on_ranks(world, config, kill_at=None):
    """Run; rank 1 dies by SIGKILL at its step number `kill_at`."""
    step, steps = loop.train_step, []

    def counted(*args, **kwargs):
        steps.append(1)
        if len(steps) == kill_at and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **kwargs)

    loop.train_step = counted
    online_dpo.run(config, world)
    return len(steps)


@pytest.mark.timeout(900)
def test_two_ranks_end_alike_after_sigkill(made, whole, tmp_path):
    undisturbed, broken = (config_of(made, tmp_path / name) for name in ("undisturbed", "broken"))
    steps, _ = run_ranks(2, on_ranks, undisturbed)
    first = len(metrics_of(tmp_path / "undisturbed" / "round-1"))
    with pytest.raises(AssertionError):
        run_ranks(2, on_ranks, broken, first + 4)
    assert (tmp_path / "broken" / "round-2" / "checkpoints" / "latest").exists()
    again, _ = run_ranks(2, on_ranks, broken)
    assert again < steps - first
    assert_same_run(tmp_path / "broken", tmp_path / "undisturbed")
    # The answers and pairs of the first round do not depend on the number of ranks.
    one, two = whole / "round-1", tmp_path / "broken" / "round-1"
    assert tokens_of(one) == tokens_of(two)
    assert (one / "pairs.jsonl").read_bytes() == (two / "pairs.jsonl").read_bytes()


def test_pairs_that_are_put_there_are_learned_without_sampling(made, whole, world, tmp_path, monkeypatch):
    config = config_of(made, tmp_path / "run")
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("export", "summary.json", "config.toml"))
    for name in ("round-1", "round-2"):
        for left in ("answers", "rewards", "reference", "checkpoints"):
            shutil.rmtree(tmp_path / "run" / name / left)
        (tmp_path / "run" / name / "metrics.jsonl").unlink()
    dies_at(monkeypatch, online_dpo, "rollout", 1)
    online_dpo.run(config, world)
    assert_same_run(tmp_path / "run", whole)


def test_the_last_checkpoint_of_a_finished_round_is_needed(made, whole, world, tmp_path):
    config = config_of(made, tmp_path / "run")
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("export", "config.toml"))
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "round-1" / "summary.json").rename(tmp_path / "kept.json")
    with pytest.raises(ValueError, match="round-1 is not finished but a later round is; remove the later ones"):
        online_dpo.run(config, world)
    shutil.rmtree(tmp_path / "run" / "round-2")
    (tmp_path / "kept.json").rename(tmp_path / "run" / "round-1" / "summary.json")
    shutil.rmtree(tmp_path / "run" / "round-1" / "checkpoints")
    with pytest.raises(ValueError, match=r"round-1/checkpoints holds no checkpoint.*make the run again"):
        online_dpo.run(config, world)


def rewards_at_the_start(folder):
    return [rows_of(folder / f"round-{number}" / "metrics.jsonl")[0]["reward_chosen"] for number in (1, 2)]


@pytest.mark.parametrize(("kind", "new"), [("model", True), ("cache", False), ("model", False)])
def test_the_reference_of_a_round(made, whole, world, tmp_path, kind, new):
    loss = dpo.LossConfig(reference=kind)
    online_dpo.run(config_of(made, tmp_path / "run", dpo=loss, new_reference=new), world)
    first, second = rewards_at_the_start(tmp_path / "run")
    assert first == 0.0
    assert (second == 0.0) == new
    if new:
        assert weights_of(tmp_path / "run") == weights_of(whole)
    else:
        assert weights_of(tmp_path / "run") != weights_of(whole)
        assert metrics_of(tmp_path / "run" / "round-1") == metrics_of(whole / "round-1")


def test_a_checker_for_a_judge(made, world, tmp_path):
    data = DataConfig(files=(str(made / "questions.jsonl"),), max_tokens=400)
    config = config_of(
        made, tmp_path / "run", judge="answer", reward_model="", data=data, rounds=1, choose="max_random"
    )
    online_dpo.run(config, world)
    folder = tmp_path / "run" / "round-1"
    summary = json.loads((folder / "summary.json").read_text())
    right = {conversation(index)["id"]: conversation(index)["answer"] for index in range(PROMPTS)}
    pairs = read_preferences(folder / "pairs.jsonl")
    for pair in pairs:
        assert f"the answer is {right[pair.id]}." in pair.chosen
        assert f"the answer is {right[pair.id]}." not in pair.rejected
        assert (pair.metadata["chosen"]["score"], pair.metadata["rejected"]["score"]) == (1.0, 0.0)
    assert 0 < len(pairs) < PROMPTS
    assert 0 < summary["rewards"]["mean"] < 1
    assert 0 < summary["ties"] <= PROMPTS - len(pairs)
    assert not (folder / "rewards").exists()


JUDGE = """
import json, sys
asked, answer = sys.argv[-2:]
rows = [json.loads(line) for line in open(asked)]
assert rows[0]["messages"][-1]["role"] == "user" and rows[0]["answer"] in "ABCD"
with open(answer, "w") as file:
    for row in rows:
        print(json.dumps({"rewards": [text.count("e") / (1 + len(text)) for text in row["completions"]]}), file=file)
"""


def commanded(made, output, program, **changes):
    data = DataConfig(files=(str(made / "questions.jsonl"),), max_tokens=400)
    changes = {"rounds": 1, "data": data, **changes}
    command = (sys.executable, "-c", program)
    return config_of(made, output, judge="command", judge_command=command, reward_model="", **changes)


def test_a_program_for_a_judge_is_asked_once_a_round(made, world, tmp_path, monkeypatch):
    config = commanded(made, tmp_path / "run", JUDGE)
    with monkeypatch.context() as patch:
        dies_at(patch, online_dpo, "write_jsonl", 1)
        with pytest.raises(Killed):
            online_dpo.run(config, world)
    rewards = tmp_path / "run" / "round-1" / "rewards"
    before = (rewards / "rewards.jsonl").stat().st_mtime_ns
    online_dpo.run(config, world)
    assert (rewards / "rewards.jsonl").stat().st_mtime_ns == before
    assert sorted(path.name for path in rewards.iterdir()) == ["rewards.jsonl", "to_judge.jsonl"]
    pairs = read_preferences(tmp_path / "run" / "round-1" / "pairs.jsonl")
    for pair in pairs:
        for side in ("chosen", "rejected"):
            text = getattr(pair, side)
            assert pair.metadata[side]["score"] == text.count("e") / (1 + len(text))
        assert pair.metadata["chosen"]["score"] > pair.metadata["rejected"]["score"]
    assert len(pairs) > PROMPTS / 2


PROGRAMS = {
    "import sys; sys.exit('no key for the service')": "ended with exit code 1: no key for the service",
    "import sys; open(sys.argv[-1], 'w').write('')": "rewards.partial.jsonl",
    "import sys; open(sys.argv[-1], 'w').write('{}\\n')": f"holds 1 rows of rewards, and {PROMPTS} were asked for",
    JUDGE.replace('text.count("e") /', '"high" or'): "line 1, rewards: must be 5 finite numbers",
    JUDGE.replace("text.count", "float('nan') or text.count"): "line 1, rewards: must be 5 finite numbers",
    JUDGE.replace('["completions"]]', '["completions"][1:]]'): "line 1, rewards: must be 5 finite numbers",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_does_not_judge_is_one_sentence(made, world, tmp_path, program):
    with pytest.raises(ValueError) as error:
        online_dpo.run(commanded(made, tmp_path / "run", program), world)
    assert PROGRAMS[program] in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "round-1" / "rewards" / "rewards.jsonl").exists()


def test_rewards_of_other_answers_are_not_taken(made, world, tmp_path):
    config = commanded(made, tmp_path / "run", JUDGE, batch=BatchConfig(2, 400, max_steps=1))
    online_dpo.run(config, world)
    folder = tmp_path / "run" / "round-1"
    shutil.rmtree(folder / "answers")
    for left in (tmp_path / "run" / "config.toml", tmp_path / "run" / "summary.json", folder / "summary.json"):
        left.unlink()
    (folder / "pairs.jsonl").unlink()
    other = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, seed=6))
    with pytest.raises(ValueError, match=r"rewards\.jsonl: holds rewards of other answers; remove it"):
        online_dpo.run(other, world)


def test_rounds_of_kto(made, whole, world, tmp_path):
    loss = dpo.LossConfig("kto", beta=0.3, undesirable_weight=0.5)
    runs = {kind: tmp_path / kind for kind in ("cache", "model")}
    for kind, folder in runs.items():
        online_dpo.run(config_of(made, folder, dpo=dataclasses.replace(loss, reference=kind)), world)
    assert_same_run(runs["cache"], runs["model"])
    assert (runs["cache"] / "round-1" / "pairs.jsonl").read_bytes() == (whole / "round-1" / "pairs.jsonl").read_bytes()
    assert weights_of(runs["cache"]) != weights_of(whole)
    for name in ("round-1", "round-2"):
        first, *later = rows_of(runs["cache"] / name / "metrics.jsonl")
        # Policy and reference are the same: every answer's loss is half its weight.
        assert (first["loss"], first["kl"]) == (pytest.approx((0.5 + 0.25) / 2), 0.0)
        assert all(row["kl"] != 0.0 for row in later)
        assert (runs["cache"] / name / "reference-mismatched").exists()


def test_a_length_penalty_outweighs_the_reward(made, world, tmp_path):
    batch = BatchConfig(examples=2, micro_batch_tokens=400, max_steps=1)
    loss = dpo.LossConfig(loss="simpo", beta=2.0, reference="none")
    config = config_of(made, tmp_path / "run", rounds=1, length_penalty=1e6, batch=batch, dpo=loss)
    online_dpo.run(config, world)
    rows = parts_of(tmp_path / "run" / "round-1" / "answers")
    for pair in read_preferences(tmp_path / "run" / "round-1" / "pairs.jsonl"):
        answers = [a for a in rows[int(pair.id)]["answers"] if a["finish_reason"] == "stop"]
        lengths = {answer["text"]: len(answer["tokens"]) for answer in answers}
        assert lengths[pair.chosen] == min(lengths.values())
        assert lengths[pair.rejected] == max(lengths.values())
    assert not (tmp_path / "run" / "round-1" / "reference").exists()


def test_answers_that_are_all_cut_give_no_pair(made, world, tmp_path):
    sampling = SamplingConfig(max_tokens=1, n=2, temperature=1.0, seed=5)
    with pytest.raises(ValueError) as error:
        online_dpo.run(config_of(made, tmp_path / "run", sampling=sampling), world)
    folder = tmp_path / "run" / "round-1"
    assert str(error.value) == (
        f"{folder}: no prompt gives a pair (fewer than two different finished answers: {PROMPTS}); read "
        f"{folder / 'answers'} to see why"
    )
    assert not (folder / "pairs.jsonl").exists()


SETTINGS = {
    "data.files is empty": {"data": DataConfig()},
    "data.weights has no place here": {"data": DataConfig(files=("x.jsonl",), weights=(1.0,))},
    "rounds must be at least 1, got 0": {"rounds": 0},
    "sampling.n must be at least 2": {"sampling": SamplingConfig(n=1)},
    "sampling.temperature above 0": {"sampling": SamplingConfig(n=4, temperature=0.0)},
    "length_penalty must be 0 or a positive number, got -1.0": {"length_penalty": -1.0},
    "checkpoint.every_steps must be at least 1": {"checkpoint": CheckpointConfig(every_steps=0)},
    "reward_model is empty": {"reward_model": ""},
    "beta": {"dpo": dpo.LossConfig(beta=0.0)},
    "dpo.reference is 'none'": {"dpo": dpo.LossConfig(reference="none")},
    "judge_command [] names no program": {"judge": "command"},
    "judge_command ['nowhere', 'x'] names no program": {"judge": "command", "judge_command": ("nowhere", "x")},
    "dpo.beta must be positive": {"dpo": dpo.LossConfig("kto", beta=-1.0)},
    "is a language model, not a reward model": {"reward_model": "{made}/sft/export"},
    "line 1, answer: is missing, so the question cannot be graded": {"judge": "answer"},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_cannot_work_are_refused_before_anything_is_made(made, world, tmp_path, message):
    changes = dict(SETTINGS[message])
    if "reward_model" in changes:
        changes["reward_model"] = changes["reward_model"].format(made=made)
    with pytest.raises(ValueError) as error:
        online_dpo.run(config_of(made, tmp_path / "run", **changes), world)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
