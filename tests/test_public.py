"""The package as its users see it: what importing it costs, its public names at work, and the console command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import umedtrain as ut
from tests.text.material import small_sentencepiece
from umedtrain import cli, weights

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    "datasets",
    "flash_attn",
    "gguf",
    "huggingface_hub",
    "pyarrow",
    "scipy",
    "simple_icd_10_cm",
    "tensorboard",
    "tokenizers",
    "transformers",
    "trl",
)
DIALOG = [
    {"role": "user", "content": "What regulates blood glucose?"},
    {"role": "assistant", "content": "Insulin. So, the answer is A."},
]


def run(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess:
    """A fresh Python process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], input=text, capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny model and its tokenizer, saved."""
    directory = tmp_path_factory.mktemp("public")
    tokenizer = small_sentencepiece(directory)
    config = ut.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    model = ut.Llama(config)
    model.init_weights(seed=0)
    ut.save_model(model, directory / "model", tokenizer=tokenizer)
    return directory / "model"


@pytest.fixture(scope="module")
def model(saved):
    return ut.load_model(saved, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(saved):
    return ut.load_tokenizer(saved)


def test_import_takes_no_optional_package_and_no_gpu():
    program = f"""
import sys, torch
for function in ("_lazy_init", "init", "device_count", "is_available", "current_device"):
    def refuse(*arguments, name=function, **options):
        raise AssertionError("torch.cuda." + name + " was called")
    setattr(torch.cuda, function, refuse)
before = set(sys.modules)
import umedtrain
import umedtrain.cli
print(sorted(set({OPTIONAL!r}) & (set(sys.modules) - before)), torch.cuda.is_initialized())
"""
    result = run("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[] False"


def test_public_names():
    assert set(ut.__all__) >= {
        "Layout",
        "Llama",
        "RewardModel",
        "Sampler",
        "SamplingParams",
        "load_model",
        "load_tokenizer",
        "losses",
        "render_chat",
        "save_model",
        "token_logprobs",
    }
    for name in ut.__all__:
        assert getattr(ut, name) is not None
    assert all(callable(getattr(ut.losses, name)) for name in ("sft", "dpo", "bradley_terry"))


def test_tokenizer_and_chat(tokenizer, model):
    text = "Insulin regulates <|eot_id|> β-cells"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == model.config.vocab_size
    assert tokenizer.bos_id is not None
    assert tokenizer.eos_ids
    ids, loss_mask = ut.render_chat(DIALOG, tokenizer, add_generation_prompt=False)
    assert len(ids) == len(loss_mask)
    assert ids[0] == tokenizer.bos_id
    learned = [token for token, wanted in zip(ids, loss_mask, strict=True) if wanted]
    assert learned[-1] in tokenizer.eos_ids
    assert tokenizer.decode(learned[:-1]) == DIALOG[1]["content"]


def test_training_example(model, tokenizer):
    """A conversation's loss from the layout and the loss mask, with a gradient for every parameter."""
    ids, loss_mask = ut.render_chat(DIALOG, tokenizer)
    tokens_T, layout = torch.tensor(ids), ut.Layout.packed([len(ids)])
    hidden_TD = model(tokens_T, layout)
    rows_N = torch.tensor(loss_mask).nonzero()[:, 0] - 1
    logp_N = ut.token_logprobs(hidden_TD[rows_N], model.lm_head_weight, tokens_T[rows_N + 1])
    wanted_N = model.logits(hidden_TD).log_softmax(-1)[rows_N, tokens_T[rows_N + 1]]
    torch.testing.assert_close(logp_N, wanted_N, atol=1e-5, rtol=0)
    ut.losses.sft(logp_N).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad(set_to_none=True)
    none_N = ut.token_logprobs(hidden_TD[rows_N], model.lm_head_weight, torch.full_like(rows_N, -100))
    assert not none_N.any()


@torch.no_grad()
def test_tree_equals_packed(model):
    """A prompt and two answers; the prompt's last row appears once per answer."""
    tokens_T = torch.randint(0, model.config.vocab_size, (20,), generator=torch.Generator().manual_seed(1))
    prompt, first, second = tokens_T.split((10, 4, 6))
    hidden_TD = model(tokens_T, ut.Layout.tree([(10, None), (4, 0), (6, 0)]))
    rows_N = torch.tensor([9, *range(10, 13), 9, *range(14, 19)])
    found_N = ut.token_logprobs(hidden_TD[rows_N], model.lm_head_weight, tokens_T[10:])
    packed_T = torch.cat([prompt, first, prompt, second])
    packed_TD = model(packed_T, ut.Layout.packed([14, 16]))
    rows_N = torch.tensor([*range(9, 13), *range(14 + 9, 14 + 15)])
    wanted_N = ut.token_logprobs(packed_TD[rows_N], model.lm_head_weight, packed_T[rows_N + 1])
    torch.testing.assert_close(found_N, wanted_N, atol=1e-5, rtol=0)


def test_preference_losses_at_step_zero():
    logp_P = torch.tensor([-3.0, -8.0])
    loss_P = ut.losses.dpo(logp_P, logp_P - 1, logp_P, logp_P - 1, beta=0.1)
    assert loss_P.tolist() == pytest.approx([0.693147, 0.693147], abs=1e-6)
    assert ut.losses.bradley_terry(logp_P, logp_P).tolist() == pytest.approx([0.693147, 0.693147], abs=1e-6)


