"""The whole of UltraMedical in small: data, SFT, reward model, DPO, an online round, evaluation.

    torchrun --nproc-per-node 2 recipes/ultramedical.py recipes/configs/demo/ultramedical.toml

Questions about diseases come from ICD-10-CM, split by category, so that the questions of the evaluation are about
categories that no stage has seen. Every stage is one of the other recipes with its own config beside this one's, and
is skipped when its folder holds the finished run: start the same command again after an interruption.
"""

import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from umedtrain.collection import icd10cm
from umedtrain.collection.pairs import add_answers, checked_pairs, ranked_pairs
from umedtrain.config import SamplingConfig, read_config
from umedtrain.distributed.world import World
from umedtrain.evaluation.benchmark import METHODS
from umedtrain.evaluation.questions import read_questions
from umedtrain.evaluation.scoring import score_rows
from umedtrain.evaluation.statistics import Estimate, mcnemar, paired_bootstrap
from umedtrain.evaluation.table import markdown_table
from umedtrain.model.heads import RewardModel
from umedtrain.recipes import dpo, evaluate, reward, sft
from umedtrain.records import Messages, read_conversations, read_prompts, write_jsonl
from umedtrain.sampling import Sampler
from umedtrain.sampling.rollout import Row, rollout, sampling_params
from umedtrain.text.chat import render_chat, render_prompt_and_answer
from umedtrain.text.sentencepiece import train_sentencepiece
from umedtrain.text.tokenizer import load_tokenizer
from umedtrain.training.run import launch, start_run, write_json
from umedtrain.weights import load_model

ANSWER = "So, the answer is {}."
MODELS = ("SFT", "DPO", "online DPO")
"""Rows of the final table, in the order of training."""
SHOWN = ("greedy", "mean", "majority", "weighted", "best_of_n", "oracle")
"""Columns of the final table."""


@dataclass(frozen=True)
class Split:
    """One split of the data. No category of ICD-10-CM stands in two splits."""

    share: float = 0.2
    """Share of every chapter's categories."""
    questions: int = 1000
    """Questions drawn from them."""


@dataclass(frozen=True)
class SplitsConfig:
    """Questions with answers for SFT, questions whose sampled answers are checked for reward model and DPO, questions
    without answers for the online round, and two splits to evaluate on.
    """

    sft: Split = field(default_factory=Split)
    preference: Split = field(default_factory=Split)
    online: Split = field(default_factory=Split)
    validation: Split = field(default_factory=Split)
    test: Split = field(default_factory=Split)


@dataclass(frozen=True)
class PipelineConfig:
    """The whole of UltraMedical in small."""

    output: str = "runs/demo"
    """Folder of all stages."""
    seed: int = 0
    """Seed of data, weights, shuffling and sampling of every stage."""
    configs: str = "recipes/configs/demo"
    """Folder with sft.toml, reward_base.toml, reward.toml, refresh.toml, dpo.toml, online.toml and evaluate.toml."""
    evaluate_on: Literal["validation", "test"] = "test"
    """Split of the final evaluation. Choose settings on validation; test is for the end."""
    vocab_size: int = 1536
    """Entries of the tokenizer that is trained on the SFT split."""
    splits: SplitsConfig = field(default_factory=SplitsConfig)
    candidates: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers to the preference split are sampled."""
    rollouts: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers to the online split are sampled."""
    guesses: int = 3
    """Answers per question of an annotator who names a chapter at random."""
    dpo_questions: int = 8000
    """Questions of the preference split that DPO sees, one pair each. The reward model sees all of them."""
    reward_pairs: int = 3
    """Pairs per question, at most, that the reward model trains on. 0: all."""


