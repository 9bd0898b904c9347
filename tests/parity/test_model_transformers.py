"""Our Llama against transformers' LlamaForCausalLM, both ways through files."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
from transformers import LlamaForCausalLM

from tests.parity.llamas import SHAPES, hf_llama, random_tokens
from umedtrain.losses.logprobs import token_logprobs
from umedtrain.losses.sft import sft
from umedtrain.model.layout import Layout
from umedtrain.weights import load_model, save_model, save_stream


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """A transformers model, and ours loaded from its files."""
    theirs = hf_llama(request.param)
    directory = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(directory)
    return theirs, load_model(directory)


def their_logits(model, tokens_T: torch.Tensor) -> torch.Tensor:
    return model(tokens_T[None], use_cache=False).logits[0]


def our_logits(model, tokens_T: torch.Tensor, layout: Layout | None = None) -> torch.Tensor:
    return model.logits(model(tokens_T, layout or Layout.packed([len(tokens_T)])))


@torch.no_grad()
def test_logits(pair):
    theirs, ours = pair
    tokens_T = random_tokens(48)
    wanted_TV = their_logits(theirs, tokens_T)
    assert wanted_TV.std() > 0.5
    torch.testing.assert_close(our_logits(ours, tokens_T), wanted_TV, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", ["llama3.1", "llama3.2"])
@torch.no_grad()
def test_rope_scaling_acts(shape, tmp_path):
    """The comparison above would see a wrong scaling: leaving it out changes the logits a lot."""
    theirs = hf_llama(shape)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500_000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens_T = random_tokens(48)
    difference_TV = our_logits(load_model(tmp_path), tokens_T) - their_logits(theirs, tokens_T)
    assert difference_TV.abs().max() > 0.1


def test_all_gradients_of_an_sft_loss(pair):
    theirs, ours = pair
    tokens_T = random_tokens(40)
    targets_T = torch.cat([tokens_T[1:], torch.tensor([-100])])
    targets_T[:11] = -100  # the prompt
    their_loss = F.cross_entropy(their_logits(theirs, tokens_T), targets_T, ignore_index=-100)
    their_loss.backward()
    hidden_TD = ours(tokens_T, Layout.packed([40]))
    our_loss = sft(token_logprobs(hidden_TD, ours.lm_head_weight, targets_T)) / (targets_T != -100).sum()
    our_loss.backward()
    torch.testing.assert_close(our_loss, their_loss, atol=0, rtol=1e-6)
    wanted = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert wanted[name].norm() > 0
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name
    theirs.zero_grad()
    ours.zero_grad()


@torch.no_grad()
def test_greedy_ids(pair):
    theirs, ours = pair
    prompt_T = random_tokens(7)
    wanted_T = theirs.generate(
        prompt_T[None], attention_mask=torch.ones(1, 7, dtype=torch.long), max_new_tokens=24, do_sample=False
    )[0]
    tokens_T = prompt_T
    for _ in range(24):
        tokens_T = torch.cat([tokens_T, our_logits(ours, tokens_T)[-1].argmax()[None]])
    assert tokens_T.tolist() == wanted_T.tolist()
    assert len(set(tokens_T[7:].tolist())) > 4


@torch.no_grad()
def test_packed_segments_equal_separate_runs(pair):
    theirs, ours = pair
    lengths = (5, 1, 17, 9)
    tokens_T = random_tokens(sum(lengths))
    wanted_TV = torch.cat([their_logits(theirs, document) for document in tokens_T.split(lengths)])
    found_TV = our_logits(ours, tokens_T, Layout.packed(lengths))
    torch.testing.assert_close(found_TV, wanted_TV, atol=1e-5, rtol=0)


@torch.no_grad()
def test_tree_children_equal_separate_runs(pair):
    """Each segment equals the same rows of its whole path from the root, run alone."""
    theirs, ours = pair
    tree = [(9, None), (6, 0), (3, 0), (4, None), (5, 2), (2, 3)]
    layout = Layout.tree(tree)
    tokens_T = random_tokens(layout.num_tokens)
    pieces = tokens_T.split([length for length, _ in tree])
    found = our_logits(ours, tokens_T, layout).split([length for length, _ in tree])
    for segment, (length, parent) in enumerate(tree):
        path = [pieces[segment]]
        while parent is not None:
            path.insert(0, pieces[parent])
            parent = tree[parent][1]
        wanted_QV = their_logits(theirs, torch.cat(path))[-length:]
        torch.testing.assert_close(found[segment], wanted_QV, atol=1e-5, rtol=0)


@torch.no_grad()
def test_export_loads_there_and_comes_back(pair, tmp_path):
    _, ours = pair
    save_model(ours, tmp_path / "export")
    exported, report = LlamaForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report.values()), report
    tokens_T = random_tokens(48)
    torch.testing.assert_close(their_logits(exported, tokens_T), our_logits(ours, tokens_T), atol=1e-5, rtol=0)
    exported.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config == ours.config
    for (name, found), wanted in zip(again.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(found, wanted), name


@torch.no_grad()
def test_bf16_export(pair, tmp_path):
    _, ours = pair
    save_model(ours, tmp_path / "export", dtype=torch.bfloat16)
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    again = load_model(tmp_path / "export", dtype=torch.bfloat16)
    assert exported.dtype == again.norm.weight.dtype == torch.bfloat16
    theirs = {name.removeprefix("model."): value for name, value in exported.named_parameters()}
    for name, original in ours.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], original.bfloat16()), name
        assert torch.equal(theirs[name], original.bfloat16()), name
    tokens_T = random_tokens(48)
    wanted_TV = their_logits(exported, tokens_T).float()
    found_TV = our_logits(again, tokens_T).float()
    assert (found_TV - wanted_TV).abs().max() <= 0.05 * wanted_TV.std()


@torch.no_grad()
def test_many_small_shards_load_there(tmp_path):
    theirs = hf_llama("llama3.2")
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    ours = load_model(tmp_path / "hf")
    save_stream(ours.config, False, ours.named_parameters(), tmp_path / "export", max_shard_bytes=20_000)
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 2
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "export")
    for found, wanted in zip(exported.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_config_of_transformers_4(tmp_path):
    """`rope_scaling` beside `rope_theta`, as in the published Llama 3.1 and 3.2, gives the same model."""
    theirs = hf_llama("llama3.1")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    file.write_text(json.dumps(config))
    tokens_T = random_tokens(48)
    wanted_TV = their_logits(LlamaForCausalLM.from_pretrained(tmp_path), tokens_T)
    torch.testing.assert_close(our_logits(load_model(tmp_path), tokens_T), wanted_TV, atol=1e-5, rtol=0)
    torch.testing.assert_close(their_logits(theirs, tokens_T), wanted_TV, atol=1e-6, rtol=0)
