"""Sampling completions of prompts: JSONL, JSON or parquet in, JSONL out.

    torchrun --nproc-per-node 8 recipes/generate.py recipes/configs/llama3_8b/generate.toml --sampling.n 4

Every rank holds the whole model and takes its share of the prompts. Kill it at any moment and start the same command
again: finished rows are kept, the rest is sampled as it would have been. The result is OUTPUT/completions.jsonl.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from umedtrain.config import SamplingConfig
from umedtrain.distributed.world import World
from umedtrain.records import read_prompts, write_jsonl
from umedtrain.sampling import Sampler
from umedtrain.sampling.rollout import check_lengths, rollout, sampling_params
from umedtrain.text.chat import render_chat
from umedtrain.text.tokenizer import load_tokenizer
from umedtrain.training.run import finish_run, launch, start_run
from umedtrain.weights import load_model


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling completions of prompts."""

    output: str = "runs/generate"
    """Folder of the run."""
    model: str = ""
    """Checkpoint directory of the model."""
    prompts: tuple[str, ...] = ()
    """Files of prompts; what they hold of answers is not shown to the model."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights and cache."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def run(config: GenerateConfig, world: World) -> Path:
    """Sample, write, and return the file of completions."""
    folder = Path(config.output)
    result = folder / "completions.jsonl"
    if not start_run(folder, config, world):
        return result

    prompts = [prompt for path in config.prompts for prompt in read_prompts(path)]
    if not prompts:
        raise ValueError("prompts is empty; name at least one file of prompts")
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, dtype=getattr(torch, config.dtype), device=world.device)
    ids = [render_chat(prompt.messages, tokenizer, add_generation_prompt=True)[0] for prompt in prompts]
    check_lengths(prompts, ids, model.config)
    rows = rollout(
        Sampler(model, tokenizer),
        ids,
        sampling_params(config.sampling),
        folder / "samples",
        world,
        weights=config.model,
    )

    if world.is_main:
        write_jsonl(
            result,
            [
                {
                    "id": prompt.id,
                    "messages": list(prompt.messages),
                    "completions": [answer["text"] for answer in row["answers"]],
                    "logprobs": [answer["logprob"] for answer in row["answers"]],
                    "finish_reasons": [answer["finish_reason"] for answer in row["answers"]],
                }
                for prompt, row in zip(prompts, rows, strict=True)
            ],
        )
    tokens = sum(len(answer["tokens"]) for row in rows for answer in row["answers"])
    finish_run(folder, {"prompts": len(prompts), "tokens": tokens}, world)
    return result


def main() -> None:
    """Entry point of `torchrun recipes/generate.py`."""
    launch(GenerateConfig, run)


if __name__ == "__main__":
    main()
