"""Greedy and sampled decoding against transformers' `generate` on a tiny random model."""

import pytest
import torch

from umedtrain.model.config import LlamaConfig
from umedtrain.model.llama import Llama
from umedtrain.sampling import Sampler, SamplingParams

transformers = pytest.importorskip("transformers")

PROMPTS = [[5, 9, 60], [1], list(range(10, 30)), [7, 7, 7, 7, 7], [5, 9, 61]]
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}


def pair(tied):
    """The same random weights in our model and in theirs."""
    ours = Llama(LlamaConfig(**SHAPE, tie_word_embeddings=tied, initializer_range=0.15))
    ours.init_weights(seed=0)
    shape = {key: value for key, value in SHAPE.items() if key != "rope_theta"}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **shape,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": SHAPE["rope_theta"]},
            attn_implementation="eager",
        )
    ).eval()
    named = {name if name.startswith("lm_head") else f"model.{name}": w for name, w in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(named, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return ours, theirs


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_equals_generate(tied):
    ours, theirs = pair(tied)
    outputs = Sampler(ours, eos_ids=(3, 96)).generate(PROMPTS, SamplingParams(max_tokens=40, temperature=0.0))
    reasons = set()
    for prompt, (sample,) in zip(PROMPTS, outputs, strict=True):
        wanted = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=[3, 96],
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = wanted.sequences[0, len(prompt) :].tolist()
        assert sample.tokens == ids
        reasons.add(sample.finish_reason)
        logprobs = torch.cat(wanted.logits).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.logprobs), logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("top_k, top_p", [(0, 0.7), (8, 1.0), (12, 0.6)])
def test_the_tokens_that_can_be_drawn_are_those_of_the_logits_warpers(top_k, top_p):
    ours, theirs = pair(True)
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(0.8)])
    if top_k:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    warpers.append(transformers.TopPLogitsWarper(top_p))
    asked = SamplingParams(max_tokens=1, temperature=0.8, top_k=top_k, top_p=top_p, n=4000, seed=1)
    outputs = Sampler(ours, eos_ids=()).generate(PROMPTS, asked)
    for prompt, samples in zip(PROMPTS, outputs, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt])).logits[:, -1]
        wanted = warpers(torch.tensor([prompt]), logits).softmax(-1)[0]
        drawn = torch.bincount(torch.tensor([sample.tokens[0] for sample in samples]), minlength=97) / 4000
        assert not drawn[wanted == 0].any()
        assert (drawn - wanted).abs().max() < 0.035