class Stages:
    """Paths of one pipeline run, and the small steps between the recipes."""

    def __init__(self, config: PipelineConfig, world: World) -> None:
        self.config, self.world, self.root = config, world, Path(config.output)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that the stage `name` takes to OUTPUT/stages.json; a resumed stage adds to its earlier part."""
        if self.world.is_main:
            print(f"stage {name}", flush=True)
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.world.is_main:
                seconds = self.seconds()
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
                write_json(self.root / "stages.json", seconds)

    def seconds(self) -> dict[str, float]:
        """Wall time of each stage so far."""
        path = self.root / "stages.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def data(self, split: str) -> str:
        """The file of a split."""
        return str(self.root / "data" / f"{split}.jsonl")

    def recipe(self, schema: type, name: str, folder: str, **changes: Any) -> Any:
        """The config file `name`, with output folder, seed and the given fields of its sections put in."""
        config = read_config(schema, Path(self.config.configs) / f"{name}.toml")
        if hasattr(config, "batch"):
            changes["batch"] = {"seed": self.config.seed}
        sections = {
            key: dataclasses.replace(getattr(config, key), **value) if isinstance(value, dict) else value
            for key, value in changes.items()
        }
        return dataclasses.replace(config, output=str(self.root / folder), **sections)

    def answers(self, model: Path, split: str, folder: str, settings: SamplingConfig) -> list[Row]:
        """Sampled answers of a model to every question of a split, and those of the other annotators.

        One annotator guesses. One knows: it gives the reference answer, where the split has one.
        """
        prompts, tokenizer = read_prompts(self.data(split)), load_tokenizer(model)
        params = sampling_params(dataclasses.replace(settings, seed=self.config.seed))
        ids = [render_chat(prompt.messages, tokenizer, add_generation_prompt=True)[0] for prompt in prompts]
        sampler = Sampler(load_model(model), tokenizer)
        rows = rollout(sampler, ids, params, self.root / folder, self.world, weights=str(model), chunk=512)
        labels = list(icd10cm.LABELS.values())
        pools = []
        for prompt, row in zip(prompts, rows, strict=True):
            draw = random.Random(f"{self.config.seed} guesses {prompt.id}")
            guesses = [ANSWER.format(draw.choice(labels)) for _ in range(self.config.guesses)]

            def encode(text: str, messages: Messages = prompt.messages) -> list[int]:
                return render_prompt_and_answer(messages, text, tokenizer)[1]

            reference = [ANSWER.format(prompt.answer)] if prompt.answer else []
            pools.append(add_answers(add_answers(row, reference, "reference", encode), guesses, "guess", encode))
        return pools

    def write(self, path: str, rows: Callable[[], Sequence[dict[str, Any]]]) -> str:
        """Write rows on rank 0 unless the file is there already; returns the path."""
        target = self.root / path
        if self.world.is_main and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(target, rows())
        self.world.barrier()
        return str(target)

    def rewards(self, reward_model: Path, split: str, rows: Sequence[Row]) -> list[list[float]]:
        """The reward of every sampled answer."""
        model = load_model(reward_model)
        assert isinstance(model, RewardModel)
        tokenizer = load_tokenizer(reward_model)
        prompts = [
            render_chat(prompt.messages, tokenizer, add_generation_prompt=True)[0]
            for prompt in read_prompts(self.data(split))
        ]
        return score_rows(model, prompts, rows, self.world)


def run(config: PipelineConfig, world: World) -> None:
    """All stages, one after the other."""
    stages = Stages(config, world)
    if not start_run(stages.root, config, world):
        if world.is_main:
            print((stages.root / "report.md").read_text())
        return

    with stages.timed("data"):
        tokenizer = build_data(stages)
    with stages.timed("sft"):
        sft_model = train_sft(stages, "sft", tokenizer)
    with stages.timed("reward_base"):
        # Comparing an answer with its question takes more layers than writing it.
        reward_base = train_sft(stages, "reward_base", tokenizer)
    with stages.timed("answers"):
        dpo_pairs, reward_pairs = build_pairs(stages, sft_model, "preference")
    with stages.timed("reward"):
        reward_model = train_reward(stages, "reward", reward_base, reward_pairs)
    with stages.timed("dpo"):
        dpo_model = train_dpo(stages, "dpo", sft_model, dpo_pairs)
    with stages.timed("refresh"):
        # The reward model has to rank what the new policy writes: it learns from that policy's answers too.
        _, fresh_pairs = build_pairs(stages, dpo_model, "fresh")
        fresh_reward_model = train_reward(stages, "refresh", reward_model, fresh_pairs)
    with stages.timed("online"):
        online_model = online_round(stages, dpo_model, fresh_reward_model)
    policies = (sft_model, dpo_model, online_model)
    reward_models = (reward_model, fresh_reward_model, fresh_reward_model)
    with stages.timed("evaluate"):
        results = evaluate_all(stages, dict(zip(MODELS, zip(policies, reward_models, strict=True), strict=True)))
    if world.is_main:
        report(stages, results, online_model)


def build_data(stages: Stages) -> str:
    """Questions from ICD-10-CM and a tokenizer trained on those of the SFT split; returns the tokenizer's file."""
    tokenizer = stages.root / "data" / "tokenizer.model"
    if stages.world.is_main and not tokenizer.exists():
        splits = dataclasses.asdict(stages.config.splits)
        shares = {name: split["share"] for name, split in splits.items()}
        sizes = {name: split["questions"] for name, split in splits.items()}
        icd10cm.build(tokenizer.parent, seed=stages.config.seed, shares=shares, sizes=sizes)
        texts = [m["content"] for row in read_conversations(stages.data("sft")) for m in row.messages]
        train_sentencepiece(texts, tokenizer, vocab_size=stages.config.vocab_size)
    stages.world.barrier()
    return str(tokenizer)


