"""Rewards of answers by a reward model: JSONL, JSON or parquet in, JSONL out.

    torchrun --nproc-per-node 8 recipes/score.py recipes/configs/llama3_8b/score.toml --files data/answers.jsonl

Rows are prompts with an answer, dialogs that end with the assistant's turn, the completions.jsonl of
recipes/generate.py or preference pairs. Every answer is scored as a finished turn. Every rank holds the whole model and
takes its share of the rows. Kill it at any moment and start the same command again: finished rows are kept. The result
is OUTPUT/scores.jsonl, a row for a row: id, file, line, the rewards of its answers in order (of a pair: chosen,
rejected) and their lengths in tokens.
"""

from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch

from umedtrain.data.example import Dropped, Drops, encode_answers
from umedtrain.distributed.world import World
from umedtrain.evaluation.rewards import summarize_rewards
from umedtrain.evaluation.scoring import cached_rewards, check_reward_model, load_reward_model
from umedtrain.records import read_answered, write_jsonl
from umedtrain.text.tokenizer import load_tokenizer
from umedtrain.training.build import check_vocabulary
from umedtrain.training.run import finish_run, launch, start_run
from umedtrain.weights.fingerprint import weights_fingerprint


@dataclass(frozen=True)
class ScoreConfig:
    """Rewards of answers by a reward model."""

    output: str = "runs/score"
    """Folder of the run."""
    reward_model: str = ""
    """Checkpoint of the reward model."""
    files: tuple[str, ...] = ()
    """Files of prompts with answers."""
    max_tokens: int = 8192
    """Tokens of one forward pass. A row with an answer that does not fit into one together with its prompt is dropped
    and counted."""
    template: Literal["auto", "llama3", "llama3.1", "chatml", "plain"] = "auto"
    """Chat template; that of the reward model's training. auto: the one that belongs to its tokenizer."""
    trim: bool = True
    """Strip white space around every message; as in the reward model's training."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights; the head is always float32."""


def run(config: ScoreConfig, world: World) -> Path:
    """Score, write, and return the file of scores."""
    folder = Path(config.output)
    result = folder / "scores.jsonl"
    if not config.files:
        raise ValueError("files is empty; name at least one file of prompts with answers")
    check_reward_model(config.reward_model)
    if not start_run(folder, config, world):
        return result

    records = [record for path in config.files for record in read_answered(path)]
    model = load_reward_model(config.reward_model, dtype=getattr(torch, config.dtype), device=world.device)
    tokenizer = load_tokenizer(config.reward_model)
    check_vocabulary(tokenizer, model.config, config.reward_model)
    kept, drops = [], Drops()
    for record in records:
        prompt, answers = encode_answers(
            record.prompt, record.answers, tokenizer, template=config.template, trim=config.trim
        )
        if len(prompt) + max(map(len, answers)) > config.max_tokens:
            reason = f"prompt and answer longer than {config.max_tokens} tokens"
            drops.add(Dropped(reason, record.source, record.line))
        else:
            kept.append((record, prompt, answers))
    if not kept:
        raise ValueError(f"{', '.join(config.files)}: no row fits max_tokens = {config.max_tokens}; raise it")

    rewards = cached_rewards(
        model,
        [prompt for _, prompt, _ in kept],
        [answers for _, _, answers in kept],
        folder / "rewards",
        world,
        weights=weights_fingerprint(config.reward_model),
        max_tokens=config.max_tokens,
    )
    lengths = [[len(answer) for answer in answers] for _, _, answers in kept]
    if world.is_main:
        write_jsonl(
            result,
            [
                {"id": record.id, "file": record.source, "line": record.line, "rewards": values, "lengths": sizes}
                for (record, _, _), values, sizes in zip(kept, rewards, lengths, strict=True)
            ],
        )
    summary = summarize_rewards(list(chain(*rewards)), list(chain(*lengths)))
    finish_run(folder, {"rows": len(kept), **asdict(summary), "dropped": drops.summary()}, world)
    return result


def main() -> None:
    """Entry point of `torchrun recipes/score.py`."""
    launch(ScoreConfig, run)


if __name__ == "__main__":
    main()
