"""Reading Hugging Face directories, whole ones and broken ones."""

import json
from pathlib import Path

import pytest
import torch

from tests.weights.samples import assert_same_parameters, edit_safetensors, random_model
from umedtrain.model.heads import RewardModel
from umedtrain.model.llama import Llama
from umedtrain.weights import CheckpointError, load_model, open_checkpoint, save_model, save_stream

INDEX = "model.safetensors.index.json"


@pytest.fixture
def whole(tmp_path):
    """A checkpoint in one file."""
    save_model(random_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    """The same in several files."""
    model = random_model()
    save_stream(model.config, False, model.named_parameters(), tmp_path / "model", max_shard_bytes=4000)
    return tmp_path / "model"


@pytest.mark.parametrize("kind", [Llama, RewardModel])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(kind, tied, tmp_path):
    model = random_model(kind, tie_word_embeddings=tied)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert type(loaded) is kind
    assert loaded.config == model.config
    assert_same_parameters(loaded, model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_shards(sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert_same_parameters(load_model(sharded), random_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype, whole):
    loaded = load_model(whole, dtype=dtype)
    for found, wanted in zip(loaded.parameters(), random_model().parameters(), strict=True):
        assert torch.equal(found, wanted.to(dtype))


def test_names_are_the_models_in_its_order(sharded):
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.names == tuple(name for name, _ in random_model().named_parameters())
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.norm\.weight'"):
        checkpoint.tensor("model.norm.weight")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_tensors_are_views_of_the_file(whole):
    """Taking a few rows must not read the tensor: its storage is the mapped file, not memory of its own."""
    tensor = open_checkpoint(whole).tensor("embed_tokens.weight")
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            assert line.endswith("model.safetensors")
            return
    raise AssertionError("the tensor's address is not mapped")


def test_end_ids_are_the_union_of_both_files(whole):
    edit_json(whole / "config.json", eos_token_id=[5, 7], bos_token_id=1, pad_token_id=2)
    edit_json(whole / "generation_config.json", eos_token_id=9)
    checkpoint = open_checkpoint(whole)
    assert (checkpoint.eos_ids, checkpoint.bos_id, checkpoint.pad_id) == ((9, 5, 7), 1, 2)
    assert load_model(whole).eos_ids == (9, 5, 7)


def test_tied_checkpoint_that_repeats_the_embedding(tmp_path):
    model = random_model(tie_word_embeddings=True)
    save_model(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    edit_safetensors(file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same_parameters(load_model(tmp_path / "model"), model)
    edit_safetensors(file, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(tmp_path / "model")


def test_rotary_constants_of_old_files_are_ignored(whole):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_safetensors(whole / "model.safetensors", lambda t: t.update({name: torch.ones(2)}))
    assert_same_parameters(load_model(whole), random_model())


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def first_shard(directory):
    return min(directory.glob("*.safetensors"))


def edit_whole(edit):
    return lambda directory: edit_safetensors(directory / "model.safetensors", edit)


def only_bin(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


Q = "model.layers.1.self_attn.q_proj.weight"
BROKEN_WHOLE = {
    "no_config": (lambda d: (d / "config.json").unlink(), "neither config.json"),
    "config_not_json": (lambda d: (d / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "config_is_a_list": (lambda d: (d / "config.json").write_text("[]"), "config.json: holds a list"),
    "no_weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors.index.json nor"),
    "bin_file": (only_bin, "pytorch_model*.bin files are not read"),
    "truncated": (lambda d: cut(d / "model.safetensors"), "model.safetensors: damaged or incomplete"),
    "empty": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        "model.safetensors: damaged or incomplete",
    ),
    "not_safetensors": (lambda d: (d / "model.safetensors").write_text("x" * 99), "damaged or incomplete"),
    "missing": (edit_whole(lambda t: t.pop(Q)), "tensor model.layers.1.self_attn.q_proj.weight is missing"),
    "untied_without_head": (edit_whole(lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
    "unexpected": (
        edit_whole(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})),
        "model.safetensors: model.layers.0.self_attn.q_proj.bias: unexpected tensor",
    ),
    "wrong_shape": (
        edit_whole(lambda t: t.update({Q: torch.ones(8, 16)})),
        f"model.safetensors: {Q}: shape [8, 16] found, [16, 16] wanted",
    ),
    "transposed": (
        edit_whole(lambda t: t.update({"lm_head.weight": torch.ones(16, 60)})),
        "lm_head.weight: shape [16, 60] found, [60, 16] wanted",
    ),
    "another_vocabulary": (
        lambda d: edit_json(d / "config.json", vocab_size=64),
        "model.embed_tokens.weight: shape [60, 16] found, [64, 16] wanted by the config (and 1 more such",
    ),
    "quantised": (
        edit_whole(lambda t: t.update({Q: torch.ones(16, 16, dtype=torch.int8)})),
        f"model.safetensors: tensor {Q} has dtype I8; quantised",
    ),
    "eos_is_text": (
        lambda d: edit_json(d / "generation_config.json", eos_token_id="</s>"),
        "generation_config.json: eos_token_id must be an id",
    ),
}
BROKEN_SHARDED = {
    "missing_shard": (
        lambda d: first_shard(d).unlink(),
        "no such shard, but model.safetensors.index.json says",
    ),
    "truncated_shard": (lambda d: cut(first_shard(d)), "model-00001-of-"),
    "no_weight_map": (lambda d: (d / INDEX).write_text("{}"), "weight_map is missing or empty"),
    "tensor_not_in_its_shard": (
        lambda d: edit_safetensors(first_shard(d), lambda t: t.pop("model.embed_tokens.weight")),
        "tensor model.embed_tokens.weight is missing, though model.safetensors.index.json lists it",
    ),
    "tensor_in_two_shards": (
        lambda d: edit_safetensors(first_shard(d), lambda t: t.update({"lm_head.weight": torch.ones(60, 16)})),
        "tensor lm_head.weight is also in model-000",
    ),
}


@pytest.mark.parametrize("case", BROKEN_WHOLE)
def test_broken_whole(case, whole):
    damage, problem = BROKEN_WHOLE[case]
    damage(whole)
    assert_refused(whole, problem)


@pytest.mark.parametrize("case", BROKEN_SHARDED)
def test_broken_sharded(case, sharded):
    damage, problem = BROKEN_SHARDED[case]
    damage(sharded)
    assert_refused(sharded, problem)


def assert_refused(directory, problem):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(directory)
    assert problem in str(error.value)
    assert str(error.value).startswith(str(directory))
    assert "\n" not in str(error.value)


def test_reward_model_with_two_labels(tmp_path):
    save_model(random_model(RewardModel), tmp_path / "model")
    edit_safetensors(tmp_path / "model" / "model.safetensors", lambda t: t.update({"score.weight": torch.ones(2, 16)}))
    with pytest.raises(CheckpointError, match=r"score\.weight: shape \[2, 16\] found, \[1, 16\] wanted"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["nothing", "file.bin"])
def test_paths_that_are_no_checkpoint(name, tmp_path):
    (tmp_path / "file.bin").write_text("x")
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        open_checkpoint(tmp_path / name)
