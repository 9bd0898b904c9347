import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.material import EDGES, MEDICAL, SPELLED, llama2_style, small_sentencepiece
from umedtrain.text import sentencepiece_proto as proto
from umedtrain.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from umedtrain.text.tokenizer import encode_continued, load_tokenizer

LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request, tmp_path_factory):
    return small_sentencepiece(tmp_path_factory.mktemp("sp"), model_type=request.param)


def test_trained_model_has_llama3_specials(trained):
    assert trained.vocab_size == 420
    assert list(trained.special_tokens) == [
        "<unk>",
        *LLAMA3[:2],
        "<|finetune_right_pad_id|>",
        *LLAMA3[2:],
    ]
    assert trained.bos_id == 1
    assert trained.eos_ids == (6, 2)
    assert trained.chat_template == "llama3"


@pytest.mark.parametrize("text", MEDICAL + EDGES + SPELLED)
def test_trained_model_is_lossless(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not set(ids) & set(trained.special_tokens.values())
    assert encode_continued(trained, text) == ids


def test_lossless_on_any_text(trained):
    @settings(max_examples=300, deadline=None)
    @given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\u2581<|>_\x00a")), max_size=50))
    def check(text):
        assert trained.decode(trained.encode(text)) == text

    check()


def test_line_breaks_stay_alone(trained):
    line_break = trained.encode("\n")
    assert len(line_break) == 1
    for text in MEDICAL:
        assert trained.encode("\n\n" + text) == line_break * 2 + trained.encode(text)


def test_training_is_deterministic_and_learns(tmp_path):
    a = train_sentencepiece(MEDICAL * 8, tmp_path / "a", vocab_size=400)
    b = train_sentencepiece(iter(MEDICAL * 8), tmp_path / "b", vocab_size=400, seed=5)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(a.encode(MEDICAL[2])) < 0.8 * len(MEDICAL[2].encode())
    texts = [f"title number {n} of lens" for n in range(500)]
    drawn = [train_sentencepiece(texts, tmp_path / "c", vocab_size=300, max_texts=20, seed=s) for s in (1, 1, 2)]
    assert drawn[0].serialized == drawn[1].serialized
    assert drawn[0].serialized != drawn[2].serialized
    assert b.vocab_size == 400


def test_long_training_lines_are_used(tmp_path):
    long = train_sentencepiece(["fever " * 5000, "x" * 9000], tmp_path / "m", vocab_size=285)
    assert len(long.encode("fever")) == 1


def test_training_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece([" \n", ""], tmp_path / "m", vocab_size=300)
    with pytest.raises(ValueError, match="vocab_size=100 does not suit"):
        train_sentencepiece(MEDICAL, tmp_path / "m", vocab_size=100)
    with pytest.raises(ValueError, match="vocab_size=90000 does not suit"):
        train_sentencepiece(MEDICAL, tmp_path / "m", vocab_size=90_000)


def test_llama2_style_equals_sentencepiece(tmp_path):
    path = llama2_style(tmp_path)
    ours, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in MEDICAL + EDGES + SPELLED:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.bos_id, ours.eos_ids, ours.chat_template) == (1, (2,), "plain")
    assert ours.encode("Insulin")[0] != encode_continued(ours, "Insulin")[0]
    ids = [1, *encode_continued(ours, " Insulin"), 2]
    assert ours.decode(ids) == "<s> Insulin</s>"
    assert ours.decode(ids, skip_special=True) == " Insulin"


@pytest.mark.parametrize("kind", ["user_defined_symbols", "control_symbols"])
def test_spelled_specials_stay_text_in_foreign_models(tmp_path, kind):
    path = llama2_style(tmp_path, **{kind: LLAMA3})
    ours, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert ours.special_id("<|eot_id|>") == theirs.piece_to_id("<|eot_id|>")
    assert ours.chat_template == "llama3"
    assert (ours.special_id("<|eot_id|>") in theirs.encode("x<|eot_id|>")) == (kind == "user_defined_symbols")
    for text in SPELLED:
        ids = ours.encode(text)
        assert not set(ids) & set(ours.special_tokens.values())
        assert ours.decode(ids) == text
    for text in MEDICAL:
        assert ours.encode(text) == theirs.encode(text)


def test_ordinary_user_defined_pieces_still_match(tmp_path):
    tokenizer = load_tokenizer(llama2_style(tmp_path, user_defined_symbols=["mmol/L", "\n"]))
    piece = [p.text for p in tokenizer.model.pieces].index("mmol/L")
    assert piece in tokenizer.encode("5 mmol/L")
    assert tokenizer.special_id("mmol/L") is None


def test_proto_reading_agrees_with_the_library(trained):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained.serialized)
    for i, piece in enumerate(trained.model.pieces):
        assert piece.text == theirs.id_to_piece(i)
        assert piece.score == pytest.approx(theirs.get_score(i), abs=0)
        assert (piece.type == proto.CONTROL) == theirs.is_control(i)
        assert (piece.type == proto.BYTE) == theirs.is_byte(i)
        assert (piece.type == proto.UNKNOWN) == theirs.is_unknown(i)
    model = trained.model
    assert (model.bos_id, model.eos_id, model.unk_id, model.pad_id) == (1, 2, 0, 3)
    assert model.byte_fallback
    assert not model.add_dummy_prefix
    assert not model.remove_extra_whitespaces


@pytest.mark.parametrize("keep", [1, 10, 500, -1])
def test_cut_model_is_refused(trained, keep):
    with pytest.raises(ValueError, match=r"my\.model: neither Llama-3's ranks nor a whole SentencePiece model"):
        SentencePieceTokenizer(trained.serialized[:keep], file="my.model")


def test_id_outside_the_vocabulary(trained):
    with pytest.raises(ValueError, match="Id 420 is outside the vocabulary of 420"):
        trained.decode([420])
    with pytest.raises(ValueError, match="surrogate"):
        trained.encode("\udc00")
