"""Reading .gguf files: tensors, config and tokenizer; and broken ones."""

import pytest
import torch

from tests.weights.samples import TINY, assert_same_parameters, random_model
from umedtrain.model.config import RopeScaling
from umedtrain.model.rope import rope_frequencies
from umedtrain.text.export import jinja_template
from umedtrain.text.tokenizer import load_tokenizer
from umedtrain.weights import CheckpointError, convert, load_model, open_checkpoint
from umedtrain.weights.gguf_tokenizer import gguf_tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "layers": "blk",
}
SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
TEMPLATE = jinja_template("chatml")


def gguf_tensors(model) -> dict[str, torch.Tensor]:
    """GGUF's names and row order."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor, head_dim = parameter.detach(), model.config.head_dim
        if "q_proj" in name or "k_proj" in name:
            halves = [head.chunk(2) for head in tensor.split(head_dim)]
            tensor = torch.cat([torch.stack(pair, dim=1).flatten(0, 1) for pair in halves])
        if name == "norm.weight":
            name = "output_norm.weight"
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor.clone()
    return tensors


def metadata(config=TINY) -> dict:
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
    }


def vocabulary(pre: str = "smollm") -> dict:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "a", "b", "c", "Ġ", "1", "2", "ab", "Ġab", "12"]
    tokens += [f"<|reserved_{i}|>" for i in range(60 - len(tokens))]
    kinds = [3, 3, 3, 4, *[1] * 9, *[3] * 47]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def write(path, tensors, content, *, architecture="llama", kind=None) -> None:
    """A file of these tensors; matrices are quantised to `kind` if given."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in content.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not ...:
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        if kind is not None and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_config(tied, path):
    model = random_model(tie_word_embeddings=tied)
    write(path, gguf_tensors(model), metadata() | vocabulary())
    loaded = load_model(path)
    assert loaded.config == model.config
    assert_same_parameters(loaded, model)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.eos_ids, checkpoint.bos_id, checkpoint.pad_id) == ((2,), 1, 2)


