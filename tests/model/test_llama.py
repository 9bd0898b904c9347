"""Invariant 1: packed equals separate, for logits, logprobs, losses and gradients."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.test_layout import trees
from umedtrain.losses import token_logprobs
from umedtrain.model.config import PRESETS, LlamaConfig, RopeScaling
from umedtrain.model.heads import RewardModel
from umedtrain.model.layout import Layout
from umedtrain.model.llama import Llama


def make(config, kind=Llama, seed=0):
    model = kind(config)
    model.init_weights(seed=seed)
    # Fresh weights are so small that attention hardly matters; make it matter.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    return model


def path_rows(layout, segment):
    """Stream rows of a segment's ancestors and of the segment itself."""
    ranges = [
        *layout.context_ranges[segment],
        (layout.starts[segment], layout.starts[segment] + layout.lengths[segment]),
    ]
    return torch.cat([torch.arange(start, end) for start, end in ranges])


@settings(max_examples=20, deadline=None)
@given(segments=trees(), seed=st.integers(0, 10**6))
def test_packed_trees_equal_separate_passes(segments, seed):
    config = LlamaConfig(61, 24, 32, 2, 4, 2, 6, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8))
    model = make(config)
    layout = Layout.tree(segments)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (layout.num_tokens,), generator=generator)
    weights = torch.randn(layout.num_tokens, config.hidden_size, generator=generator)
    packed = model(tokens, layout)
    packed_grads = torch.autograd.grad((packed * weights).sum(), tuple(model.parameters()), allow_unused=True)
    separate = torch.zeros_like(packed)
    for segment in range(layout.num_segments):
        rows = path_rows(layout, segment)
        alone = model(tokens[rows], Layout.packed([len(rows)]))
        own = rows[-layout.lengths[segment] :]
        separate = separate.index_put((own,), alone[-len(own) :])
    separate_grads = torch.autograd.grad((separate * weights).sum(), tuple(model.parameters()), allow_unused=True)
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(packed_grads, separate_grads, strict=True):
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_changing_one_document_leaves_the_others_bit_identical(tiny_config):
    model = make(tiny_config)
    layout = Layout.tree([(5, None), (7, None), (3, 1), (4, 1)])
    tokens = torch.randint(tiny_config.vocab_size, (layout.num_tokens,))
    before = model(tokens, layout)
    changed = tokens.clone()
    changed[:5] = (changed[:5] + 1) % tiny_config.vocab_size
    after = model(changed, layout)
    assert not torch.equal(before[:5], after[:5])
    assert torch.equal(before[5:], after[5:])


def test_siblings_do_not_see_each_other_and_prompts_do_not_see_answers(tiny_config):
    model = make(tiny_config)
    layout = Layout.tree([(5, None), (3, 0), (4, 0)])
    tokens = torch.randint(tiny_config.vocab_size, (12,))
    changed = tokens.clone()
    changed[5:8] = (changed[5:8] + 1) % tiny_config.vocab_size
    before, after = model(tokens, layout), model(changed, layout)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[8:], after[8:])
    assert not torch.equal(before[5:8], after[5:8])


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_gets_a_gradient(tiny_config, tied):
    model = make(dataclasses.replace(tiny_config, tie_word_embeddings=tied))
    tokens = torch.randint(tiny_config.vocab_size, (9,))
    hidden = model(tokens, Layout.packed([4, 5]))
    token_logprobs(hidden, model.lm_head_weight, tokens.roll(-1)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied


def test_every_parameter_of_a_reward_model_gets_a_gradient(tiny_config):
    model = make(tiny_config, RewardModel)
    rewards = model(torch.randint(tiny_config.vocab_size, (9,)), Layout.tree([(3, None), (2, 0), (4, 0)]))
    (rewards[0] - rewards[1]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_rewards_are_read_at_the_last_token_of_each_leaf(tiny_config):
    model = make(tiny_config, RewardModel)
    tokens = torch.randint(tiny_config.vocab_size, (11,))
    rewards = model(tokens, Layout.tree([(3, None), (2, 0), (4, 0), (2, None)]))
    rows = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7, 8], [9, 10]]
    alone = [model(tokens[row], Layout.packed([len(row)])) for row in rows]
    torch.testing.assert_close(rewards, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert rewards.dtype == torch.float32
    assert model.bfloat16()(tokens, Layout.packed([11])).dtype == torch.float32


def test_weights_depend_on_seed_and_name_only(tiny_config):
    one, two, other = (Llama(tiny_config) for _ in range(3))
    one.init_weights(seed=1)
    two.init_weights(seed=1)
    other.init_weights(seed=2)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c), name
    stds = {name: p.std().item() for name, p in one.named_parameters() if p.ndim > 1}
    assert stds["layers.0.mlp.up_proj.weight"] == pytest.approx(0.02, rel=0.1)
    assert stds["layers.0.mlp.down_proj.weight"] == pytest.approx(0.02 / 2, rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_they_are_named_for(name):
    with torch.device("meta"):
        model = Llama(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].num_parameters
    published = {"llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3.2-1b": 1_235_814_400}
    assert PRESETS[name].num_parameters == published.get(name, PRESETS[name].num_parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"head_dim": 7}, "head_dim must be even"),
    ],
)
def test_impossible_shapes_are_refused(tiny_config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_config, **change)


def test_a_stream_that_does_not_fit_its_layout_is_refused(tiny_config):
    with pytest.raises(ValueError, match="layout has 5 tokens"):
        make(tiny_config)(torch.zeros(4, dtype=torch.long), Layout.packed([5]))
