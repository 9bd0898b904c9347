"""Reading Meta's releases: merging shards, what params.json leaves open, and broken ones."""

import json

import pytest
import torch

from tests.weights.samples import TINY, assert_same_parameters, random_model
from umedtrain.model.config import RopeScaling
from umedtrain.weights import CheckpointError, load_model, open_checkpoint
from umedtrain.weights.meta import open_meta

PARAMS = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=60, norm_eps=1e-5, rope_theta=500000.0)
NAMES = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attention_norm",
}


def meta_state(**changes) -> dict[str, torch.Tensor]:
    """Meta's names and row order for `random_model`'s weights."""
    state = {}
    for name, parameter in random_model(**changes).named_parameters():
        tensor = parameter.detach()
        if "q_proj" in name or "k_proj" in name:
            heads = [torch.stack((head[:2], head[2:]), dim=1).flatten(0, 1) for head in tensor.split(4)]
            tensor = torch.cat(heads)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = tensor.clone()
    return state


def write(directory, shards: list[dict[str, torch.Tensor]], **params) -> None:
    directory.mkdir(exist_ok=True)
    content = {key: value for key, value in (PARAMS | params).items() if value is not ...}
    (directory / "params.json").write_text(json.dumps(content))
    for rank, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{rank:02d}.pth")


def split(state, count: int) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for name, tensor in state.items():
        dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        parts = [tensor] * count if "norm" in name else tensor.chunk(count, dim=dim)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


@pytest.mark.parametrize("count", [1, 2])
def test_same_weights(count, tmp_path):
    write(tmp_path, split(meta_state(), count))
    loaded = load_model(tmp_path)
    assert_same_parameters(loaded, random_model())
    assert loaded.config == TINY


def test_dtype(tmp_path):
    write(tmp_path, [{name: tensor.bfloat16() for name, tensor in meta_state().items()}])
    assert open_checkpoint(tmp_path).tensor("layers.0.self_attn.q_proj.weight").dtype == torch.bfloat16
    assert load_model(tmp_path).norm.weight.dtype == torch.float32


@pytest.mark.parametrize("absent", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_tied(count, absent, tmp_path):
    state = meta_state()
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    if absent:
        del state["output.weight"]
    write(tmp_path, split(state, count))
    loaded = load_model(tmp_path)
    assert loaded.config.tie_word_embeddings
    assert torch.equal(loaded.lm_head_weight, random_model().embed_tokens.weight)


def test_output_that_starts_like_the_embedding_is_not_tied(tmp_path):
    state = meta_state()
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    state["output.weight"][-1] += 1
    write(tmp_path, [state])
    assert not load_model(tmp_path).config.tie_word_embeddings


@pytest.mark.parametrize(
    "params, expected",
    [
        (dict(vocab_size=-1), dict(vocab_size=60, rope_theta=500000.0, max_position_embeddings=8192)),
        (dict(vocab_size=...), dict(vocab_size=60)),
        (dict(rope_theta=...), dict(rope_theta=10000.0, max_position_embeddings=4096)),
        (dict(use_scaled_rope=False), dict(rope_scaling=None)),
        (
            dict(use_scaled_rope=True),
            dict(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), max_position_embeddings=131072),
        ),
        (
            dict(use_scaled_rope=True, rope_scaling_factor=32),
            dict(rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192)),
        ),
        (dict(multiple_of=256, ffn_dim_multiplier=1.3, max_seq_len=9), dict(intermediate_size=24)),
    ],
)
def test_what_params_leave_open(params, expected, tmp_path):
    write(tmp_path, [meta_state()], **params)
    config = open_checkpoint(tmp_path).config
    assert {key: getattr(config, key) for key in expected} == expected


def test_factor_of_a_tied_model_is_never_guessed(tmp_path):
    state = meta_state()
    del state["output.weight"]
    write(tmp_path, [state], use_scaled_rope=True)
    with pytest.raises(CheckpointError, match=r'add "rope_scaling_factor": 32\.0 to it'):
        open_meta(tmp_path)
    assert open_checkpoint(tmp_path, rope_factor=32.0).config.rope_scaling.factor == 32.0
    write(tmp_path, [state], use_scaled_rope=True, rope_scaling_factor=8)
    assert open_meta(tmp_path).config.rope_scaling.factor == 8.0


def without(*names):
    return [{name: tensor for name, tensor in meta_state().items() if name not in names}]


def changed(**tensors):
    return [meta_state() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}]


