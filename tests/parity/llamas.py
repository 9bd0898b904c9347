"""Small random Llamas of the transformers library, in the shapes that published ones have."""

import torch
import transformers

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 500_000.0,
}

# Every RoPE scaling has a small original length, so that it acts within the few tokens of a test.
SHAPES = {
    "llama2": dict(num_key_value_heads=4, rms_norm_eps=1e-6),
    "llama3": dict(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}),
    "llama3.1": dict(rope_parameters=_LLAMA3_ROPE | {"factor": 8.0, "original_max_position_embeddings": 16}),
    "llama3.2": dict(
        rope_parameters=_LLAMA3_ROPE | {"factor": 32.0, "original_max_position_embeddings": 16},
        tie_word_embeddings=True,
    ),
    "one_kv_head": dict(num_key_value_heads=1),
    "wide_heads": dict(num_attention_heads=4, head_dim=14),
    "three_heads": dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3),
}


def hf_llama(shape: str, kind: type = transformers.LlamaForCausalLM, **changes):
    """A transformers model with random weights, norms included, large enough for logits of order 1."""
    sizes = dict(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**(sizes | SHAPES[shape] | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def random_tokens(count: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 101, (count,), generator=torch.Generator().manual_seed(seed))
