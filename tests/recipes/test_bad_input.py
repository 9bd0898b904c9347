"""Bad input: one clear sentence that names what to mend, on every rank, and no hang."""

import dataclasses
import json
import shutil

import pytest

from tests.ranks import run_ranks
from tests.recipes.material import ROOT, conversation, torchrun, write_rows
from umedtrain.config import (
    BatchConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    PairsConfig,
    ParallelConfig,
    load_config,
    write_config,
)
from umedtrain.recipes import dpo, evaluate, generate, reward, sft
from umedtrain.text.sentencepiece import train_sentencepiece


def config_of(recipe, folder, files, *, file="conversations.jsonl", **sections):
    """A config that works, but for what `sections` put in its place."""
    defaults = {
        "output": str(folder / "run"),
        "model": ModelConfig(preset="half-m", tokenizer=str(files / "tokenizer.model")),
        "data": DataConfig(files=(str(files / file),), max_tokens=400),
        "batch": BatchConfig(examples=4, micro_batch_tokens=400, max_steps=1),
        "parallel": ParallelConfig(dtype="float32"),
        "log": LogConfig(progress=False),
    }
    return recipe(**{**defaults, **sections})


def sft_of(folder, files, **sections):
    return config_of(sft.SFTConfig, folder, files, **sections)


@pytest.fixture(scope="module")
def checkpoint(files, world, tmp_path_factory):
    """The export of a run of one step; not to be written to."""
    return sft.run(sft_of(tmp_path_factory.mktemp("sound"), files), world)


def assert_one_sentence(error, *parts):
    """The message holds all parts, and is one line."""
    message = str(error.value)
    assert "\n" not in message, message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[optimizer]\nlearning_rat = 1e-3\n", ["unknown key optimizer.learning_rat", "did you mean optimizer."]),
        ("[optimiser]\nlr = 1e-3\n", ["unknown key optimiser", "did you mean optimizer?"]),
        ('[optimizer]\nlr = "fast"\n', ["optimizer.lr", "float"]),
        ('[data]\ntoo_long = "cut"\n', ["data.too_long", "cut"]),
        ("[optimizer\n", ["not valid TOML"]),
        (None, ["cannot read the config file"]),
    ],
)
def test_a_config_file_with_a_mistake(tmp_path, text, parts):
    path = tmp_path / "bad.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_config(sft.SFTConfig, [str(path)])
    assert_one_sentence(error, str(path), *parts)


@pytest.mark.parametrize(("option", "value"), [("--optimizer.lrr", "1"), ("--optimizer.lr", "fast")])
def test_an_option_with_a_mistake(capsys, option, value):
    with pytest.raises(SystemExit) as error:
        load_config(sft.SFTConfig, [option, value])
    assert error.value.code not in (0, None)
    assert "optimizer.lr" in capsys.readouterr().err


