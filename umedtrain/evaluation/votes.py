"""Choosing among a prompt's samples: votes, the best by reward, and what the pool holds at most.

Answers are compared by equality (letters, or texts already normalised); None is an answer that could not be
read. It never wins a vote, and chosen by reward it is wrong.
"""

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Answer = Hashable
T = TypeVar("T")


def count_votes(answers: Sequence[Answer | None]) -> dict[Answer, int]:
    """How many samples gave each answer; those that could not be read are left out."""
    counts: dict[Answer, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    return counts


def majority_vote(
    answers: Sequence[Answer | None], *, scores: Sequence[float] | None = None, seed: int = 0
) -> Answer | None:
    """The answer that most samples gave (self-consistency, arXiv 2203.11171), or None when none could be
    read.

    Args:
        scores: one per sample, such as rewards or sequence logprobs; ties go to the larger sum.
        seed: ties that are left go to the answer that comes first in a random order of the sample indices.
    """
    counts = count_votes(answers)
    sums = _sums(answers, scores) if scores is not None else dict.fromkeys(counts, 0.0)
    return _largest({answer: (counts[answer], sums[answer]) for answer in counts}, answers, seed)


def weighted_vote(answers: Sequence[Answer | None], weights: Sequence[float], *, seed: int = 0) -> Answer | None:
    """The answer with the largest sum of weights; ties as in `majority_vote`.

    A reward model's rewards have no zero point, so they are no weights by themselves: see `reward_weights`.
    """
    sums = _sums(answers, weights)
    return _largest({answer: (total,) for answer, total in sums.items()}, answers, seed)


def reward_weights(rewards: Sequence[float]) -> list[float]:
    """exp(reward), scaled to a largest of 1: a shift of all of a prompt's rewards changes no share."""
    _check_scores(rewards, rewards)
    top = max(rewards, default=0.0)
    return [math.exp(reward - top) for reward in rewards]


def expected_majority_score(answers: Sequence[Answer | None], gold: Answer) -> float:
    """The vote's score over all ways to break a tie: 1/k when k answers tie, the right one among them."""
    counts = count_votes(answers)
    tied = [answer for answer, count in counts.items() if count == max(counts.values())]
    return 1.0 / len(tied) if gold in tied else 0.0


def best_of_n(rewards: Sequence[float], samples: Sequence[T]) -> T:
    """The sample with the largest reward; of equal ones the first."""
    _check_scores(rewards, samples)
    if not samples:
        raise ValueError("best of 0 samples does not exist: give at least one")
    return samples[max(range(len(rewards)), key=lambda index: (rewards[index], -index))]


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n of which `right` are.

    1 - C(n - right, k) / C(n, k), arXiv 2107.03374 equation 1.
    """
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= right <= n, not k = {k}, n = {n}, right = {right}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


@dataclass(frozen=True)
class Samples:
    """All samples of one question, in the order in which they were numbered.

    Attributes:
        gold: the right answer.
        answers: what each sample answered, None when that could not be read.
        rewards: the reward model's, or None without one.
        truncated: whether each sample was cut at its token limit.
    """

    gold: Answer
    answers: tuple[Answer | None, ...]
    rewards: tuple[float, ...] | None = None
    truncated: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("rewards", "truncated"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.answers):
                raise ValueError(f"{len(self.answers)} answers with {len(values)} {name}: give one for each")
        if not self.answers:
            raise ValueError("a question without samples cannot be scored: give at least one answer")

    def first(self, k: int) -> "Samples":
        """The first k samples.

        Raises:
            ValueError: when there are fewer.
        """
        if not 1 <= k <= len(self.answers):
            raise ValueError(f"cannot take the first {k} of {len(self.answers)} samples")
        rewards = None if self.rewards is None else self.rewards[:k]
        truncated = None if self.truncated is None else self.truncated[:k]
        return Samples(self.gold, self.answers[:k], rewards, truncated)


@dataclass(frozen=True)
class SampledScores:
    """What a pool of k samples for each question gives, by every way of choosing among them.

    Attributes:
        k: samples of each question.
        scores: method -> one score from 0 to 1 for each question, in order, so that intervals and paired
            tests can be taken. "mean" is a single sample's expected score, "majority" the vote,
            "majority_expected" the vote over all ways to break ties, "oracle" 1 when any sample is right;
            "weighted" (vote by exp of the reward) and "best_of_n" are there when there are rewards.
        unparsed_rate, truncated_rate: shares of all samples; None where it was not recorded.
    """

    k: int
    scores: Mapping[str, tuple[float, ...]]
    unparsed_rate: float
    truncated_rate: float | None

    def means(self) -> dict[str, float]:
        """Each method's mean over the questions."""
        return {method: math.fsum(values) / len(values) for method, values in self.scores.items()}


def score_samples(pool: Sequence[Samples], *, seed: int = 0) -> SampledScores:
    """Score a pool by every method; all its questions must have equally many samples.

    Ties of the vote go to the larger sum of rewards where there are rewards, then to a seeded order.

    Raises:
        ValueError: for an empty pool, unequal numbers of samples, or rewards for a part of the questions
            only.
    """
    if not pool:
        raise ValueError("an empty pool has no score: give at least one question")
    k = len(pool[0].answers)
    if any(len(item.answers) != k for item in pool):
        raise ValueError("all questions must have equally many samples; take the first k of each with `first`")
    for name in ("rewards", "truncated"):
        if len({getattr(item, name) is None for item in pool}) != 1:
            raise ValueError(f"some questions have {name} and some have none: give them for all or for none")
    each = [_score_item(item, f"{seed}:{index}") for index, item in enumerate(pool)]
    unparsed = sum(answer is None for item in pool for answer in item.answers)
    truncated = None if pool[0].truncated is None else sum(sum(item.truncated) for item in pool) / (k * len(pool))
    scores = {method: tuple(item[method] for item in each) for method in each[0]}
    return SampledScores(k, scores, unparsed / (k * len(pool)), truncated)


def score_prefixes(
    pool: Sequence[Samples], ks: Sequence[int] = (1, 2, 4, 8, 16), *, seed: int = 0
) -> list[SampledScores]:
    """`score_samples` on the first k samples of every question, for each k."""
    return [score_samples([item.first(k) for item in pool], seed=seed) for k in ks]


def _score_item(item: Samples, seed: str) -> dict[str, float]:
    right = [answer == item.gold for answer in item.answers]
    scores = {
        "mean": sum(right) / len(right),
        "majority": float(majority_vote(item.answers, scores=item.rewards, seed=seed) == item.gold),
        "majority_expected": expected_majority_score(item.answers, item.gold),
    }
    if item.rewards is not None:
        weighted = weighted_vote(item.answers, reward_weights(item.rewards), seed=seed)
        scores["weighted"] = float(weighted == item.gold)
        scores["best_of_n"] = float(best_of_n(item.rewards, right))
    scores["oracle"] = float(any(right))
    return scores


def _sums(answers: Sequence[Answer | None], weights: Sequence[float]) -> dict[Answer, float]:
    _check_scores(weights, answers)
    parts: dict[Answer, list[float]] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            parts.setdefault(answer, []).append(weight)
    return {answer: math.fsum(values) for answer, values in parts.items()}


def _check_scores(scores: Sequence[float], samples: Sequence[object]) -> None:
    if len(scores) != len(samples):
        raise ValueError(f"{len(samples)} samples with {len(scores)} scores: give one for each")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"the score of sample {index} is {score}: it must be a finite number")


def _largest(
    keys: Mapping[Answer, tuple[float, ...]], answers: Sequence[Answer | None], seed: int | str
) -> Answer | None:
    if not keys:
        return None
    top = max(keys.values())
    tied = {answer for answer, key in keys.items() if key == top}
    # random() is the one draw that Python promises to repeat in all its versions. Numbers are drawn by
    # sample, so more samples of a question do not change the order among the first.
    draw = random.Random(seed)
    order = [(draw.random(), index) for index in range(len(answers))]
    return next(answers[index] for _, index in sorted(order) if answers[index] in tied)
