"""From prompts and parameters to checked requests, and from these to batches that fit the budget."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from umedtrain.model.config import LlamaConfig
from umedtrain.sampling.draw import request_key
from umedtrain.sampling.params import SamplingParams
from umedtrain.text.chat import render_chat
from umedtrain.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Plain text, token ids, or the messages of a chat."""


@dataclass(frozen=True)
class Request:
    """One checked prompt.

    Attributes:
        index: the caller's number of the prompt.
        ids: its tokens.
        params: what is asked.
        key: stands for seed and prompt in the random numbers.
        limit: tokens to generate at most, by `params` and by the model's positions.
    """

    index: int
    ids: list[int]
    params: SamplingParams
    key: int
    limit: int


@dataclass(frozen=True)
class Piece:
    """Some of a request's samples: all of them, if they fit into one batch."""

    request: Request
    first: int
    count: int


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
    # Drawn for all, so that equal prompts without a seed still get different answers.
    fresh_seeds = torch.randint(2**63 - 1, (len(prompts),)).tolist() if any(p.seed is None for p in params) else None
    requests = []
    for index, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
        ids = prompt_ids(prompt, tokenizer, name=f"prompts[{index}]", config=config)
        seed = fresh_seeds[index] if asked.seed is None else asked.seed
        limit = min(asked.max_tokens, config.max_position_embeddings - len(ids))
        requests.append(Request(index, ids, asked, request_key(seed, ids), limit))
    return requests


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


def _encode(prompt: str | Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + list(tokenizer.encode(prompt))
    return render_chat(prompt, tokenizer, add_generation_prompt=True)[0]


def plan_batches(requests: Sequence[Request], *, max_rows: int, max_cache_tokens: int) -> list[list[Piece]]:
    """Pieces of all requests in batches of at most `max_rows` samples and `max_cache_tokens` cached tokens.

    Similar requests (samples, limit, length) go together: a batch's cache is a grid, as wide as its widest
    request.
    """
    pieces = []
    for request in requests:
        fitting = (max_cache_tokens - len(request.ids)) // request.limit
        if fitting < 1:
            raise ValueError(
                f"prompts[{request.index}] needs a cache for {len(request.ids)} tokens and {request.limit} new ones, "
                f"but cache_bytes has room for {max_cache_tokens} in all; raise cache_bytes or lower max_tokens"
            )
        most = min(max_rows, fitting)
        for first in range(0, request.params.n, most):
            pieces.append(Piece(request, first, min(most, request.params.n - first)))
    pieces.sort(key=lambda piece: (piece.count, piece.request.limit, len(piece.request.ids)))
    batches: list[list[Piece]] = []
    batch: list[Piece] = []
    widest = longest = limit = rows = 0
    for piece in pieces:
        new_widest, new_limit = max(widest, piece.count), max(limit, piece.request.limit)
        new_longest = max(longest, len(piece.request.ids))
        tokens = (len(batch) + 1) * (new_longest + new_widest * new_limit)
        if not batch or tokens > max_cache_tokens or rows + piece.count > max_rows:
            batch, rows = [], 0
            batches.append(batch)
            new_widest, new_limit, new_longest = piece.count, piece.request.limit, len(piece.request.ids)
        batch.append(piece)
        widest, limit, longest, rows = new_widest, new_limit, new_longest, rows + piece.count
    return batches