def cut(directory):
    file = directory / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[:2000])


def halves(edit):
    shards = split(meta_state(), 2)
    edit(shards)
    return shards


Q = "layers.1.attention.wq.weight"


@pytest.mark.parametrize(
    "shards, params, damage, problem",
    [
        ([], {}, None, "params.json is there, but no consolidated.*.pth"),
        (split(meta_state(), 1), {}, cut, "consolidated.00.pth: damaged, incomplete or not a file of tensors"),
        (
            split(meta_state(), 2),
            {},
            lambda d: (d / "consolidated.00.pth").unlink(),
            "consolidated.00.pth is missing, consolidated.01.pth is there",
        ),
        (
            split(meta_state(), 2),
            {},
            lambda d: (d / "consolidated.01.pth").unlink(),
            "consolidated.00.pth: tok_embeddings.weight: shape [30, 16] found, [60, 16] wanted",
        ),
        (
            split(meta_state(), 1),
            {},
            lambda d: (d / "params.json").write_text("{"),
            "params.json: not readable as JSON",
        ),
        ([[1, 2]], {}, None, "a dictionary of tensors is wanted"),
        ([meta_state() | {"step": 3}], {}, None, "a dictionary of tensors is wanted"),
        (without(Q), {}, None, f"tensor {Q} is missing"),
        (without("tok_embeddings.weight"), {}, None, "tensor tok_embeddings.weight is missing"),
        (without("layers.0.feed_forward.w1.weight"), {}, None, "layers.0.feed_forward.w1.weight is missing"),
        (changed(layers__0__attention__wq__bias=torch.ones(16)), {}, None, "wq.bias: unexpected tensor"),
        (
            changed(layers__1__attention__wq__weight=torch.ones(8, 16)),
            {},
            None,
            f"consolidated.00.pth: {Q}: shape [8, 16] found, [16, 16] wanted",
        ),
        (changed(norm__weight=torch.ones(16, dtype=torch.int8)), {}, None, "norm.weight has dtype torch.int8"),
        (
            halves(lambda shards: shards[1].pop(Q)),
            {},
            None,
            f"consolidated.01.pth: holds other tensors than consolidated.00.pth, such as {Q}",
        ),
        (
            halves(lambda shards: shards[1].update({Q: torch.ones(4, 16)})),
            {},
            None,
            f"consolidated.01.pth: tensor {Q} has shape [4, 16], but [8, 16] in consolidated.00.pth",
        ),
        (split(meta_state(), 1), dict(vocab_size=64), None, "shape [60, 16] found, [64, 16] wanted"),
        (
            split(meta_state(), 1),
            dict(n_layers=1),
            None,
            "layers.1.attention_norm.weight: unexpected tensor (and 8 more",
        ),
        (split(meta_state(), 1), dict(dim=...), None, "params.json: dim must be a whole number, got None"),
        (split(meta_state(), 1), dict(n_heads=3), None, "dim (16) must be a multiple of n_heads (3)"),
        (split(meta_state(), 1), dict(n_kv_heads=3), None, "must be a multiple of num_key_value_heads"),
        (split(meta_state(), 1), dict(norm_eps=...), None, "norm_eps must be a number, got None"),
        (split(meta_state(), 1), dict(rope_theta="x"), None, "rope_theta must be a number, got 'x'"),
        (split(meta_state(), 1), dict(vocab_size="x"), None, "vocab_size must be a whole number, got 'x'"),
        (split(meta_state(), 1), dict(rope_scaling_factor=8), None, "but use_scaled_rope is not true"),
        (split(meta_state(), 1), dict(lora_args={"rank": 4}), None, "lora_args is not implemented"),
        (split(meta_state(), 1), dict(quantization_args={"x": 1}), None, "quantization_args is not implemented"),
    ],
)
def test_broken(shards, params, damage, problem, tmp_path):
    write(tmp_path / "model", shards, **params)
    if damage:
        damage(tmp_path / "model")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "model")
    assert problem in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "model"))
    assert "\n" not in str(error.value)


def test_a_pickle_cannot_run_code(tmp_path):
    """Only tensors are unpickled: a file made to run a command is refused, and the command does not run."""

    class Command:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    write(tmp_path / "model", [{"norm.weight": Command()}])
    with pytest.raises(CheckpointError, match="not a file of tensors"):
        open_checkpoint(tmp_path / "model")
    assert not (tmp_path / "ran").exists()
