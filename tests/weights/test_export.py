"""Writing Hugging Face directories: what is in them, and that they are whole or not there."""

import json
import resource

import pytest
import torch

from tests.weights.samples import TINY, assert_same_parameters, random_model
from umedtrain.model.heads import RewardModel
from umedtrain.weights import load_model, save_model, save_stream


class _Tokenizer:
    bos_id, eos_ids, vocab_size, chat_template = 1, (5, 3), 60, "plain"

    def __init__(self, **special):
        self.special = special

    def special_id(self, name: str) -> int | None:
        return self.special.get(name)


@pytest.fixture
def no_tokenizer_files(monkeypatch):
    def save(tokenizer, directory):
        (directory / "tokenizer.json").write_text("{}")

    monkeypatch.setattr("umedtrain.text.export.save_tokenizer", save)


def read(file):
    return json.loads(file.read_text())


def test_files_of_an_export(tmp_path, no_tokenizer_files):
    target = tmp_path / "deep" / "model"
    save_model(random_model(), target, tokenizer=_Tokenizer(**{"<pad>": 2}), dtype=torch.bfloat16)
    assert sorted(file.name for file in target.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [file.name for file in target.parent.iterdir()] == ["model"]
    config = read(target / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    for ids in (config, read(target / "generation_config.json")):
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, [5, 3], 2)
    modes = {file.stat().st_mode & 0o777 for file in target.iterdir()}
    assert len(modes) == 1, "weights must be as readable as the rest"


def test_end_of_turn_is_never_the_padding(tmp_path, no_tokenizer_files):
    save_model(random_model(), tmp_path / "model", tokenizer=_Tokenizer(**{"<pad>": 3}))
    assert "pad_token_id" not in read(tmp_path / "model" / "config.json")


def test_end_ids_of_a_loaded_model_are_kept(tmp_path):
    model = random_model()
    model.eos_ids = (4, 8)
    save_model(model, tmp_path / "model")
    assert load_model(tmp_path / "model").eos_ids == (4, 8)
    assert read(tmp_path / "model" / "generation_config.json")["eos_token_id"] == [4, 8]


def test_shards_and_index(tmp_path):
    model = random_model()
    save_stream(TINY, False, model.named_parameters(), tmp_path / "model", max_shard_bytes=4000)
    index = read(tmp_path / "model" / "model.safetensors.index.json")
    files = {file.name: file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files.keys()
    assert sorted(files) == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert index["metadata"]["total_size"] == 4 * TINY.num_parameters
    assert max(files.values()) < 4000 + 1000  # one tensor or 4000 bytes, and a header
    assert len(index["weight_map"]) == len(list(model.parameters()))


def test_only_one_shard_is_held_at_a_time(tmp_path):
    """Tensors that a stream yielded earlier are free once their file is written."""
    import weakref

    alive = []

    def stream():
        for name, parameter in random_model().named_parameters():
            tensor = parameter.detach().clone()
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            held = sum(ref().nbytes for ref in alive if ref() is not None)
            assert held <= 4000 + 60 * 16 * 4

    save_stream(TINY, False, stream(), tmp_path / "model", max_shard_bytes=4000)
    assert len(alive) == 21


def test_stream_in_any_order(tmp_path):
    model = random_model()
    save_stream(TINY, False, reversed(list(model.named_parameters())), tmp_path / "model")
    assert_same_parameters(load_model(tmp_path / "model"), model)


def test_views_are_written_alone(tmp_path):
    """A parameter that is a slice of a larger buffer, as sharded training has it."""
    model = random_model()
    buffer = torch.cat([parameter.flatten() for parameter in model.parameters()])
    pieces = buffer.split([parameter.numel() for parameter in model.parameters()])
    named = [
        (name, piece.view_as(parameter))
        for (name, parameter), piece in zip(model.named_parameters(), pieces, strict=True)
    ]
    save_stream(TINY, False, named, tmp_path / "model")
    assert_same_parameters(load_model(tmp_path / "model"), model)


def changed(edit):
    tensors = dict(random_model().named_parameters())
    edit(tensors)
    return list(tensors.items())


@pytest.mark.parametrize(
    "named, problem",
    [
        (changed(lambda t: t.pop("norm.weight")), "tensor norm.weight is missing"),
        (changed(lambda t: t.update(extra=torch.ones(1))), "extra: unexpected tensor"),
        (
            changed(lambda t: t.update({"norm.weight": torch.ones(3)})),
            "norm.weight: shape [3] found, [16] wanted by the config",
        ),
        (changed(lambda t: None) * 2, "embed_tokens.weight was given twice"),
        ([], "tensor embed_tokens.weight is missing (and 20 more such problems)"),
    ],
)
def test_streams_that_are_not_the_model(named, problem, tmp_path):
    with pytest.raises(ValueError) as error:
        save_stream(TINY, False, named, tmp_path / "model")
    assert problem in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced(tmp_path):
    target = tmp_path / "model"
    save_model(random_model(), target)
    (target / "left.over").write_text("x")
    save_model(random_model(RewardModel, seed=1), target)
    assert_same_parameters(load_model(target), random_model(RewardModel, seed=1))
    assert not (target / "left.over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_directory_is_taken(tmp_path):
    save_model(random_model(), tmp_path)
    assert_same_parameters(load_model(tmp_path), random_model())


@pytest.mark.parametrize("name, text", [("notes.txt", "mine"), ("config.json", "{}"), ("config.json", "[]")])
def test_what_is_not_an_export_is_not_touched(name, text, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text(text)
    with pytest.raises(ValueError, match="was not written by umedtrain"):
        save_model(random_model(), tmp_path / "model")
    assert (tmp_path / "model" / name).read_text() == text


def test_failure_half_way_keeps_the_earlier_export(tmp_path):
    save_model(random_model(), tmp_path / "model")

    def stream():
        yield from list(random_model(seed=1).named_parameters())[:5]
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        save_stream(TINY, False, stream(), tmp_path / "model")
    assert_same_parameters(load_model(tmp_path / "model"), random_model())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_leavings_of_a_killed_export_are_cleared(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "config.json").write_text("half")
    save_model(random_model(), tmp_path / "model")
    assert_same_parameters(load_model(tmp_path / "model"), random_model())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_full_disk(tmp_path):
    """A file that cannot grow: one OSError that names the place, and the earlier export stays."""
    save_model(random_model(), tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match="could not be written") as error:
            save_model(random_model(seed=1), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(error.value)
    assert_same_parameters(load_model(tmp_path / "model"), random_model())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
