"""Rewards of answers by a reward model: each prompt is computed once for all of its answers."""

from collections.abc import Sequence

import torch

from umedtrain.model.heads import RewardModel
from umedtrain.model.layout import Layout

Ids = Sequence[int]


@torch.inference_mode()
def score_answers(
    model: RewardModel, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]], *, max_tokens: int = 16_384
) -> list[list[float]]:
    """The reward of every answer to every prompt, in the order given.

    Args:
        model: a plain (unsharded) reward model.
        prompts: token ids, each ending where an answer begins.
        answers: for each prompt its answers' token ids. Equal answers are computed once.
        max_tokens: tokens of one forward pass; a prompt's answers may be spread over several.

    Raises:
        ValueError: for an empty prompt or answer, or one prompt and answer longer than `max_tokens`.
    """
    rewards: dict[tuple[int, tuple[int, ...]], float] = {}
    pending: list[tuple[int, list[tuple[int, ...]]]] = []
    used = 0
    for index, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        for answer in dict.fromkeys(tuple(answer) for answer in group):
            if not len(prompt) or not len(answer):
                raise ValueError(f"prompt {index}: prompt and answer must hold at least one token each")
            joins = bool(pending) and pending[-1][0] == index
            cost = len(answer) + (0 if joins else len(prompt))
            if used + cost > max_tokens and pending:
                _score(model, prompts, pending, rewards)
                pending, used, joins, cost = [], 0, False, len(prompt) + len(answer)
            if cost > max_tokens:
                raise ValueError(
                    f"prompt {index}: prompt and answer hold {cost} tokens, over max_tokens = {max_tokens}"
                )
            if not joins:
                pending.append((index, []))
            pending[-1][1].append(answer)
            used += cost
    if pending:
        _score(model, prompts, pending, rewards)
    return [[rewards[index, tuple(answer)] for answer in group] for index, group in enumerate(answers)]


def _score(
    model: RewardModel,
    prompts: Sequence[Ids],
    pending: list[tuple[int, list[tuple[int, ...]]]],
    rewards: dict[tuple[int, tuple[int, ...]], float],
) -> None:
    tokens: list[int] = []
    segments: list[tuple[int, int | None]] = []
    keys = []
    for index, group in pending:
        parent = len(segments)
        segments.append((len(prompts[index]), None))
        tokens.extend(prompts[index])
        for answer in group:
            segments.append((len(answer), parent))
            tokens.extend(answer)
            keys.append((index, answer))
    device = next(model.parameters()).device
    values = model(torch.tensor(tokens, device=device), Layout.tree(segments, device=device))
    rewards.update(zip(keys, values.tolist(), strict=True))
