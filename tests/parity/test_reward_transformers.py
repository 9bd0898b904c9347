"""Our RewardModel against transformers' LlamaForSequenceClassification, both ways through files."""

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaForSequenceClassification

from tests.parity.llamas import hf_llama, random_tokens
from umedtrain.model.heads import RewardModel
from umedtrain.model.layout import Layout
from umedtrain.weights import load_model, open_checkpoint, save_model

SHAPES = ["llama3", "llama3.1", "llama3.2"]
PAD = 7


def hf_reward_model(shape: str, **changes):
    return hf_llama(shape, LlamaForSequenceClassification, num_labels=1, **changes)


def their_score(model, tokens_T: torch.Tensor) -> torch.Tensor:
    return model(tokens_T[None], use_cache=False).logits[0, 0]


def our_score(model, tokens_T: torch.Tensor) -> torch.Tensor:
    return model(tokens_T, Layout.packed([len(tokens_T)]))[0]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_scores_of_their_model(shape, tmp_path):
    theirs = hf_reward_model(shape)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert isinstance(ours, RewardModel)
    tokens_T = random_tokens(30)
    wanted = their_score(theirs, tokens_T)
    assert wanted.abs() > 0.05
    torch.testing.assert_close(our_score(ours, tokens_T), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_export_scores_the_same_there(shape, tmp_path):
    hf_reward_model(shape).save_pretrained(tmp_path / "hf")
    config = open_checkpoint(tmp_path / "hf").config
    ours = RewardModel(config)
    ours.init_weights(seed=3)
    save_model(ours, tmp_path / "export")
    exported, report = LlamaForSequenceClassification.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report.values()), report
    assert exported.config.num_labels == 1
    tokens_T = random_tokens(30)
    torch.testing.assert_close(their_score(exported, tokens_T), our_score(ours, tokens_T), atol=1e-5, rtol=0)


@torch.no_grad()
def test_padded_batch_there_equals_packed_and_tree_here(tmp_path):
    """One prompt, three answers: a right-padded batch of four columns there, one tree here."""
    theirs = hf_reward_model("llama3.1", pad_token_id=PAD)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens_T = random_tokens(24)
    tokens_T[tokens_T == PAD] = PAD + 1
    prompt, *answers = tokens_T.split((10, 3, 7, 4))
    sequences = [torch.cat([prompt, answer]) for answer in answers]
    batch = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD)
    wanted_N = theirs(batch, attention_mask=(batch != PAD).long(), use_cache=False).logits[:, 0]
    tree = Layout.tree([(10, None), (3, 0), (7, 0), (4, 0)])
    torch.testing.assert_close(ours(tokens_T, tree), wanted_N, atol=1e-5, rtol=0)
    packed = Layout.packed([len(sequence) for sequence in sequences])
    torch.testing.assert_close(ours(torch.cat(sequences), packed), wanted_N, atol=1e-5, rtol=0)


class _OneEnd:
    """A tokenizer whose only special token ends turns and documents, and also pads (SmolLM2's is such)."""

    bos_id, eos_ids, vocab_size, chat_template = None, (PAD,), 101, "plain"

    def special_id(self, name: str) -> int | None:
        return PAD if name == "<pad>" else None


@torch.no_grad()
def test_sequence_that_ends_with_its_padding_token(tmp_path, monkeypatch):
    """An answer ends with its end token. With pad == eos, theirs scores the token before."""
    monkeypatch.setattr("umedtrain.text.export.save_tokenizer", lambda tokenizer, directory: None)
    theirs = hf_reward_model("llama3", pad_token_id=PAD, eos_token_id=PAD)
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_model(tmp_path / "hf")
    tokens_T = random_tokens(12)
    tokens_T[-1] = PAD
    score = our_score(ours, tokens_T)
    trapped = their_score(theirs, tokens_T)
    torch.testing.assert_close(trapped, our_score(ours, tokens_T[:-1]), atol=1e-5, rtol=0)
    assert (trapped - score).abs() > 1e-2
    save_model(ours, tmp_path / "export", tokenizer=_OneEnd())
    exported = LlamaForSequenceClassification.from_pretrained(tmp_path / "export")
    assert exported.config.eos_token_id == [PAD]
    torch.testing.assert_close(their_score(exported, tokens_T), score, atol=1e-5, rtol=0)


@torch.no_grad()
def test_bf16_export_keeps_the_head_exact(tmp_path):
    hf_reward_model("llama3").save_pretrained(tmp_path / "hf")
    ours = load_model(tmp_path / "hf")
    save_model(ours, tmp_path / "export", dtype=torch.bfloat16)
    again = load_model(tmp_path / "export", dtype=torch.bfloat16)
    assert again.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(again.score.weight, ours.score.weight)
    exported = LlamaForSequenceClassification.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert torch.equal(exported.score.weight, ours.score.weight)


@torch.no_grad()
def test_backbone_from_a_language_model(tmp_path):
    """How a reward model starts: the language model's checkpoint has every backbone tensor, and no head."""
    theirs = hf_llama("llama3.1")
    theirs.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    ours = RewardModel(checkpoint.config)
    for name, parameter in ours.named_parameters():
        if name != "score.weight":
            parameter.copy_(checkpoint.tensor(name.removeprefix("model.")))
    with pytest.raises(ValueError, match=r"no tensor 'score\.weight'"):
        checkpoint.tensor("score.weight")
    tokens_T = random_tokens(20)
    wanted_TD = theirs.model(tokens_T[None], use_cache=False).last_hidden_state[0]
    found_TD = ours.model(tokens_T, Layout.packed([20]))
    torch.testing.assert_close(found_TD, wanted_TD, atol=1e-5, rtol=0)
