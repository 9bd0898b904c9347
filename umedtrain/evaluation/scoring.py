"""Rewards of answers: by a reward model, each prompt computed once for all of its answers, or by another program."""

import hashlib
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from umedtrain.distributed.part_files import PartFiles
from umedtrain.distributed.world import World
from umedtrain.files import read_rows, write_jsonl
from umedtrain.model.heads import RewardModel
from umedtrain.model.layout import Layout
from umedtrain.weights import load_model, open_checkpoint

Ids = Sequence[int]


def check_reward_model(path: str) -> None:
    """Refuse what is no checkpoint of a reward model, without reading its weights.

    Raises:
        ValueError: which begins with the name of the setting.
    """
    if not path:
        raise ValueError("reward_model is empty; name the checkpoint directory of a reward model")
    if not open_checkpoint(path).is_reward_model:
        raise ValueError(f"reward_model: {path} is a language model, not a reward model")


def load_reward_model(path: str, *, dtype: torch.dtype, device: torch.device) -> RewardModel:
    """The whole reward model; raises as `check_reward_model`."""
    check_reward_model(path)
    model = load_model(path, dtype=dtype, device=device)
    assert isinstance(model, RewardModel)
    return model


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


def score_rows(
    model: RewardModel, prompts: Sequence[Ids], rows: Sequence[Mapping[str, Any]], world: World
) -> list[list[float]]:
    """The reward of every answer of a rollout's rows, on every rank. Collective: each rank scores its share.

    Args:
        prompts: the token ids that were answered.
        rows: {"answers": [{"tokens"}]}, whose ids are scored as they are.
    """
    mine = range(world.rank, len(prompts), world.size)
    answers = [[answer["tokens"] for answer in rows[index]["answers"]] for index in mine]
    scored = zip(mine, score_answers(model, [prompts[index] for index in mine], answers), strict=True)
    return [rewards for _, rewards in sorted(item for part in world.gather(list(scored)) for item in part)]


def cached_rewards(
    model: RewardModel,
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    folder: Path,
    world: World,
    *,
    weights: str,
    max_tokens: int = 16_384,
    block: int = 32,
    progress: bool = True,
) -> list[list[float]]:
    """As `score_answers`, over all ranks and kept in files: what is there is not computed again. Collective.

    Prompts are computed in blocks, always the same ones, so that an interrupted run ends with the same rewards as an
    undisturbed one to the last bit, on any number of ranks.

    Args:
        model: a plain reward model, the same on every rank.
        prompts, answers, max_tokens: see `score_answers`.
        folder: on a file system that all ranks share. Its rows are {"index", "rewards"}.
        weights: fingerprint of the reward model's weights.
        block: prompts in a block.
        progress: show a progress bar.

    Raises:
        ValueError: as `score_answers`, and when the folder holds rewards of other answers or of another model.
        FloatingPointError: for a reward that is not finite.
    """
    digest = hashlib.sha256()
    for prompt, group in zip(prompts, answers, strict=True):
        digest.update(json.dumps([list(prompt), [list(answer) for answer in group]]).encode())
    identity = {
        "answers": digest.hexdigest(),
        "weights": weights,
        "dtype": str(next(model.parameters()).dtype),
        "max_tokens": max_tokens,
        "block": block,
    }
    parts = PartFiles(folder, identity, world, name="reward cache")
    done = {row["index"] for row in parts.rows()}
    blocks = [range(start, min(start + block, len(prompts))) for start in range(0, len(prompts), block)]
    mine = [indices for indices in blocks if not done.issuperset(indices)][world.rank :: world.size]
    hidden = not (progress and world.is_main)
    with parts.append() as append:
        for indices in tqdm(mine, desc="rewards", unit="block", disable=hidden, leave=False):
            rewards = score_answers(
                model, [prompts[i] for i in indices], [answers[i] for i in indices], max_tokens=max_tokens
            )
            rows = [{"index": i, "rewards": values} for i, values in zip(indices, rewards, strict=True)]
            for row in rows:
                if not all(map(math.isfinite, row["rewards"])):
                    raise FloatingPointError(f"prompt {row['index']}: a reward is not finite: {row['rewards']}")
            append([row for row in rows if row["index"] not in done])
    rows = parts.rows()
    assert [row["index"] for row in rows] == list(range(len(prompts)))
    return [row["rewards"] for row in rows]


def command_rewards(
    command: Sequence[str], rows: Sequence[Mapping[str, Any]], folder: Path, world: World
) -> list[list[float]]:
    """The rewards that another program gives to the answers. Collective; rank 0 runs it, every rank gets the rewards.

    The program is called with two more arguments: FOLDER/to_judge.jsonl with `rows`, and the name of a file that it is
    to write, a row {"rewards": [number per answer]} for a row, in the same order. What it wrote becomes
    FOLDER/rewards.jsonl when it is whole and right, and is not asked for again.

    Args:
        command: program and arguments, run without a shell.
        rows: what it is given; each with a list of texts, "completions".
        folder: made if it is not there.
        world: the ranks.

    Raises:
        ValueError: on every rank, when the program fails, or does not write a finite number for every answer.
    """
    problem, rewards = None, []
    if world.is_main:
        try:
            rewards = _ask(command, rows, folder)
        except (ValueError, OSError) as error:
            problem = str(error)
    problem, rewards = world.gather((problem, rewards))[0]
    if problem:
        raise ValueError(problem)
    return rewards


def _ask(command: Sequence[str], rows: Sequence[Mapping[str, Any]], folder: Path) -> list[list[float]]:
    result, asked, partial = (folder / f"{name}.jsonl" for name in ("rewards", "to_judge", "rewards.partial"))
    if result.exists():
        if [row.values for row in read_rows(asked)] != json.loads(json.dumps(rows)):
            raise ValueError(f"{result}: holds rewards of other answers; remove it")
        return _read_rewards(result, rows)
    folder.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    write_jsonl(asked, rows)
    process = subprocess.run([*command, str(asked), str(partial)], stderr=subprocess.PIPE, text=True)
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:]
        raise ValueError(f"{command[0]} ended with exit code {process.returncode}: {''.join(last)}")
    rewards = _read_rewards(partial, rows)
    partial.replace(result)
    return rewards


def _read_rewards(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    found = list(read_rows(path))
    if len(found) != len(rows):
        raise ValueError(f"{path}: holds {len(found)} rows of rewards, and {len(rows)} were asked for")
    rewards = []
    for row, asked in zip(found, rows, strict=True):
        values = row.optional("rewards", list, "a list of numbers") or []
        wanted = len(asked["completions"])
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if not len(values) == len(numbers) == wanted or not all(map(math.isfinite, numbers)):
            row.fail("rewards", f"must be {wanted} finite numbers, one for each answer")
        rewards.append([float(value) for value in numbers])
    return rewards


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