@pytest.mark.parametrize("kind, error", [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q4_1", 0.1), ("Q4_0", 0.2)])
def test_dequantised(kind, error, path):
    model = random_model(hidden_size=32, intermediate_size=64)
    content = metadata(model.config) | {"llama.attention.key_length": 4}
    write(path, gguf_tensors(model), content, kind=gguf.GGMLQuantizationType[kind])
    loaded = load_model(path)
    assert loaded.norm.weight.dtype == torch.float32
    for (name, found), wanted in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert (found - wanted).norm() <= error * wanted.norm(), name
    assert not torch.equal(loaded.embed_tokens.weight, model.embed_tokens.weight)


def divisors(scaling: RopeScaling) -> torch.Tensor:
    import dataclasses

    scaled = dataclasses.replace(TINY, head_dim=16, rope_scaling=scaling)
    return rope_frequencies(dataclasses.replace(scaled, rope_scaling=None)) / rope_frequencies(scaled)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_divisors(factor, path):
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    model = random_model(head_dim=16, rope_scaling=scaling)
    tensors = gguf_tensors(model) | {"rope_freqs.weight": divisors(scaling)}
    write(path, tensors, metadata(model.config) | {"llama.attention.key_length": 16})
    assert open_checkpoint(path).config == model.config


def test_tokenizer(path):
    """Against ids worked out by hand: digits one by one, merges in words, special names only as special tokens."""
    write(path, gguf_tensors(random_model()), metadata() | vocabulary())
    tokenizer = gguf_tokenizer(path)
    assert tokenizer.encode("ab ab12") == [10, 11, 8, 9]
    assert tokenizer.decode([1, 10, 11, 8, 9, 2]) == "<|im_start|>ab ab12<|im_end|>"
    assert 2 not in tokenizer.encode("a<|im_end|>")
    assert (tokenizer.bos_id, tokenizer.eos_ids[0], tokenizer.vocab_size) == (1, 2, 60)
    assert tokenizer.config["chat_template"] == TEMPLATE


@pytest.mark.parametrize("pre, ids", [("gpt-2", [10, 11, 12]), ("smollm", [10, 11, 8, 9]), ("llama-bpe", [10, 11, 12])])
def test_how_words_are_split(pre, ids, path):
    """Only smollm keeps digits apart; the others may merge 1 and 2."""
    write(path, {}, vocabulary(pre))
    assert gguf_tokenizer(path).encode("ab ab12") == ids


def test_convert(path, tmp_path):
    write(path, gguf_tensors(random_model()), metadata() | vocabulary())
    convert(path, tmp_path / "hf", dtype=torch.float16)
    loaded = load_model(tmp_path / "hf", dtype=torch.float16)
    assert torch.equal(loaded.lm_head_weight, random_model().lm_head_weight.half())
    assert 2 in loaded.eos_ids
    assert load_tokenizer(tmp_path / "hf").encode("ab ab12") == [10, 11, 8, 9]


def cut(path):
    path.write_bytes(path.read_bytes()[:-500])


def without(*names):
    return {name: tensor for name, tensor in gguf_tensors(random_model()).items() if name not in names}


@pytest.mark.parametrize(
    "tensors, content, damage, problem",
    [
        ({}, {}, cut, "damaged, incomplete or not a GGUF file"),
        ({}, {}, lambda p: p.write_bytes(b""), "damaged, incomplete or not a GGUF file"),
        ({}, {}, lambda p: p.write_text("{}" * 50), "damaged, incomplete or not a GGUF file"),
        (without("token_embd.weight"), {}, None, "tensor token_embd.weight is missing"),
        (without("blk.1.attn_q.weight"), {}, None, "tensor blk.1.attn_q.weight is missing"),
        ({"blk.0.attn_q.bias": torch.ones(16)}, {}, None, "blk.0.attn_q.bias: unexpected tensor"),
        (
            {"blk.0.attn_q.weight": torch.ones(8, 16)},
            {},
            None,
            "blk.0.attn_q.weight: shape [8, 16] found, [16, 16] wanted",
        ),
        ({}, {"llama.block_count": ...}, None, "metadata llama.block_count is missing"),
        ({}, {"llama.attention.head_count": ...}, None, "metadata llama.attention.head_count is missing"),
        ({}, {"llama.attention.head_count_kv": 3}, None, "must be a multiple of num_key_value_heads"),
        ({}, {"llama.expert_count": 8}, None, "mixtures of experts"),
        ({}, {"llama.rope.scaling.type": "yarn"}, None, "llama.rope.scaling.type 'yarn' is not implemented"),
        ({"rope_freqs.weight": torch.tensor([1.0, 5.0])}, {}, None, "rope_freqs.weight does not follow"),
        ({"rope_freqs.weight": torch.ones(3)}, {}, None, "rope_freqs.weight does not follow"),
    ],
)
def test_broken(tensors, content, damage, problem, path):
    complete = tensors if len(tensors) > 2 else gguf_tensors(random_model()) | tensors
    write(path, complete, metadata() | content)
    if damage:
        damage(path)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert problem in str(error.value)
    assert str(error.value).startswith(str(path))


def test_another_architecture(path):
    write(path, gguf_tensors(random_model()), metadata(), architecture="qwen2")
    with pytest.raises(CheckpointError, match="architecture is 'qwen2', only 'llama'"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "content, problem",
    [
        ({"tokenizer.ggml.model": "llama"}, "its tokenizer is of kind 'llama'"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'"),
        ({"tokenizer.ggml.pre": ...}, "tokenizer.ggml.pre is 'missing'"),
        ({"tokenizer.ggml.merges": ...}, "metadata tokenizer.ggml.merges is missing"),
    ],
)
def test_tokenizers_that_are_not_known(content, problem, path):
    write(path, {}, vocabulary() | content)
    with pytest.raises(CheckpointError) as error:
        gguf_tokenizer(path)
    assert problem in str(error.value)


def test_without_the_package(path, monkeypatch):
    import sys

    path.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'umedtrain\[gguf\]'"):
        open_checkpoint(path)
