"""What a model's answers to a set of questions are worth, by every way of choosing an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umedtrain.evaluation.extraction import extract, right_answer
from umedtrain.evaluation.questions import Question
from umedtrain.evaluation.statistics import Estimate, chance, majority_class, mean_interval
from umedtrain.evaluation.votes import Samples, score_samples

Row = Mapping[str, Any]
"""{"answers": [{"text", "finish_reason"}]}: the completions of one question."""

METHODS = {
    "greedy": "greedy",
    "mean": "mean sample",
    "majority": "majority vote",
    "weighted": "reward-weighted vote",
    "best_of_n": "best by reward",
    "oracle": "oracle",
}
"""Key in `BenchmarkScores.scores` and what tables call it."""


@dataclass(frozen=True)
class BenchmarkScores:
    """Scores of one model on one set of questions.

    Attributes:
        scores: method -> score from 0 to 1 of each question, in order. "greedy" from greedy answers, the others from
            the samples; those by reward only with rewards.
        unparsed, truncated: for "greedy" and "samples", the share of completions without a readable answer, and of
            those that hit the token limit. An unreadable answer is wrong.
        chance: expected score of a random option; for open questions, of a random one of all right answers.
        majority_class: score of always giving the most frequent right answer.
        samples: completions per question besides the greedy one.
        reward_accuracy: for each question with right and wrong samples, the share of pairs of a right and a wrong
            sample that the rewards rank rightly (ties half); None without rewards.
    """

    scores: dict[str, tuple[float, ...]]
    unparsed: dict[str, float]
    truncated: dict[str, float]
    chance: float
    majority_class: float
    samples: int
    reward_accuracy: tuple[float, ...] | None

    def estimates(self) -> dict[str, Estimate]:
        """Each method's mean with its 95% interval."""
        return {method: mean_interval(values) for method, values in self.scores.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: means, intervals and every question's scores, so that others can be compared pair by pair."""
        return {
            "questions": len(next(iter(self.scores.values()))),
            "samples": self.samples,
            "chance": self.chance,
            "majority_class": self.majority_class,
            "accuracy": {method: estimate.as_dict() for method, estimate in self.estimates().items()},
            "unparsed": self.unparsed,
            "truncated": self.truncated,
            "reward_accuracy": mean_interval(self.reward_accuracy).as_dict() if self.reward_accuracy else None,
            "scores": {method: list(values) for method, values in self.scores.items()},
        }


def score_benchmark(
    questions: Sequence[Question],
    greedy: Sequence[Row],
    samples: Sequence[Row] | None = None,
    rewards: Sequence[Sequence[float]] | None = None,
    *,
    seed: int = 0,
) -> BenchmarkScores:
    """Score completions.

    Args:
        questions: what was asked.
        greedy: one completion per question.
        samples: several per question, equally many; None if there are none.
        rewards: one per sample, or None.
        seed: of the order that breaks ties of a vote.
    """
    gold = [right_answer(question) for question in questions]
    read = [_read(question, row) for question, row in zip(questions, greedy, strict=True)]
    scores = {"greedy": tuple(float(answers[0] == right) for (answers, _), right in zip(read, gold, strict=True))}
    reward_accuracy = None
    unparsed, truncated = {"greedy": _share_unparsed(read)}, {"greedy": _share_truncated(read)}
    if samples is not None:
        read = [_read(question, row) for question, row in zip(questions, samples, strict=True)]
        pool = [
            Samples(right, answers, None if rewards is None else tuple(rewards[index]), cut)
            for index, ((answers, cut), right) in enumerate(zip(read, gold, strict=True))
        ]
        sampled = score_samples(pool, seed=seed)
        scores |= {method: values for method, values in sampled.scores.items() if method in METHODS}
        if rewards is not None:
            reward_accuracy = tuple(share for item in pool if (share := _ranked_rightly(item)) is not None)
        unparsed["samples"], truncated["samples"] = _share_unparsed(read), _share_truncated(read)
    options = [len(question.options) or len(set(gold)) for question in questions]
    return BenchmarkScores(
        scores={method: scores[method] for method in METHODS if method in scores},
        unparsed=unparsed,
        truncated=truncated,
        chance=chance(options),
        majority_class=majority_class(gold)[1],
        reward_accuracy=reward_accuracy,
        samples=0 if samples is None else len(samples[0]["answers"]),
    )


def _ranked_rightly(item: Samples) -> float | None:
    """Share of pairs of a right and a wrong answer that the rewards rank rightly; None when all are right or all wrong.

    Equal answers with equal rewards count once, so that what a policy says often does not drown the rest.
    """
    distinct = dict.fromkeys(zip(item.answers, item.rewards, strict=True))
    good = [reward for answer, reward in distinct if answer == item.gold]
    bad = [reward for answer, reward in distinct if answer != item.gold]
    shares = [1.0 if g > b else 0.5 if g == b else 0.0 for g in good for b in bad]
    return sum(shares) / len(shares) if shares else None


_Read = tuple[tuple[str | None, ...], tuple[bool, ...]]


def _read(question: Question, row: Row) -> _Read:
    """The answers that a question's completions give, and which completions were cut."""
    cut = tuple(answer["finish_reason"] == "length" for answer in row["answers"])
    texts = [answer["text"] for answer in row["answers"]]
    return tuple(extract(question, text, truncated=was_cut) for text, was_cut in zip(texts, cut, strict=True)), cut


def _share_unparsed(read: Sequence[_Read]) -> float:
    answers = [answer for all_of_one, _ in read for answer in all_of_one]
    return sum(answer is None for answer in answers) / len(answers)


def _share_truncated(read: Sequence[_Read]) -> float:
    cut = [was_cut for _, all_of_one in read for was_cut in all_of_one]
    return sum(cut) / len(cut)
