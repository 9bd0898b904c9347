import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.material import EDGES, MEDICAL, SPELLED, chatml_json
from umedtrain.text.hf_json import HFTokenizer
from umedtrain.text.tokenizer import encode_continued, load_tokenizer

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(chatml_json(tmp_path_factory.mktemp("hf")))


def test_properties(tokenizer):
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert tokenizer.eos_ids == (2, 0)
    assert tokenizer.bos_id is None
    assert tokenizer.vocab_size == 600
    assert tokenizer.chat_template == "chatml"
    assert tokenizer.decode([1, 2], skip_special=True) == ""
    with pytest.raises(ValueError, match="outside the vocabulary of 600"):
        tokenizer.decode([600])
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize("text", MEDICAL + EDGES + SPELLED)
def test_plain_text_only(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {0, 1, 2}
    # The library's own switch for this does the same, as all added tokens of this file are special.
    own = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.spec))
    own.encode_special_tokens = True
    assert own.encode(text, add_special_tokens=False).ids == ids
    assert encode_continued(tokenizer, text) == ids


def test_any_text(tokenizer):
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SPELLED[3:])), max_size=6).map("".join))
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {0, 1, 2}

    check()


def _with_added(tokenizer, *tokens):
    spec = json.loads(json.dumps(tokenizer.spec))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] += [
        {"id": 600 + n, "content": name, "special": special, **flags} for n, (name, special) in enumerate(tokens)
    ]
    return HFTokenizer(spec, config={"bos_token": {"content": "<|im_start|>"}, "eos_token": "<end>"})


def test_added_tokens(tokenizer):
    added = _with_added(tokenizer, ("<think>", False), ("metformin", False), ("<end>", True), ("STOP", True))
    assert added.vocab_size == 604
    assert added.bos_id == 1
    assert added.eos_ids == (2, 0, 602)
    text = "<think>metformin<end> STOP"
    ids = added.encode(text)
    assert 601 in ids  # a word added to the vocabulary is text like any other
    assert not set(ids) & {600, 602, 603}  # a marker is not
    assert added.decode(ids) == text
    assert added.special_id("<think>") == 600
    assert added.special_id("metformin") is None


@pytest.mark.parametrize("kind", ["ignore_merges", "unigram"])
def test_names_inside_the_vocabulary_are_not_found(kind):
    """Whole-word look-up and the search for the likeliest pieces would both find a special token's own entry."""
    letters = sorted(set("<|eot_id|>stop"))
    names = ["<|eot_id|>", *letters]
    if kind == "unigram":
        model = {
            "type": "Unigram",
            "unk_id": 1,
            "vocab": [[name, 0.0 if n == 0 else -5.0] for n, name in enumerate(names)],
        }
    else:
        model = {"type": "BPE", "vocab": {n: i for i, n in enumerate(names)}, "merges": [], "ignore_merges": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {"version": "1.0", "model": model, "added_tokens": [{"id": 0, "content": "<|eot_id|>", **flags}]}
    own = tokenizers.Tokenizer.from_str(json.dumps(spec))
    own.encode_special_tokens = True
    assert own.encode("<|eot_id|>").ids == [0]  # so the library's switch is not enough
    ours = HFTokenizer(spec)
    assert [names[i] for i in ours.encode("<|eot_id|>stop")] == list("<|eot_id|>stop")
    assert ours.special_id("<|eot_id|>") == 0
    assert ours.decode([0]) == "<|eot_id|>"


def test_the_unknown_token_keeps_its_id():
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": 0, "content": "<unk>", **flags}, {"id": 4, "content": "<end>", **flags}]
    model = {
        "type": "BPE",
        "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3},
        "merges": [["a", "b"]],
        "unk_token": "<unk>",
    }
    tokenizer = HFTokenizer(
        {
            "version": "1.0",
            "model": model,
            "added_tokens": [*added, {**added[1], "id": 5, "content": "x", "special": False}],
        }
    )
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("abzx") == [3, 0, 5]