@torch.no_grad()
def test_reward_model(model, tokenizer, tmp_path):
    rewarder = ut.RewardModel(model.config)
    rewarder.init_weights(seed=1)
    ut.save_model(rewarder, tmp_path / "reward", tokenizer=tokenizer)
    again = ut.load_model(tmp_path / "reward")
    assert isinstance(again, ut.RewardModel)
    tokens_T, layout = torch.arange(20), ut.Layout.tree([(10, None), (4, 0), (6, 0)])
    rewards_N = again(tokens_T, layout)
    assert rewards_N.shape == (2,)
    assert rewards_N.dtype == torch.float32
    assert torch.equal(rewards_N, rewarder(tokens_T, layout))


def test_sampler_on_ids_strings_and_messages(model, tokenizer):
    sampler = ut.Sampler(model, tokenizer)
    params = ut.SamplingParams(max_tokens=12, temperature=0.7, top_p=0.9, n=4, seed=1)
    text = "Insulin regulates"
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)], text, DIALOG[:1]]
    outputs = sampler.generate(prompts, params)
    assert [len(samples) for samples in outputs] == [4, 4, 4]
    assert outputs[0] == outputs[1], "a string is its ids after the begin token"
    chat, _ = ut.render_chat(DIALOG[:1], tokenizer, add_generation_prompt=True)
    assert outputs[2] == sampler.generate([chat], params)[0]
    assert len({tuple(sample.tokens) for sample in outputs[0]}) > 1
    for samples in outputs:
        for sample in samples:
            stopped = sample.finish_reason == "stop"
            assert len(sample.tokens) == len(sample.logprobs) <= 12
            assert (sample.tokens[-1] in tokenizer.eos_ids) == stopped
            assert stopped or len(sample.tokens) == 12
            assert sample.text == tokenizer.decode(sample.tokens[:-1] if stopped else sample.tokens)


def test_sampler_without_a_tokenizer_stops_at_the_checkpoints_end_ids(model, tokenizer):
    prompt = [tokenizer.bos_id, *tokenizer.encode("Insulin regulates")]
    params = ut.SamplingParams(max_tokens=60, n=16, seed=2)
    (alone,), (known,) = (ut.Sampler(model, given).generate([prompt], params) for given in (None, tokenizer))
    assert [sample.tokens for sample in alone] == [sample.tokens for sample in known]
    assert "stop" in {sample.finish_reason for sample in alone}
    assert {sample.text for sample in alone} == {None}


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5}])
def test_sampler_equals_trainer(model, tokenizer, changes):
    """The sampler's logprobs are those that training computes, whatever was cut off in drawing."""
    prompts = [ut.render_chat(DIALOG[:1], tokenizer, add_generation_prompt=True)[0], [tokenizer.bos_id, 70, 71]]
    outputs = ut.Sampler(model, tokenizer).generate(prompts, ut.SamplingParams(max_tokens=30, n=4, seed=3, **changes))
    for prompt, samples in zip(prompts, outputs, strict=True):
        # All samples in one forward pass, as children of their prompt.
        tokens_T = torch.tensor([*prompt, *(token for sample in samples for token in sample.tokens)])
        layout = ut.Layout.tree([(len(prompt), None), *((len(sample.tokens), 0) for sample in samples)])
        rows_N = torch.arange(len(prompt) - 1, len(tokens_T) - 1)
        for start in layout.starts[1:]:
            rows_N[start - len(prompt)] = len(prompt) - 1
        hidden_TD = model(tokens_T, layout)
        wanted_N = ut.token_logprobs(hidden_TD[rows_N], model.lm_head_weight, tokens_T[len(prompt) :]).detach()
        found_N = torch.tensor([value for sample in samples for value in sample.logprobs])
        torch.testing.assert_close(found_N, wanted_N, atol=1e-5, rtol=0)


def assert_one_error_line(result: subprocess.CompletedProcess, *wanted: str | Path) -> None:
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in wanted:
        assert str(part) in line


def test_command_convert(saved, tmp_path):
    result = run("-m", "umedtrain.cli", "convert", saved, tmp_path / "new", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"wrote {tmp_path / 'new'}\n"
    found, wanted = ut.load_model(tmp_path / "new").state_dict(), ut.load_model(saved).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert ut.load_tokenizer(tmp_path / "new").encode("Insulin") == ut.load_tokenizer(saved).encode("Insulin")


def test_command_convert_of_a_bad_path(tmp_path):
    missing = tmp_path / "missing"
    assert_one_error_line(run("-m", "umedtrain.cli", "convert", missing, tmp_path / "new"), missing)
    assert not (tmp_path / "new").exists()


def test_command_convert_refuses_a_rope_factor_that_nobody_asks_for(saved, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["umedtrain", "convert", str(saved), str(tmp_path / "new"), "--rope-factor", "32"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"error: {saved} says itself how its RoPE is scaled; leave out rope_factor\n"
    assert not (tmp_path / "new").exists()


def test_command_convert_passes_the_rope_factor(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(weights, "convert", lambda source, target, **options: seen.update(options))
    arguments = ["umedtrain", "convert", str(tmp_path), str(tmp_path / "new")]
    for more, wanted in (([], None), (["--rope-factor", "32"], 32.0)):
        monkeypatch.setattr(sys, "argv", arguments + more)
        cli.main()
        assert seen == {"dtype": torch.bfloat16, "rope_factor": wanted}


def test_command_chat(saved, model, tokenizer):
    result = run("-m", "umedtrain.cli", "chat", saved, "--max-tokens", "8", text="hello\n\n")
    assert result.returncode == 0, result.stderr
    messages = [{"role": "user", "content": "hello"}]
    wanted = ut.Sampler(model, tokenizer).generate([messages], ut.SamplingParams(max_tokens=8, temperature=0.0))
    assert result.stdout == f"> {wanted[0][0].text.strip()}\n> "
    assert result.stderr == ""


def test_command_chat_with_a_bad_path(tmp_path):
    assert_one_error_line(run("-m", "umedtrain.cli", "chat", tmp_path / "missing"), tmp_path / "missing")