def build_pairs(stages: Stages, policy: Path, folder: str) -> tuple[str, str]:
    """Answers to the preference split, labelled by the checker; returns the files for DPO and for the reward model.

    As in the paper, the reward model sees several pairs of a question and DPO one.
    """
    config = stages.config
    rows = stages.answers(policy, "preference", f"{folder}/answers", config.candidates)
    questions, few = read_questions(stages.data("preference")), config.dpo_questions
    one = stages.write(
        f"{folder}/one_pair.jsonl",
        lambda: list(checked_pairs(questions[:few], rows[:few], most=1, seed=config.seed)),
    )
    several = stages.write(
        f"{folder}/pairs.jsonl",
        lambda: list(checked_pairs(questions, rows, most=config.reward_pairs, seed=config.seed + 1)),
    )
    return one, several


def train_sft(stages: Stages, name: str, tokenizer: str) -> Path:
    """A language model from scratch on the SFT split, with the settings of NAME.toml."""
    data = {"files": (stages.data("sft"),)}
    config = stages.recipe(sft.SFTConfig, name, name, model={"tokenizer": tokenizer}, data=data)
    return sft.run(config, stages.world)


def train_reward(stages: Stages, name: str, start: Path, pairs: str) -> Path:
    """A reward model on top of `start`, with the settings of NAME.toml."""
    config = stages.recipe(reward.RewardConfig, name, name, model={"path": str(start)}, data={"files": (pairs,)})
    return reward.run(config, stages.world)


def train_dpo(stages: Stages, name: str, start: Path, pairs: str) -> Path:
    """DPO from `start`, which is also the reference."""
    config = stages.recipe(dpo.DPOConfig, name, name, model={"path": str(start)}, data={"files": (pairs,)})
    return dpo.run(config, stages.world)


def online_round(stages: Stages, policy: Path, reward_model: Path) -> Path:
    """One online round: the policy answers new questions, the reward model ranks its answers, then DPO.

    Nobody looks at the right answers of these questions.
    """
    rows = stages.answers(policy, "online", "online_answers", stages.config.rollouts)
    rewards = stages.rewards(reward_model, "online", rows)
    prompts = read_prompts(stages.data("online"))
    pairs = stages.write(
        "online_answers/pairs.jsonl", lambda: list(ranked_pairs(prompts, rows, rewards, seed=stages.config.seed))
    )
    return train_dpo(stages, "online", policy, pairs)


