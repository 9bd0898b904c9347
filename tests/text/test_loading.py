import json
import subprocess
import sys
import warnings

import pytest

from tests.text.material import MEDICAL, chatml_json, llama2_style, small_sentencepiece
from umedtrain.text.hf_json import HFTokenizer
from umedtrain.text.sentencepiece import SentencePieceTokenizer
from umedtrain.text.specials import SMOLLM2_SYSTEM
from umedtrain.text.tokenizer import Tokenizer, load_tokenizer


def test_directory_and_file(tmp_path):
    made = small_sentencepiece(tmp_path)
    (tmp_path / "bpe.model").rename(tmp_path / "tokenizer.model")
    for path in (tmp_path, tmp_path / "tokenizer.model", str(tmp_path)):
        loaded = load_tokenizer(path)
        assert isinstance(loaded, SentencePieceTokenizer)
        assert isinstance(loaded, Tokenizer)
        assert loaded.encode(MEDICAL[0]) == made.encode(MEDICAL[0])
    chatml_json(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), HFTokenizer)


def test_without_the_tokenizers_library(tmp_path, monkeypatch):
    small_sentencepiece(tmp_path)
    (tmp_path / "bpe.model").rename(tmp_path / "tokenizer.model")
    chatml_json(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ImportError, match=r"umedtrain\[hf\]"):
        load_tokenizer(tmp_path)


def test_importing_needs_no_tokenizer_library():
    code = (
        "import sys, umedtrain.text.tokenizer, umedtrain.text.chat, umedtrain.text.export;"
        "print([m for m in ('tiktoken', 'sentencepiece', 'tokenizers', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"", "is empty"),
        ("tokenizer.model", b" \n\n", "is empty"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        ("tokenizer.model", b"\x0a\x05hello", "nor a whole SentencePiece model"),
        ("tokenizer.model", b"\x00\xff\x10garbage", "nor a whole SentencePiece model"),
        ("tokenizer.model", b"just some words", "nor a whole SentencePiece model"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vo', "not valid JSON"),
        ("tokenizer.json", b'{"hello": 1}', "has no 'model' entry"),
        ("tokenizer.json", b'{"model": {"type": "Nonsense"}}', "cannot load it"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}}', "cannot load it"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match=message) as error:
            load_tokenizer(path)
        assert str(file) in str(error.value)


def test_missing_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="no/such"):
        load_tokenizer("no/such")
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    chatml_json(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list, not an object"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("jinja", "name"),
    [
        ("... Cutting Knowledge Date ... <|start_header_id|>", "llama3.1"),
        ("x <|start_header_id|> y", "llama3"),
        (f"<|im_start|> {SMOLLM2_SYSTEM}", "chatml"),
        ("{{ 'User:\\n' }}", "plain"),
        (None, "chatml"),
    ],
)
def test_template_by_jinja(tmp_path, jinja, name):
    chatml_json(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.write_text(json.dumps({"chat_template": jinja}))
        assert load_tokenizer(tmp_path).chat_template == name
        named = [{"name": "tool_use", "template": "<|start_header_id|>"}, {"name": "default", "template": jinja}]
        config.write_text(json.dumps({"chat_template": named}))
        assert load_tokenizer(tmp_path).chat_template == name
        if jinja:
            config.write_text("{}")
            (tmp_path / "chat_template.jinja").write_text(jinja)
            assert load_tokenizer(tmp_path).chat_template == name


def test_unknown_template_warns(tmp_path):
    llama2_style(tmp_path).rename(tmp_path / "tokenizer.model")
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ '[INST] ' }}"}))
    with pytest.warns(UserWarning, match=r"none that umedtrain renders.*'plain'"):
        assert load_tokenizer(tmp_path).chat_template == "plain"
    config.write_text(json.dumps({"chat_template": "<|im_start|>You are Q<|im_end|>"}))
    with pytest.warns(UserWarning, match=r"default system prompt"):
        assert load_tokenizer(tmp_path).chat_template == "chatml"
