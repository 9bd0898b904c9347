"""Sampling answers to many prompts over all ranks, into files that survive being killed.

Rows that are there are not sampled again. A request's tokens depend on its own prompt and seed only, so an interrupted
rollout ends with the same rows as an undisturbed one, on any number of ranks.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from umedtrain.config import SamplingConfig
from umedtrain.distributed.part_files import PartFiles, Row
from umedtrain.distributed.world import World
from umedtrain.files import RecordError
from umedtrain.model.config import LlamaConfig
from umedtrain.records import Prompt
from umedtrain.sampling.params import Output, SamplingParams
from umedtrain.sampling.sampler import Sampler


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


def check_lengths(prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], config: LlamaConfig) -> None:
    """RecordError that names the first prompt whose tokens leave the model no room for an answer."""
    most = config.max_position_embeddings
    for prompt, own in zip(prompts, ids, strict=True):
        if len(own) >= most:
            problem = f"the prompt has {len(own)} tokens, which leaves no room for an answer in the model's {most}"
            unit = "line" if prompt.source.endswith(".jsonl") else "row"
            raise RecordError(prompt.source, problem, line=prompt.line, unit=unit)


def rollout(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    folder: Path,
    world: World,
    *,
    weights: str,
    chunk: int = 32,
    progress: bool = True,
) -> list[Row]:
    """`params.n` answers to every prompt, in the order of the prompts, on every rank. Collective.

    A row is {"index", "answers": [{"text", "tokens", "logprob" (of the whole answer), "finish_reason"}]}.

    Args:
        prompts: token ids.
        params: with a seed, without which a resumed rollout would not continue the same one.
        folder: on a file system that all ranks share.
        weights: name of what is being sampled; part of the rollout's identity.
        chunk: finished prompts that are written, and synced to disk, together.

    Raises:
        ValueError: when the folder holds another rollout, or a damaged row.
    """
    if params.seed is None:
        raise ValueError("a rollout needs a seed in its sampling parameters, or it could not be resumed")
    parts = PartFiles(folder, _identity(prompts, params, weights), world, name="rollout")
    done = {row["index"] for row in parts.rows()}
    mine = [index for index in range(len(prompts)) if index not in done][world.rank :: world.size]
    hidden = not (progress and world.is_main)
    with (
        parts.append() as append,
        tqdm(total=len(mine), desc=folder.name, unit="prompt", disable=hidden, leave=False) as bar,
    ):
        tokens, ready, started = 0, [], time.monotonic()
        for place, answers in sampler.stream([list(prompts[index]) for index in mine], params):
            ready.append(_row(mine[place], answers))
            tokens += sum(len(answer.tokens) for answer in answers)
            bar.set_postfix({"token/s": f"{tokens / (time.monotonic() - started):.0f}"}, refresh=False)
            bar.update()
            if len(ready) == chunk:
                append(ready)
                ready = []
        append(ready)
    rows = parts.rows()
    assert [row["index"] for row in rows] == list(range(len(prompts)))
    return rows


def _row(index: int, answers: Sequence[Output]) -> Row:
    return {
        "index": index,
        "answers": [
            {
                "text": answer.text,
                "tokens": list(answer.tokens),
                "logprob": float(sum(answer.logprobs)),
                "finish_reason": answer.finish_reason,
            }
            for answer in answers
        ],
    }


def _identity(prompts: Sequence[Sequence[int]], params: SamplingParams, weights: str) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()
    return {"weights": weights, "params": asdict(params), "prompts": digest}
