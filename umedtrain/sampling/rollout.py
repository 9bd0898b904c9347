"""Sampling answers to many prompts over all ranks, into files that survive being killed.

Every rank appends finished rows to its own part file. A row is written and synced whole; a torn last line is cut away
on the next start, and rows that are there are not sampled again. A request's tokens depend on its own prompt and
seed only, so an interrupted rollout ends with the same rows as an undisturbed one, on any number of ranks.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from umedtrain.config import SamplingConfig
from umedtrain.distributed.world import World
from umedtrain.sampling.params import SamplingParams
from umedtrain.sampling.sampler import Sampler

Row = dict[str, Any]
"""{"index", "answers": [{"text", "tokens", "logprob" (of the whole answer), "finish_reason"}]}"""


def sampling_params(config: SamplingConfig) -> SamplingParams:
    """The sampler's parameters of a config section."""
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        n=config.n,
        seed=config.seed,
    )


def rollout(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    folder: Path,
    world: World,
    *,
    weights: str,
    chunk: int = 128,
    progress: bool = True,
) -> list[Row]:
    """`params.n` answers to every prompt, in the order of the prompts, on every rank. Collective.

    Args:
        prompts: token ids.
        params: with a seed, without which a resumed rollout would not continue the same one.
        folder: on a file system that all ranks share.
        weights: name of what is being sampled; part of the rollout's identity.
        chunk: prompts that a rank samples between two writes.

    Raises:
        ValueError: when the folder holds another rollout, or a damaged row.
    """
    if params.seed is None:
        raise ValueError("a rollout needs a seed in its sampling parameters, or it could not be resumed")
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, _identity(prompts, params, weights), world)
    done = {row["index"] for row in _read_parts(folder)}
    # All ranks must have read before any appends.
    world.barrier()
    mine = [index for index in range(len(prompts)) if index not in done][world.rank :: world.size]
    part = folder / f"part-{world.rank:05d}.jsonl"
    _cut_torn_line(part)
    with (
        part.open("a", encoding="utf-8") as file,
        tqdm(
            total=len(mine),
            desc=folder.name,
            unit="prompt",
            disable=not (progress and world.is_main),
            leave=False,
        ) as bar,
    ):
        for start in range(0, len(mine), chunk):
            indices = mine[start : start + chunk]
            outputs = sampler.generate([list(prompts[index]) for index in indices], params)
            for index, answers in zip(indices, outputs, strict=True):
                rows = [
                    {
                        "text": answer.text,
                        "tokens": list(answer.tokens),
                        "logprob": float(sum(answer.logprobs)),
                        "finish_reason": answer.finish_reason,
                    }
                    for answer in answers
                ]
                file.write(json.dumps({"index": index, "answers": rows}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(indices))
    world.barrier()
    rows = sorted(_read_parts(folder), key=lambda row: row["index"])
    assert [row["index"] for row in rows] == list(range(len(prompts)))
    return rows


def _identity(prompts: Sequence[Sequence[int]], params: SamplingParams, weights: str) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()
    return {"weights": weights, "params": json.loads(json.dumps(asdict(params))), "prompts": digest}


def _claim(folder: Path, identity: dict[str, Any], world: World) -> None:
    """Write what the folder holds, or check that it holds the same; raises on all ranks alike."""
    path = folder / "rollout.json"
    problem = None
    if world.is_main:
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key in identity if before.get(key) != identity[key]]
            if changed:
                problem = (
                    f"{folder} holds a rollout with other {', '.join(changed)}; choose another folder or remove it"
                )
        else:
            temporary = path.with_suffix(".partial")
            temporary.write_text(json.dumps(identity), encoding="utf-8")
            temporary.replace(path)
    problem = world.gather(problem)[0]
    if problem:
        raise ValueError(problem)


def _read_parts(folder: Path) -> list[Row]:
    rows = []
    for part in sorted(folder.glob("part-*.jsonl")):
        lines = part.read_bytes().split(b"\n")
        # What follows the last newline is a row that a killed process did not finish.
        for number, line in enumerate(lines[:-1], start=1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise ValueError(f"{part}, line {number}: not valid JSON; remove the line to sample it again") from None
    return rows


def _cut_torn_line(part: Path) -> None:
    if part.exists():
        content = part.read_bytes()
        if not content.endswith(b"\n"):
            with part.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
