"""Any format -> a Hugging Face directory with its tokenizer (GGUF: test_gguf.py)."""

import base64
import json

import pytest
import torch

from tests.weights.samples import assert_same_parameters, random_model
from tests.weights.test_meta import meta_state, split, write
from umedtrain.model.heads import RewardModel
from umedtrain.text.tokenizer import load_tokenizer
from umedtrain.weights import CheckpointError, convert, load_model, save_model

TOKENIZER_FILES = {"tokenizer.json": '{"odd": 1}', "tokenizer_config.json": "{ }", "chat_template.jinja": "{{ x }}"}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_hugging_face(dtype, tmp_path):
    """Files of a tokenizer are copied byte for byte, and ids are kept."""
    model = random_model()
    model.eos_ids = (7, 9)
    save_model(model, tmp_path / "source")
    for name, text in TOKENIZER_FILES.items():
        (tmp_path / "source" / name).write_text(text)
    convert(tmp_path / "source", tmp_path / "target", dtype=dtype)
    for name, text in TOKENIZER_FILES.items():
        assert (tmp_path / "target" / name).read_text() == text
    loaded = load_model(tmp_path / "target", dtype=dtype or torch.float32)
    assert_same_parameters(loaded, model if dtype is None else model.to(dtype))
    assert loaded.eos_ids == (7, 9)


def test_reward_model_without_tokenizer(tmp_path):
    model = random_model(RewardModel)
    save_model(model, tmp_path / "source")
    with pytest.warns(UserWarning, match="no tokenizer is there; only the weights are written"):
        convert(tmp_path / "source", tmp_path / "target")
    assert_same_parameters(load_model(tmp_path / "target"), model)


def write_ranks(file) -> None:
    """A tokenizer in Llama 3's format whose only tokens are the 256 bytes, and the 256 special ones."""
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    file.write_text("\n".join(lines) + "\n")


def test_meta(tmp_path):
    pytest.importorskip("tokenizers")
    write(tmp_path / "source", split(meta_state(vocab_size=512), 2), vocab_size=512, use_scaled_rope=True)
    write_ranks(tmp_path / "source" / "tokenizer.model")
    convert(tmp_path / "source", tmp_path / "target", rope_factor=32.0)
    loaded = load_model(tmp_path / "target")
    assert_same_parameters(loaded, random_model(vocab_size=512))
    assert loaded.config.rope_scaling.factor == 32.0
    before, after = load_tokenizer(tmp_path / "source" / "tokenizer.model"), load_tokenizer(tmp_path / "target")
    assert after.encode("glucose 5 mmol") == before.encode("glucose 5 mmol")
    raw = json.loads((tmp_path / "target" / "config.json").read_text())
    assert raw["bos_token_id"] == before.special_id("<|begin_of_text|>")
    assert set(raw["eos_token_id"]) == set(before.eos_ids) == set(loaded.eos_ids)


def test_tokenizer_larger_than_the_model(tmp_path):
    write(tmp_path / "source", [meta_state()])
    write_ranks(tmp_path / "source" / "tokenizer.model")
    with pytest.raises(CheckpointError, match="its tokenizer has 512 tokens, its model only 60 embeddings"):
        convert(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_taken_target_is_refused_before_any_work(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="was not written by umedtrain"):
        convert(tmp_path / "does_not_exist", tmp_path / "target")


def test_onto_itself(tmp_path):
    """The source stays readable to the end, for its replacement is built beside it."""
    model = random_model()
    save_model(model, tmp_path / "model")
    with pytest.warns(UserWarning, match="no tokenizer"):
        convert(tmp_path / "model", tmp_path / "model", dtype=torch.bfloat16)
    assert_same_parameters(load_model(tmp_path / "model", dtype=torch.bfloat16), model.bfloat16())