NO_ASSISTANT = {"conversations": [{"from": "human", "value": "Hello?"}]}
ROWS = {
    "no assistant turn": ([conversation(0), NO_ASSISTANT], ["line 2", "conversations", "has no assistant turn"]),
    "empty file": ([], ["empty"]),
    "all too long": (
        [conversation(i, words=600) for i in range(3)],
        ["no example is left to train on", "longer than 400 tokens: 3", "raise data.max_tokens"],
    ),
    "unknown role": (
        [{"messages": [{"role": "doctor", "content": "Hello."}]}],
        ["line 1", "messages[0].role", "unknown role 'doctor'"],
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_data_that_cannot_be_used(files, world, tmp_path, case):
    rows, parts = ROWS[case]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError) as error:
        sft.run(sft_of(tmp_path, files, file=path), world)
    assert_one_sentence(error, path, *parts)
    assert not (tmp_path / "run" / "summary.json").exists()


SECTIONS = {
    "no files": ({"data": DataConfig()}, ["data.files is empty"]),
    "missing file": ({"data": DataConfig(files=("nowhere.jsonl",))}, ["nowhere.jsonl"]),
    "unknown preset": (
        {"model": ModelConfig(preset="9b", tokenizer="{files}/tokenizer.model")},
        ["model.preset '9b' is not one of", "half-m"],
    ),
    "no tokenizer": ({"model": ModelConfig(preset="half-m")}, ["model.tokenizer is empty"]),
    "missing checkpoint": (
        {"model": ModelConfig(path="nowhere", tokenizer="{files}/tokenizer.model")},
        ["nowhere: no such checkpoint directory"],
    ),
    "example over the micro-batch": (
        {"batch": BatchConfig(micro_batch_tokens=20)},
        ["conversations.jsonl, line ", "more than a micro-batch of 20", "raise batch.micro_batch_tokens"],
    ),
    "no examples per step": ({"batch": BatchConfig(examples=0)}, ["batch.examples must be at least 1"]),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_settings_that_do_not_work(files, world, tmp_path, case):
    sections, parts = SECTIONS[case]
    if "model" in sections:
        model = sections["model"]
        tokenizer = model.tokenizer.format(files=files)
        sections = sections | {"model": dataclasses.replace(model, tokenizer=tokenizer)}
    with pytest.raises(ValueError) as error:
        sft.run(sft_of(tmp_path, files, **sections), world)
    assert_one_sentence(error, *parts)


def test_a_conversation_over_the_budget_is_truncated_if_asked_and_counted(files, world, tmp_path):
    data = DataConfig(files=(str(files / "conversations.jsonl"),), max_tokens=400, too_long="truncate")
    sft.run(sft_of(tmp_path, files, data=data), world)
    dropped = json.loads((tmp_path / "run" / "summary.json").read_text())["dropped"]
    expected = {"count": 1, "first": [f"{files / 'conversations.jsonl'}:3"]}
    assert dropped == {"kept, truncated to 400 tokens": expected}


def test_a_tokenizer_with_a_larger_vocabulary(files, checkpoint, world, tmp_path):
    texts = [turn["value"] for index in range(40) for turn in conversation(index)["conversations"]]
    train_sentencepiece(texts, tmp_path / "larger.model", vocab_size=330)
    model = ModelConfig(path=str(checkpoint), tokenizer=str(tmp_path / "larger.model"))
    with pytest.raises(ValueError) as error:
        sft.run(sft_of(tmp_path, files, model=model), world)
    assert_one_sentence(error, "330 tokens", "320 embeddings", "set model.tokenizer")


def test_a_tokenizer_of_another_model(files, checkpoint, world, tmp_path):
    train_sentencepiece([conversation(0)["conversations"][0]["value"]] * 20, tmp_path / "other.model", vocab_size=290)
    model = ModelConfig(path=str(checkpoint), tokenizer=str(tmp_path / "other.model"))
    with pytest.raises(ValueError) as error:
        dpo.run(config_of(dpo.DPOConfig, tmp_path, files, file="preferences.jsonl", model=model), world)
    assert_one_sentence(error, f"model.tokenizer {tmp_path / 'other.model'} gives other ids", str(checkpoint))
    same = dataclasses.replace(model, tokenizer=str(files / "tokenizer.model"))
    dpo.run(config_of(dpo.DPOConfig, tmp_path / "same", files, file="preferences.jsonl", model=same), world)


PAIR = {"prompt": "Why?", "chosen": "Because of the liver.", "rejected": "Because of the lung."}
PAIRS = {
    "empty answer": ([PAIR, PAIR | {"rejected": " "}], ["line 2", "rejected", "is empty"]),
    "identical answers": ([PAIR | {"rejected": PAIR["chosen"]}], ["line 1", "rejected", "equals `chosen`"]),
    "missing field": ([PAIR, {"prompt": "Why?", "chosen": "x"}], ["line 2", "needs `chosen` and `rejected`"]),
    "prompt over the budget": (
        [PAIR | {"prompt": "why " * 500}],
        ["no example is left to train on", "pair longer than 400 tokens: 1", "raise data.max_tokens"],
    ),
}


@pytest.mark.parametrize("recipe", ["dpo", "reward"])
@pytest.mark.parametrize("case", PAIRS)
def test_pairs_that_cannot_be_used(files, world, tmp_path, case, recipe):
    rows, parts = PAIRS[case]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    schema, run = (dpo.DPOConfig, dpo.run) if recipe == "dpo" else (reward.RewardConfig, reward.run)
    with pytest.raises(ValueError) as error:
        run(config_of(schema, tmp_path, files, file=path), world)
    assert_one_sentence(error, path, *parts)


@pytest.mark.parametrize("recipe", ["dpo", "reward"])
def test_what_care_and_length_drop_is_counted_in_the_summary(files, world, tmp_path, recipe):
    longer = PAIR | {"rejected": "because " * 500}
    lower = PAIR | {"prompt": "How?", "metadata": {"chosen": {"score": 1}, "rejected": {"score": 2}}}
    path = write_rows(tmp_path / "pairs.jsonl", [PAIR, longer, PAIR, lower, PAIR | {"prompt": "When?"}])
    held_out = write_rows(tmp_path / "held.jsonl", [PAIR | {"prompt": "When?", "chosen": "Now."}])
    schema, run = (dpo.DPOConfig, dpo.run) if recipe == "dpo" else (reward.RewardConfig, reward.run)
    care = PairsConfig(held_out=(held_out,), drop_held_out=True)
    run(config_of(schema, tmp_path, files, file=path, pairs=care), world)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["dropped"] == {
        "same prompt and answers as an earlier pair": {"count": 1, "first": [f"{path}:3"]},
        "prompt stands in a held-out file": {"count": 1, "first": [f"{path}:5"]},
        "pair longer than 400 tokens": {"count": 1, "first": [f"{path}:2"]},
    }
    assert summary["data"]["chosen does not score higher than rejected"] == {"count": 1, "first": [f"{path}:4"]}
    assert (summary["data"]["pairs"], summary["data"]["prompts"]) == (4, 3)


def test_a_reference_cache_of_other_weights_or_data(files, world, tmp_path):
    config = config_of(dpo.DPOConfig, tmp_path, files, file="preferences.jsonl")
    dpo.run(config, world)
    other_file = write_rows(tmp_path / "other.jsonl", [PAIR])
    changes = {
        "weights": {"batch": dataclasses.replace(config.batch, seed=7)},
        "examples": {"data": dataclasses.replace(config.data, files=(other_file,))},
    }
    for what, change in changes.items():
        shutil.copytree(tmp_path / "run" / "reference", tmp_path / what / "reference")
        with pytest.raises(ValueError) as error:
            dpo.run(dataclasses.replace(config, output=str(tmp_path / what), **change), world)
        assert_one_sentence(error, f"{tmp_path / what / 'reference'} holds a reference cache with other {what}")


@pytest.mark.parametrize("recipe", ["sft", "dpo", "reward", "generate"])
def test_a_checkpoint_that_is_damaged(files, checkpoint, world, tmp_path, recipe):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (shard,) = broken.glob("*.safetensors")
    if recipe in ("sft", "generate"):
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    if recipe == "generate":
        prompts = (str(files / "prompts.jsonl"),)
        config = generate.GenerateConfig(output=str(tmp_path / "run"), model=str(broken), prompts=prompts)
        run = generate.run
    else:
        schema, run = {
            "sft": (sft.SFTConfig, sft.run),
            "dpo": (dpo.DPOConfig, dpo.run),
            "reward": (reward.RewardConfig, reward.run),
        }[recipe]
        file = "conversations.jsonl" if recipe == "sft" else "preferences.jsonl"
        config = config_of(schema, tmp_path, files, file=file, model=ModelConfig(path=str(broken)))
    with pytest.raises(ValueError) as error:
        run(config, world)
    assert_one_sentence(error, str(broken), "model.safetensors")


def test_evaluate_without_anything_to_evaluate_and_with_a_model_in_the_wrong_place(files, checkpoint, world, tmp_path):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate.run(evaluate.EvaluateConfig(output=str(tmp_path / "nothing")), world)
    config = evaluate.EvaluateConfig(
        output=str(tmp_path / "wrong"), reward_model=str(checkpoint), preferences=(str(files / "preferences.jsonl"),)
    )
    with pytest.raises(ValueError, match="is a language model, not a reward model"):
        evaluate.run(config, world)


def three_shards(world, config):
    try:
        sft.run(config, world)
    except ValueError as error:
        return str(error)
    return None


def test_a_world_size_that_does_not_divide_is_said_on_every_rank(files, tmp_path):
    messages = run_ranks(2, three_shards, sft_of(tmp_path, files, parallel=ParallelConfig(shard=3)))
    for message in messages:
        assert message is not None
        assert "parallel.shard = 3 does not divide the 2 processes" in message


def test_an_error_that_one_rank_meets_ends_all_ranks_without_a_hang(files, tmp_path):
    # Only rank 0 writes metrics; the other goes on into a collective and waits there.
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    write_config(sft_of(tmp_path, files), tmp_path / "sft.toml")
    process = torchrun("sft", tmp_path / "sft.toml", timeout=180)
    assert process.returncode != 0
    sentences = [line for line in process.stderr.splitlines() if "error: " in line and "metrics.jsonl" in line]
    assert len(sentences) == 1, process.stderr
    assert sentences[0].startswith("[rank 0] error: ")
    for ours in ("recipes", "umedtrain"):
        assert f'File "{ROOT}/{ours}' not in process.stderr, process.stderr


def test_a_prompt_without_room_for_an_answer_is_named_by_its_line(files, checkpoint, world, tmp_path):
    rows = [{"prompt": "What is it?"}, {"prompt": "fever " * 2000}]
    write_rows(tmp_path / "prompts.jsonl", rows)
    config = generate.GenerateConfig(
        output=str(tmp_path / "run"), model=str(checkpoint), prompts=(str(tmp_path / "prompts.jsonl"),), dtype="float32"
    )
    with pytest.raises(ValueError) as error:
        generate.run(config, world)
    assert_one_sentence(error, "prompts.jsonl, line 2", "no room for an answer")
