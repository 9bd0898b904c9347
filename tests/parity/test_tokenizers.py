"""Llama-3's real vocabulary against Meta's own tokenizer (package llama-models)."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.material import EDGES, MEDICAL, SPELLED
from umedtrain.text.export import save_tokenizer
from umedtrain.text.tokenizer import load_tokenizer

meta_tokenizer = pytest.importorskip("llama_models.llama3.tokenizer")
FILE = Path(meta_tokenizer.__file__).with_name("tokenizer.model")


@pytest.fixture(scope="module")
def ours():
    return load_tokenizer(FILE)


@pytest.fixture(scope="module")
def meta():
    return meta_tokenizer.Tokenizer(FILE)


def test_special_ids(ours, meta):
    assert ours.vocab_size == meta.n_words == 128_256
    assert ours.bos_id == meta.bos_id == 128_000
    assert set(ours.eos_ids) == set(meta.stop_tokens)
    assert ours.eos_ids[0] == meta.eot_id == 128_009
    assert ours.special_id("<|finetune_right_pad_id|>") == meta.pad_id == 128_004
    assert ours.special_id("<|python_tag|>") == meta.python_tag_id == 128_010
    for name, i in meta.special_tokens.items():
        # Meta has since given meanings to two reserved ids, so the numbers of later reserved names moved.
        if "reserved" not in name and name not in ("<|step_id|>", "<|image|>"):
            assert ours.special_id(name) == i
    assert sorted(ours.special_tokens.values()) == sorted(meta.special_tokens.values())


@pytest.mark.parametrize("text", MEDICAL + EDGES + SPELLED)
def test_same_ids(ours, meta, text):
    ids = ours.encode(text)
    assert ids == meta.encode(text, bos=False, eos=False)
    assert ours.decode(ids) == text == meta.decode(ids)


def test_same_ids_on_any_text(ours, meta):
    @settings(max_examples=300, deadline=None)
    @given(st.text(max_size=80))
    def check(text):
        assert ours.encode(text) == meta.encode(text, bos=False, eos=False)

    check()


@pytest.mark.parametrize(
    "unit", ["x", " ", "ab\u3000", "word ", "x" * 25_001 + " ", " " * 24_999 + "y" * 25_003, "\x1c", "1"]
)
def test_long_texts_are_cut_in_the_same_places(ours, meta, unit):
    text = "ab " + unit * (420_000 // len(unit))
    assert ours.encode(text) == meta.encode(text, bos=False, eos=False)


def test_random_runs_are_cut_in_the_same_places(ours, meta):
    rng = random.Random(0)
    text = "".join(rng.choice(" \n\txyé") * rng.choice([1, 7, 24_999, 25_000, 25_001, 50_001]) for _ in range(30))
    assert ours.encode(text) == meta.encode(text, bos=False, eos=False)


def test_exported_vocabulary_in_transformers(ours, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(ours, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes().split() == FILE.read_bytes().split()
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert len(theirs) == again.vocab_size == 128_256
    rng = random.Random(1)
    runs = ["".join(rng.choice("a =-e\n.") for _ in range(rng.randrange(40))) for _ in range(300)]
    runs += [character * n for character in "a= -\n.e0x" for n in range(1, 70)]
    for text in MEDICAL + EDGES + runs:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert again.encode(text) == ids
    for text in SPELLED:
        assert again.encode(text) == ours.encode(text)