def evaluate_all(stages: Stages, models: dict[str, tuple[Path, Path]]) -> dict[str, Any]:
    """Every model, with the reward model of its stage, on the questions of the final split."""
    questions = stages.data(stages.config.evaluate_on)
    results = {}
    for name, (model, reward_model) in models.items():
        config = stages.recipe(
            evaluate.EvaluateConfig,
            "evaluate",
            f"evaluate/{name.replace(' ', '_')}",
            model=str(model),
            reward_model=str(reward_model),
            questions=(questions,),
            sampling={"seed": stages.config.seed},
        )
        results[name] = evaluate.run(config, stages.world, show=False)["questions"][questions]
    return results


def report(stages: Stages, results: dict[str, Any], final_model: Path) -> None:
    """Print and write OUTPUT/report.md: accuracies with intervals, paired tests, speed, and how to chat."""
    first = results["SFT"]
    accuracy = [
        [name, *(Estimate(**result["accuracy"][method]) for method in SHOWN), result["unparsed"]["greedy"]]
        for name, result in results.items()
    ]
    command = Path(sys.executable).with_name("umedtrain")
    ranking = [[name, Estimate(**result["reward_accuracy"])] for name, result in results.items()]
    text = "\n".join(
        [
            f"# {stages.config.evaluate_on} split, seed {stages.config.seed}: {first['questions']} questions about "
            f"categories that no stage has seen\n",
            f"Chance {first['chance']:.3f}, majority class {first['majority_class']:.3f}. 95% intervals in brackets.\n",
            markdown_table(["model", *(METHODS[method] for method in SHOWN), "unparsed"], accuracy),
            "Share of right-wrong pairs among a model's own answers that its stage's reward model ranks rightly:\n",
            markdown_table(["answers of", "reward accuracy"], ranking),
            "Paired differences on the same questions (exact McNemar test, paired bootstrap for the mean sample):\n",
            markdown_table(["step", "difference, 95% interval, p"], comparisons(results)),
            markdown_table(["stage", "seconds", "training tokens/s"], speeds(stages)),
            f"Chat with the result: {command} chat {final_model} --remember False\n",
        ]
    )
    (stages.root / "report.md").write_text(text, encoding="utf-8")
    write_json(stages.root / "summary.json", {"seed": stages.config.seed, "split": stages.config.evaluate_on} | results)
    print(text)


def comparisons(results: dict[str, Any]) -> list[list[Any]]:
    """Each step of the chain against the one before it, question by question."""
    greedy = {name: results[name]["scores"]["greedy"] for name in MODELS}
    rows = [
        [f"{before} -> {after}, greedy", mcnemar(greedy[before], greedy[after])] for before, after in pairwise(MODELS)
    ]
    for name in MODELS:
        scores = results[name]["scores"]
        rows += [
            [f"{name}: mean sample -> majority vote", paired_bootstrap(scores["mean"], scores["majority"], seed=0)],
            [f"{name}: majority vote -> best by reward", mcnemar(scores["majority"], scores["best_of_n"])],
        ]
    return rows


def speeds(stages: Stages) -> list[list[Any]]:
    """Wall time of each stage, and tokens per second of those that train."""
    rows: list[list[Any]] = []
    for name, seconds in stages.seconds().items():
        summary = stages.root / name / "summary.json"
        speed = json.loads(summary.read_text())["tokens_per_second"] if summary.exists() else None
        rows.append([name, round(seconds), speed and round(speed)])
    return rows


def main() -> None:
    """Entry point of `torchrun recipes/ultramedical.py`."""
    launch(PipelineConfig, run)


if __name__ == "__main__":
    main()
