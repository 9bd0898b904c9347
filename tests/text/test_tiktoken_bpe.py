import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.material import EDGES, MEDICAL, SPELLED
from umedtrain.text.specials import llama3_specials
from umedtrain.text.tiktoken_bpe import (
    MAX_RUN,
    TiktokenTokenizer,
    cut_long_runs,
    dump_ranks,
    looks_like_ranks,
    parse_ranks,
)
from umedtrain.text.tokenizer import load_tokenizer

RANKS = {bytes([byte]): byte for byte in range(256)} | {b"in": 256, b"su": 257, b"insu": 258, b"  ": 259, b"lin": 260}


@pytest.fixture(scope="module")
def tokenizer():
    return TiktokenTokenizer(RANKS)


def test_specials_follow_the_ranks(tokenizer):
    assert tokenizer.vocab_size == 261 + 256
    assert tokenizer.bos_id == 261
    assert tokenizer.eos_ids == (270, 262, 269)
    names = llama3_specials()
    assert len(names) == len(set(names)) == 256
    assert names[5] == "<|reserved_special_token_2|>"
    assert names[255] == "<|reserved_special_token_247|>"
    assert tokenizer.special_id("<|finetune_right_pad_id|>") == 265
    assert tokenizer.special_id("<|no_such|>") is None
    assert tokenizer.chat_template == "llama3"


@pytest.mark.parametrize("text", MEDICAL + EDGES + SPELLED)
def test_round_trip_without_specials(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i < 261 for i in ids)


def test_round_trip_of_any_text(tokenizer):
    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=60))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_decode_writes_or_leaves_out_specials(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("insulin"), tokenizer.eos_ids[0]]
    assert tokenizer.decode(ids) == "<|begin_of_text|>insulin<|eot_id|>"
    assert tokenizer.decode(ids, skip_special=True) == "insulin"
    with pytest.raises(ValueError, match="Id 517 is outside the vocabulary of 517"):
        tokenizer.decode([517])
    with pytest.raises(ValueError, match="Id -1 is outside"):
        tokenizer.decode([-1])


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"U\+D83D.*character 3"):
        tokenizer.encode("abc\ud83d")
    with pytest.raises(TypeError, match="not bytes"):
        tokenizer.encode(b"abc")


def test_cut_places():
    run, white = "x" * (2 * MAX_RUN + 3), " " * (MAX_RUN + 1)
    assert [len(part) for part in cut_long_runs(run)] == [MAX_RUN, MAX_RUN, 3]
    assert [len(part) for part in cut_long_runs("ab" + white + "c")] == [2 + MAX_RUN, 2]
    assert list(cut_long_runs("a b")) == ["a b"]
    assert "".join(cut_long_runs("word " * 200_000)) == "word " * 200_000


@pytest.mark.parametrize("unit", ["x", " ", "\n", "µ", "1", "=-", "word and "])
def test_very_long_input_encodes(tokenizer, unit):
    text = unit * (450_000 // len(unit))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_file_round_trip(tmp_path, tokenizer):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(dump_ranks(RANKS))
    assert looks_like_ranks(file.read_bytes())
    loaded = load_tokenizer(file)
    assert isinstance(loaded, TiktokenTokenizer)
    assert loaded.encode(MEDICAL[0]) == tokenizer.encode(MEDICAL[0])
    assert isinstance(load_tokenizer(tmp_path), TiktokenTokenizer)


def _line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dump_ranks(RANKS) + b"zzz\n", r"f:262: not 'base64 rank'"),
        (dump_ranks(RANKS) + b"%%%% 261\n", r"f:262: not 'base64 rank'"),
        (dump_ranks(RANKS) + _line(b"in", 261), r"f:262: rank 261 .* repeated"),
        (dump_ranks(RANKS) + _line(b"new", 300), r"f:262: rank 300 where 261 was due"),
        (dump_ranks(RANKS)[:900], r"f:\d+: not 'base64 rank'|single bytes have no rank"),
        (_line(b"a", 0), r"255 single bytes have no rank \(first 0x00\)"),
    ],
)
def test_damaged_ranks_name_file_and_line(content, message):
    with pytest.raises(ValueError, match=message):
        parse_ranks(content, file="f")
