import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.material import DIALOGS, EDGES, MEDICAL, SPELLED, chatml_json, llama2_style, small_sentencepiece
from umedtrain.text.chat import render_chat
from umedtrain.text.export import save_tokenizer
from umedtrain.text.sentencepiece import train_sentencepiece
from umedtrain.text.tiktoken_bpe import TiktokenTokenizer
from umedtrain.text.tokenizer import load_tokenizer

pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

KINDS = ["tiktoken", "bpe", "unigram", "llama2", "chatml"]
# Ranks with overlapping ways to the same token, so that the order of merges shows.
RUNS = ["aa", "aaa", "aaaa", "ab", "ba", "aba", "  ", "   ", "    ", "\n\n", "==", "====", "in", "su", "insu", "lin"]
RANKS = {bytes([byte]): byte for byte in range(256)} | {text.encode(): 256 + n for n, text in enumerate(RUNS)}


def _make(kind, directory):
    if kind == "tiktoken":
        return TiktokenTokenizer(RANKS)
    if kind == "llama2":
        return load_tokenizer(llama2_style(directory))
    if kind == "chatml":
        return load_tokenizer(chatml_json(directory))
    return small_sentencepiece(directory, model_type=kind)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """(kind, our tokenizer, its directory, transformers' tokenizer, ours read back)."""
    directory = tmp_path_factory.mktemp(request.param)
    tokenizer = _make(request.param, directory)
    out = directory / "export" / "deep"
    save_tokenizer(tokenizer, out)
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))  # as beside a saved model
    return request.param, tokenizer, out, transformers.AutoTokenizer.from_pretrained(out), load_tokenizer(out)


def test_sizes_and_names(exported):
    kind, ours, directory, theirs, again = exported
    assert ours.vocab_size == again.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_ids, ours.chat_template) == (again.bos_id, again.eos_ids, again.chat_template)
    assert ours.special_tokens == again.special_tokens
    assert theirs.bos_token_id == ours.bos_id
    assert theirs.eos_token_id == ours.eos_ids[0]
    assert theirs.pad_token_id == ours.special_id("<|finetune_right_pad_id|>")
    for name, i in ours.special_tokens.items():
        assert theirs.convert_tokens_to_ids(name) == i
    assert (directory / "tokenizer.model").is_file() == (kind != "chatml")
    assert json.loads((directory / "special_tokens_map.json").read_text())["eos_token"] == theirs.eos_token


def test_the_model_file_is_the_same_tokenizer(exported):
    kind, ours, directory, _, _ = exported
    model = load_tokenizer(directory / ("tokenizer.json" if kind == "chatml" else "tokenizer.model"))
    assert type(model) is type(ours)
    for text in MEDICAL + EDGES + SPELLED:
        assert model.encode(text) == ours.encode(text)


@pytest.mark.parametrize("text", MEDICAL + EDGES)
def test_same_ids(exported, text):
    kind, ours, _, theirs, again = exported
    if kind == "llama2" and text.startswith((" ", "\u2581")):
        return  # as Llama-2's own tokenizer.json: see save_tokenizer
    ids = ours.encode(text)
    assert again.encode(text) == ids
    assert again.decode(ids) == ours.decode(ids)
    if "\u2581" not in text or kind in ("tiktoken", "chatml", "llama2"):
        assert theirs.encode(text, add_special_tokens=False) == ids
        bos = [] if ours.bos_id is None else [ours.bos_id]
        assert theirs.encode(text) == bos + ids


@pytest.mark.parametrize("text", SPELLED)
def test_read_back_keeps_spelled_specials_as_text(exported, text):
    _, ours, _, _, again = exported
    assert again.encode(text) == ours.encode(text)


def test_same_ids_on_any_text(exported):
    kind, ours, _, theirs, again = exported
    pieces = st.sampled_from(["a", "aa", "b", " ", "=", "\n", "insulin", "mmol/L ", "3", "é", "🙂", "<0x0A>", "\x00"])

    @settings(max_examples=150, deadline=None)
    @given(st.one_of(st.lists(pieces, max_size=30).map("".join), st.text(max_size=30)))
    def check(text):
        if "\u2581" in text or (kind == "llama2" and text.startswith(" ")):
            return
        ids = ours.encode(text)
        assert again.encode(text) == ids
        assert theirs.encode(text, add_special_tokens=False) == ids

    check()


def test_runs_are_cut_alike(tmp_path):
    """A result with several ways to make it: the order among them decides how a run is cut."""
    rng = random.Random(0)
    lines = [
        "".join(rng.choice(["aa", "a", "ab", "aba", "--", "-"]) for _ in range(rng.randrange(40))) for _ in range(400)
    ]
    tokenizer = train_sentencepiece(lines, tmp_path / "m", vocab_size=330)
    for made in (tokenizer, TiktokenTokenizer(RANKS)):
        save_tokenizer(made, tmp_path)
        again = load_tokenizer(tmp_path)
        for text in (
            *lines,
            *("a" * n for n in range(40)),
            *("ab" * n for n in range(20)),
            *("=" * n for n in range(20)),
        ):
            assert again.encode(text) == made.encode(text)


TEMPLATES = {"tiktoken": ["llama3", "llama3.1", "plain"], "llama2": ["plain"], "chatml": ["chatml", "plain"]}


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("kind", ["tiktoken", "bpe", "llama2", "chatml"])
def test_chat_template(tmp_path, kind, trim):
    ours = _make(kind, tmp_path)
    for template in TEMPLATES.get(kind, TEMPLATES["tiktoken"]):
        save_tokenizer(ours, tmp_path / template, template=template, trim=trim)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / template)
        again = load_tokenizer(tmp_path / template)
        assert again.chat_template == template
        for messages in DIALOGS:
            for prompt in {False, messages[-1]["role"] != "assistant"}:
                options = {"add_generation_prompt": prompt}
                ids, mask = render_chat(messages, ours, template=template, trim=trim, **options)
                assert render_chat(messages, again, trim=trim, **options) == (ids, mask)
                if trim is False and any(m["content"][:1] in ("\n", " ") for m in messages):
                    continue  # then the header's line break and the content's are one text for transformers
                assert theirs.apply_chat_template(messages, return_dict=False, **options) == ids
        if template == "llama3.1":
            dated = theirs.apply_chat_template(DIALOGS[1], date_string="3 Mar 2025", return_dict=False)
            assert dated == render_chat(DIALOGS[1], ours, template=template, trim=trim, date="3 Mar 2025")[0]


def test_what_cannot_be_written_exactly_is_refused(tmp_path):
    import sentencepiece

    prefix = tmp_path / "nfkc"
    lines = tmp_path / "lines"
    lines.write_text("\n".join(MEDICAL * 8))
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(prefix), vocab_size=420, byte_fallback=True, model_type="bpe", minloglevel=2
    )
    with pytest.raises(ValueError, match="normalises text"):
        save_tokenizer(load_tokenizer(f"{prefix}.model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="cannot write a str"):
        save_tokenizer("tokenizer", tmp_path / "out")
