"""Online preference learning: rounds of sampling answers, choosing pairs among them, and training on the pairs.

    torchrun --nproc-per-node 8 recipes/online_dpo.py recipes/configs/llama3_8b/online_dpo.toml --rounds 2

In each round the policy answers every prompt with the weights that are in memory, a judge (a reward model, a checker
that knows the right answers, or a program of yours) gives the answers rewards, and the policy learns from a pair of
answers to each prompt, with any loss of recipes/dpo.py. What a round did stays in OUTPUT/round-K:

    answers/, rewards/    every answer that was sampled, and what the judge says of it
    answers.json          their mean reward, before the round's training, and why prompts gave no pair
    pairs.jsonl           the pairs
    reference/, metrics.jsonl, checkpoints/, summary.json    as of recipes/dpo.py

Start the same command again after an interruption: finished rounds are skipped and the last one goes on where it was.
A round that has its pairs.jsonl samples nothing: pairs that are put there are learned. Leaves a Hugging Face directory
in OUTPUT/export.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import torch

from umedtrain.collection.pairs import TIE, checked_rewards, ranked_pairs
from umedtrain.config import PairsConfig, SamplingConfig
from umedtrain.data.care import load_pairs
from umedtrain.data.example import Drops, Record, encode_answers, encode_preference
from umedtrain.data.sources import check_files
from umedtrain.distributed.sharding import gather_model
from umedtrain.distributed.world import World
from umedtrain.evaluation.questions import read_questions
from umedtrain.evaluation.rewards import summarize_rewards
from umedtrain.evaluation.scoring import cached_rewards, check_reward_model, command_rewards, load_reward_model
from umedtrain.model.llama import Llama
from umedtrain.recipes.dpo import PairTrainingConfig, check_loss, learn
from umedtrain.records import Prompt, read_prompts, write_jsonl
from umedtrain.sampling import Sampler
from umedtrain.sampling.rollout import Row, check_lengths, rollout, sampling_params
from umedtrain.text.tokenizer import Tokenizer, load_tokenizer
from umedtrain.training import build
from umedtrain.training.checkpoint import Checkpoints
from umedtrain.training.run import finish_run, launch, start_run, write_json
from umedtrain.weights.fingerprint import weights_fingerprint


@dataclass(frozen=True)
class OnlineDPOConfig(PairTrainingConfig):
    """Online preference learning; data.files are files of prompts."""

    output: str = "runs/online_dpo"
    """Folder of the run."""
    rounds: int = 1
    """Rounds, each with an optimizer and a learning-rate schedule of its own."""
    judge: Literal["reward_model", "answer", "command"] = "reward_model"
    """What an answer's reward is: what `reward_model` says of it; 1 if its final answer is the prompt's reference
    answer and 0 if not; or what `judge_command` says."""
    judge_command: tuple[str, ...] = ()
    """Program and arguments, run once a round with two more: a file of rows {id, messages, completions, answer}, where
    `answer` is the prompt's reference answer, and the file to write, a row {"rewards": [a number per completion]} for
    a row."""
    reward_model: str = ""
    """Checkpoint of the reward model. It is given the answers' text, by its own tokenizer."""
    reward_template: Literal["auto", "llama3", "llama3.1", "chatml", "plain"] = "auto"
    """Chat template that the reward model was trained with. auto: the one that belongs to its tokenizer."""
    choose: Literal["max_min", "max_random"] = "max_min"
    """A prompt's pair: the answer with the largest reward, and the one with the smallest or, drawn at random, one with
    a smaller reward. A prompt whose answers all have the same reward gives none."""
    length_penalty: float = 0.0
    """Taken off the reward for every hundred tokens of an answer, where pairs are chosen."""
    new_reference: bool = True
    """A round's reference is the policy that the round starts from. Without, the one that the first round starts
    from."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=8, temperature=1.0, top_p=1.0))
    """How answers are sampled; in round K with the seed plus K."""


def run(config: OnlineDPOConfig, world: World) -> Path:
    """Play the rounds that are left, export, and return the exported directory."""
    check(config)
    folder = Path(config.output)
    if not start_run(folder, config, world):
        return folder / "export"

    tokenizer = build.build_tokenizer(config.model)
    prompts = read_all(read_prompts, config)
    model = first_model(config, tokenizer, world)
    rounds = [folder / f"round-{number}" for number in range(1, config.rounds + 1)]
    finished = world.gather([(path / "summary.json").exists() for path in rounds])[0]
    done = sum(finished)
    if not all(finished[:done]):
        raise ValueError(f"{rounds[finished.index(False)]} is not finished but a later round is; remove the later ones")
    if done:
        Checkpoints(rounds[done - 1] / "checkpoints", world, keep=config.checkpoint.keep).load_weights(model)
    for number in range(done + 1, config.rounds + 1):
        play_round(number, rounds[number - 1], config, model, tokenizer, prompts, world)

    build.export_model(model, folder / "export", tokenizer, world)
    finish_run(folder, {"rounds": [json.loads((path / "summary.json").read_text()) for path in rounds]}, world)
    return folder / "export"


def check(config: OnlineDPOConfig) -> None:
    """Refuse settings that would fail only after hours of sampling.

    Raises:
        ValueError: naming the setting.
    """
    check_files(config.data.files)
    if config.data.weights:
        raise ValueError("data.weights has no place here: every prompt is answered once in a round")
    if config.rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {config.rounds}")
    if config.sampling.n < 2 or not config.sampling.temperature > 0:
        raise ValueError("sampling.n must be at least 2 and sampling.temperature above 0: a pair is two answers")
    if not config.length_penalty >= 0:
        raise ValueError(f"length_penalty must be 0 or a positive number, got {config.length_penalty}")
    if config.checkpoint.every_steps < 1:
        raise ValueError("checkpoint.every_steps must be at least 1: a round begins with the last one's checkpoint")
    if config.judge == "reward_model":
        check_reward_model(config.reward_model)
    elif config.judge == "answer":
        read_all(read_questions, config)
    elif not config.judge_command or shutil.which(config.judge_command[0]) is None:
        raise ValueError(f"judge_command {list(config.judge_command)} names no program that can be run")
    check_loss(config.dpo)


def read_all(read: Callable[[str], list[Record]], config: OnlineDPOConfig) -> list[Record]:
    """What `read` makes of every row of the files of prompts."""
    return [record for path in config.data.files for record in read(path)]


def first_model(config: OnlineDPOConfig, tokenizer: Tokenizer, world: World) -> Llama:
    """The policy that the first round starts from."""
    return build.build_model(Llama, config.model, config.parallel, tokenizer, world, seed=config.batch.seed)


def play_round(
    number: int,
    folder: Path,
    config: OnlineDPOConfig,
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    world: World,
) -> None:
    """One round, or what is left of it; `model` is the policy that the round starts from, and then the one it makes."""
    first = build.name_weights(config.model, seed=config.batch.seed)
    start = f"{first}, round {number}"
    options = {"template": config.data.template, "trim": config.data.trim}
    if not world.gather((folder / "pairs.jsonl").exists())[0]:
        ids = [encode_answers(prompt.messages, (), tokenizer, **options)[0] for prompt in prompts]
        check_lengths(prompts, ids, model.config)
        copy = gather_model(model, world.device, dtype=getattr(torch, config.parallel.dtype))
        settings = replace(config.sampling, seed=config.sampling.seed + number)
        rows = rollout(
            Sampler(copy, tokenizer),
            ids,
            sampling_params(settings),
            folder / "answers",
            world,
            weights=start,
            progress=config.log.progress,
        )
        del copy
        rewards = judge(config, prompts, rows, folder / "rewards", world)
        if world.is_main:
            choose(settings.seed, folder, config, prompts, rows, rewards)
        world.barrier()

    encode = partial(encode_preference, tokenizer=tokenizer, max_tokens=config.data.max_tokens, **options)
    sources, drops, _ = load_pairs([str(folder / "pairs.jsonl")], PairsConfig(), encode)
    loader = build.build_loader(sources, config.data, config.batch, world)
    reference, weights = model, start
    if not (config.new_reference or config.dpo.reference == "none"):
        reference, weights = first_model(config, tokenizer, world), first
    learn(config, model, reference, loader, folder, world, weights=weights)
    if world.is_main:
        answers = json.loads((folder / "answers.json").read_text()) if (folder / "answers.json").exists() else {}
        last = (folder / "metrics.jsonl").read_text().splitlines()[-1:]
        learned = {"pairs": len(sources[0]), "dropped": drops.summary(), "metrics": json.loads("".join(last) or "{}")}
        write_json(folder / "summary.json", {**answers, **learned})
    world.barrier()


def judge(
    config: OnlineDPOConfig, prompts: Sequence[Prompt], rows: Sequence[Row], folder: Path, world: World
) -> list[list[float]]:
    """The reward of every answer; those that a model or a program computed are kept in `folder`."""
    if config.judge == "answer":
        return checked_rewards(read_all(read_questions, config), rows)
    if config.judge == "command":
        asked = [
            {
                "id": prompt.id,
                "messages": prompt.messages,
                "completions": [answer["text"] for answer in row["answers"]],
                "answer": prompt.answer,
            }
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        return command_rewards(config.judge_command, asked, folder, world)
    tokenizer = load_tokenizer(config.reward_model)
    model = load_reward_model(config.reward_model, dtype=getattr(torch, config.parallel.dtype), device=world.device)
    build.check_vocabulary(tokenizer, model.config, config.reward_model)
    options = {"template": config.reward_template, "trim": config.data.trim}
    encoded = [
        encode_answers(prompt.messages, [answer["text"] for answer in row["answers"]], tokenizer, **options)
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    ids, answers = zip(*encoded, strict=True)
    longest = max(len(prompt) + len(answer) for prompt, group in encoded for answer in group)
    return cached_rewards(
        model,
        ids,
        answers,
        folder,
        world,
        weights=weights_fingerprint(config.reward_model),
        max_tokens=max(16_384, longest),
        progress=config.log.progress,
    )


def choose(
    seed: int,
    folder: Path,
    config: OnlineDPOConfig,
    prompts: Sequence[Prompt],
    rows: Sequence[Row],
    rewards: Sequence[Sequence[float]],
) -> None:
    """Write answers.json, then pairs.jsonl.

    Raises:
        ValueError: when no prompt gives a pair.
    """
    skipped = Drops()
    options = {"choose": config.choose, "length_penalty": config.length_penalty, "repeats": False}
    pairs = list(ranked_pairs(prompts, rows, rewards, seed=seed, skipped=skipped, **options))
    if not pairs:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.count().items())
        raise ValueError(f"{folder}: no prompt gives a pair ({reasons}); read {folder / 'answers'} to see why")
    answers = list(chain.from_iterable(row["answers"] for row in rows))
    summary = summarize_rewards(list(chain(*rewards)), [len(answer["tokens"]) for answer in answers])
    figures = {
        "prompts": len(rows),
        "rewards": asdict(summary),
        "tokens": sum(len(answer["tokens"]) for answer in answers),
        "cut": sum(answer["finish_reason"] == "length" for answer in answers),
        "ties": skipped.count().get(TIE, 0),
        "without_pair": skipped.summary(),
    }
    write_json(folder / "answers.json", figures)
    write_jsonl(folder / "pairs.jsonl", pairs)


def main() -> None:
    """Entry point of `torchrun recipes/online_dpo.py`."""
    launch(OnlineDPOConfig, run)


if __name__ == "__main__":
    main()
