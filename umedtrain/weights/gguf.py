"""Reading a llama.cpp file (.gguf, `llama` architecture): tensors are dequantised one by one when read."""

from pathlib import Path
from typing import Any

import torch

from umedtrain.model.config import LlamaConfig, RopeScaling
from umedtrain.model.rope import rope_frequencies
from umedtrain.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_shapes,
    expected_shapes,
    half_split_rows,
)

# Our names within a layer -> GGUF's.
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def open_gguf(path: Path) -> Checkpoint:
    """Open a .gguf file of a Llama model; needs the `gguf` package (`pip install 'umedtrain[gguf]'`).

    Quantised blocks come back as fp32. RoPE scaling is stored there only as a divisor per frequency: it is
    accepted when it is what Llama 3.1's rule with its published constants gives for the largest divisor.

    Raises:
        CheckpointError: naming the file, and the tensor or key, that is missing, damaged or does not fit.
    """
    reader = read_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    divisors = tensors.pop("rope_freqs.weight", None)
    config = _config(reader, tensors, divisors, path)
    gguf_names = _gguf_names(config.num_hidden_layers)
    expected = expected_shapes(config, is_reward_model=False)
    wanted = {gguf_names[name]: shape for name, shape in expected.items()}
    # GGUF writes the fastest dimension first.
    found = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    check_shapes(path, wanted, found, lambda name: f"{path}: {name}")

    def read(name: str) -> torch.Tensor:
        weight = _dequantised(tensors[gguf_names[name]], path)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return half_split_rows(weight, config.head_dim)
        return weight

    def token_id(key: str) -> int | None:
        return field(reader, f"tokenizer.ggml.{key}_token_id", path, None)

    ends = [token_id(key) for key in ("eos", "eot", "eom")]
    return Checkpoint(
        path=path,
        config=config,
        is_reward_model=False,
        names=tuple(expected),
        read=read,
        eos_ids=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
        bos_id=token_id("bos"),
        pad_id=token_id("padding"),
    )


def read_gguf(path: Path) -> Any:
    """The `gguf` package's reader of a file (memory-mapped).

    Raises:
        CheckpointError: for a file that is not GGUF, or incomplete.
        ImportError: when the package is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"reading {path} needs the gguf package: pip install 'umedtrain[gguf]'") from error
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # whatever its parser stumbles over: ValueError, IndexError, KeyError, ...
        raise CheckpointError(
            f"{path}: damaged, incomplete or not a GGUF file ({error}); copy or download it again"
        ) from error


_REQUIRED = object()


def field(reader: Any, key: str, path: Path, default: Any = _REQUIRED) -> Any:
    """A metadata value, or `default`; CheckpointError when it is absent and there is no default."""
    entry = reader.get_field(key)
    if entry is not None:
        return entry.contents()
    if default is _REQUIRED:
        raise CheckpointError(f"{path}: metadata {key} is missing")
    return default


def _config(reader: Any, tensors: dict[str, Any], divisors: Any, path: Path) -> LlamaConfig:
    architecture = field(reader, "general.architecture", path)
    if architecture != "llama":
        raise CheckpointError(f"{path}: architecture is {architecture!r}, only 'llama' is implemented")
    if field(reader, "llama.expert_count", path, 0):
        raise CheckpointError(f"{path}: mixtures of experts are not implemented")
    kind = field(reader, "llama.rope.scaling.type", path, "none")
    if kind != "none":
        raise CheckpointError(f"{path}: llama.rope.scaling.type {kind!r} is not implemented")
    heads = field(reader, "llama.attention.head_count", path)
    hidden_size = field(reader, "llama.embedding_length", path)
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing")
    sizes = dict(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        hidden_size=hidden_size,
        intermediate_size=field(reader, "llama.feed_forward_length", path),
        num_hidden_layers=field(reader, "llama.block_count", path),
        num_attention_heads=heads,
        num_key_value_heads=field(reader, "llama.attention.head_count_kv", path, heads),
        head_dim=field(reader, "llama.attention.key_length", path, hidden_size // max(heads, 1)),
        # Stored as fp32: the shortest decimal that is this fp32 number is the one that was meant.
        rms_norm_eps=_shortest(field(reader, "llama.attention.layer_norm_rms_epsilon", path)),
        rope_theta=_shortest(field(reader, "llama.rope.freq_base", path, 10_000.0)),
        tie_word_embeddings="output.weight" not in tensors,
        max_position_embeddings=field(reader, "llama.context_length", path),
    )
    try:
        config = LlamaConfig(**sizes)
        if divisors is None:
            return config
        scaled = LlamaConfig(**sizes, rope_scaling=_llama3_scaling(divisors, path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    wanted_F = rope_frequencies(config) / rope_frequencies(scaled)
    found_F = _dequantised(divisors, path)
    if wanted_F.shape != found_F.shape or not torch.allclose(wanted_F, found_F, rtol=1e-4):
        raise CheckpointError(f"{path}: rope_freqs.weight does not follow Llama 3.1's rule; not implemented")
    return scaled


def _llama3_scaling(divisors: Any, path: Path) -> RopeScaling:
    return RopeScaling(float(_dequantised(divisors, path).max()), 1.0, 4.0, 8192)


def _dequantised(tensor: Any, path: Path) -> torch.Tensor:
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {tensor.name} is in {tensor.tensor_type.name}, which gguf cannot dequantise"
        ) from error
    # A copy: unquantised tensors come as read-only views of the file.
    return torch.tensor(values, dtype=torch.float32)


def _shortest(value: float) -> float:
    import numpy as np

    return float(str(np.float32(value)))


def _gguf_names(num_layers: int) -> dict[str, str]:
    """Our name of every parameter of a language model -> GGUF's."""
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    for layer in range(num_layers):
        names |= {f"layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in _LAYER.items()}
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()}
