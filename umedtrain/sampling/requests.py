"""From prompts and parameters to checked requests."""

import hashlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from umedtrain.model.config import LlamaConfig
from umedtrain.sampling.params import SamplingParams
from umedtrain.text.chat import render_chat
from umedtrain.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Plain text, token ids, or the messages of a chat."""

_CHARACTERS = 256
"""No token stands for more. Text too long by this measure is not encoded first, which takes seconds for megabytes."""


@dataclass(frozen=True, eq=False)
class Request:
    """One checked prompt.

    Attributes:
        ids: its tokens.
        params: what is asked.
        key: stands for seed and prompt in the random numbers.
        limit: tokens to generate at most, by `params` and by the model's positions.
        name: what errors call it.
    """

    ids: list[int]
    params: SamplingParams
    key: int
    limit: int
    name: str

    def sample_key(self, sample: int) -> int:
        """A well mixed key, signed, for one of the samples: output number `sample` of SplitMix64 from `key`.

        Steele et al. 2014, Fast splittable pseudorandom number generators.
        """
        z = (self.key + (sample + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return int(np.uint64(z ^ (z >> 31)).astype(np.int64))


def check_request(
    prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer | None, config: LlamaConfig, *, name: str = "prompt"
) -> Request:
    """The request for one prompt; ValueError that speaks of it as `name` when it cannot be sampled from."""
    ids = prompt_ids(prompt, tokenizer, name=name, config=config)
    if params.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer; pass one to Sampler, or use stop_token_ids")
    if unknown := [i for i in params.logit_bias if i >= config.vocab_size]:
        raise ValueError(f"logit_bias names token {unknown[0]}, outside the model's vocabulary of {config.vocab_size}")
    seed = int(torch.randint(2**63 - 1, ())) if params.seed is None else params.seed
    limit = min(params.max_tokens, config.max_position_embeddings - len(ids))
    return Request(ids, params, request_key(seed, ids), limit, name)


def check_requests(
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    tokenizer: Tokenizer | None,
    config: LlamaConfig,
) -> list[Request]:
    """Requests in the caller's order; ValueError naming the prompt that cannot be sampled from."""
    if isinstance(prompts, str | Mapping):
        raise ValueError("prompts must be a list of prompts, got a single one; put it into a list")
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(params) != len(prompts):
        raise ValueError(f"{len(params)} sampling parameters for {len(prompts)} prompts; give one, or one for each")
    return [
        check_request(prompt, asked, tokenizer, config, name=f"prompts[{index}]")
        for index, (prompt, asked) in enumerate(zip(prompts, params, strict=True))
    ]


def request_key(seed: int, prompt: Sequence[int]) -> int:
    """64 bits, as a signed integer, that stand for a seed and a prompt."""
    data = f"{seed}:".encode() + np.asarray(prompt, dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer | None, *, name: str, config: LlamaConfig) -> list[int]:
    """The prompt as token ids that the model can continue; errors speak of it as `name`."""
    if not isinstance(prompt, Iterable):
        raise ValueError(
            f"{name} is {prompt!r}; prompts must be a list of prompts, and one given as ids is a list itself"
        )
    is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if (isinstance(prompt, str) or is_chat) and tokenizer is None:
        raise ValueError(f"{name} is text, but the sampler has no tokenizer; pass one to Sampler, or pass token ids")
    if isinstance(prompt, str) or is_chat:
        check_characters(prompt, config, name=name)
        try:
            ids = _encode(prompt, tokenizer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    else:
        ids = list(prompt)
        if not all(hasattr(i, "__index__") for i in ids):
            raise ValueError(f"{name} must be a string, a list of token ids or a list of messages")
        ids = [operator.index(i) for i in ids]
    if not ids:
        raise ValueError(f"{name} is empty; a prompt needs at least one token")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        wrong = next(i for i in ids if not 0 <= i < config.vocab_size)
        raise ValueError(f"{name} holds token id {wrong}, outside the model's vocabulary of {config.vocab_size}")
    if len(ids) >= config.max_position_embeddings:
        raise ValueError(
            f"{name} has {len(ids)} tokens, which leaves no room for an answer within the model's "
            f"max_position_embeddings of {config.max_position_embeddings}; shorten it"
        )
    return ids


def check_characters(prompt: str | Sequence[Mapping[str, str]], config: LlamaConfig, *, name: str) -> None:
    """ValueError for text that cannot fit the model's positions, whatever its tokens are."""
    size = len(prompt) if isinstance(prompt, str) else sum(len(message.get("content", "")) for message in prompt)
    if size > _CHARACTERS * config.max_position_embeddings:
        raise ValueError(
            f"{name} has {size} characters, more than the model's max_position_embeddings of "
            f"{config.max_position_embeddings} tokens can hold; shorten it"
        )


def _encode(prompt: str | Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + list(tokenizer.encode(prompt))
    return render_chat(prompt, tokenizer, add_generation_prompt=True)[0]
