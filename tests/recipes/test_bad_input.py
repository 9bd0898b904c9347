"""Bad input: one clear sentence that names what to mend, on every rank, and no hang."""

import dataclasses
import json
import shutil

import pytest

from tests.ranks import run_ranks
from tests.recipes.material import ROOT, conversation, torchrun, write_rows
from umedtrain.config import BatchConfig, DataConfig, LogConfig, ModelConfig, ParallelConfig, load_config, write_config
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
