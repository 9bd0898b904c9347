"""How well rewards agree with preferences, and how much of that is answer length."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from umedtrain.evaluation.statistics import pearson


@dataclass(frozen=True)
class ScoredPair:
    """A pair with its rewards, its answers' lengths in tokens and its group (such as `label_type`)."""

    chosen: float
    rejected: float
    chosen_length: int
    rejected_length: int
    group: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.chosen) or not math.isfinite(self.rejected):
            raise ValueError(f"rewards must be finite numbers, not {self.chosen} and {self.rejected}")
        if self.chosen_length < 0 or self.rejected_length < 0:
            raise ValueError(f"lengths must not be negative: {self.chosen_length} and {self.rejected_length}")


@dataclass(frozen=True)
class Stratum:
    """Pairs of one kind; `accuracy` is None when there is none."""

    n: int
    accuracy: float | None


@dataclass(frozen=True)
class LengthBias:
    """Whether length explains the preferences, and the rewards.

    Attributes:
        chosen_longer_share: pairs whose chosen answer has more tokens, of all.
        preferred_longer_share: pairs whose longer answer has the larger reward, of those that differ in both.
        longer, shorter, similar: reward accuracy where the chosen answer is longer, shorter, or within 10% of
            the longer one's length; together they are all pairs.
        longest_baseline: accuracy of always preferring the longer answer, equal lengths counting half.
        spearman: mean over prompts of the rank correlation of reward and length; None without any such
            prompt.
        spearman_n: prompts that have one, those whose rewards and lengths both differ.
    """

    chosen_longer_share: float
    preferred_longer_share: float | None
    longer: Stratum
    shorter: Stratum
    similar: Stratum
    longest_baseline: float
    spearman: float | None
    spearman_n: int


@dataclass(frozen=True)
class RewardSummary:
    """Rewards of many answers together.

    Attributes:
        count: answers.
        mean, std: of their rewards; std of these answers, not an estimate for others.
        length_correlation: Pearson's, of reward and length over all answers; None where either does not vary.
            `spearman_within` is without what differs from prompt to prompt.
    """

    count: int
    mean: float
    std: float
    length_correlation: float | None


@dataclass(frozen=True)
class Bin:
    """Pairs of about the same confidence; `confidence` is their mean confidence."""

    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Whether a reward model is as sure as it is right.

    The model says that of two answers the one with the larger reward is the better one with probability
    sigmoid(|margin|), its confidence.

    Attributes:
        probability: mean of sigmoid(margin), the probability that it gives to the right order.
        confidence: mean confidence; where it exceeds the accuracy, the model is too sure.
        expected_error: expected calibration error, the mean over bins of |accuracy - confidence|, weighted by their
            pairs (Guo et al. 2017, arXiv 1706.04599, eq. 3).
        bins: of equal width from 0.5 to 1, in order, those that hold any pair.
    """

    probability: float
    confidence: float
    expected_error: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class RewardScores:
    """A reward model's agreement with preference pairs.

    Attributes:
        pairs: 1 where the chosen answer has the larger reward, 0 where the smaller, 0.5 for equal rewards; in
            order, for intervals and paired tests.
        accuracy: their mean over all pairs, which weighs groups by size.
        groups: accuracy of each group.
        group_mean: the plain mean over groups, as Medical RewardBench averages.
        mean_margin, median_margin: of reward(chosen) - reward(rejected).
        chosen, rejected: rewards of either side and their correlation with length.
        calibration: see `Calibration`.
        length: see `LengthBias`.
    """

    pairs: tuple[float, ...]
    accuracy: float
    groups: dict[str, Stratum]
    group_mean: float
    mean_margin: float
    median_margin: float
    chosen: RewardSummary
    rejected: RewardSummary
    calibration: Calibration
    length: LengthBias


def summarize_rewards(rewards: Sequence[float], lengths: Sequence[int]) -> RewardSummary:
    """What `RewardSummary` says of answers with these rewards and lengths in tokens.

    Raises:
        ValueError: without any answer, or for another number of lengths.
    """
    correlation = pearson(rewards, lengths)
    return RewardSummary(len(rewards), _mean(rewards), statistics.pstdev(rewards), correlation)


def score_rewards(pairs: Sequence[ScoredPair]) -> RewardScores:
    """All figures about one reward model on one set of pairs.

    Raises:
        ValueError: without any pair.
    """
    if not pairs:
        raise ValueError("no pairs, so there is nothing to score: give at least one")
    scores = tuple(pairwise_score(pair) for pair in pairs)
    groups = {group: _stratum(pairs, lambda pair, group=group: pair.group == group) for group in _groups(pairs)}
    margins = sorted(pair.chosen - pair.rejected for pair in pairs)
    middle = len(margins) // 2
    return RewardScores(
        pairs=scores,
        accuracy=_mean(scores),
        groups=groups,
        group_mean=_mean([stratum.accuracy for stratum in groups.values()]),
        mean_margin=_mean(margins),
        median_margin=margins[middle] if len(margins) % 2 else (margins[middle - 1] + margins[middle]) / 2,
        chosen=summarize_rewards([pair.chosen for pair in pairs], [pair.chosen_length for pair in pairs]),
        rejected=summarize_rewards([pair.rejected for pair in pairs], [pair.rejected_length for pair in pairs]),
        calibration=calibration(pairs),
        length=length_bias(pairs),
    )


def calibration(pairs: Sequence[ScoredPair], *, bins: int = 10) -> Calibration:
    """What `Calibration` says of these pairs.

    Raises:
        ValueError: without any pair or bin.
    """
    if not pairs or bins < 1:
        raise ValueError(f"calibration needs at least one pair and one bin, not {len(pairs)} and {bins}")
    groups: dict[int, list[tuple[float, float]]] = {}
    for pair in pairs:
        sure = _sigmoid(abs(pair.chosen - pair.rejected))
        groups.setdefault(min(int(2 * bins * (sure - 0.5)), bins - 1), []).append((sure, pairwise_score(pair)))
    filled = []
    for _, group in sorted(groups.items()):
        confidences, scores = zip(*group, strict=True)
        filled.append(Bin(len(group), _mean(confidences), _mean(scores)))
    return Calibration(
        probability=_mean([_sigmoid(pair.chosen - pair.rejected) for pair in pairs]),
        confidence=_mean([sure for group in groups.values() for sure, _ in group]),
        expected_error=math.fsum(part.n * abs(part.accuracy - part.confidence) for part in filled) / len(pairs),
        bins=tuple(filled),
    )


def pairwise_score(pair: ScoredPair) -> float:
    """1 when the chosen answer has the larger reward, 0 when the smaller, 0.5 when they are equal."""
    return _preference(pair.chosen, pair.rejected)


def length_bias(pairs: Sequence[ScoredPair]) -> LengthBias:
    """What `LengthBias` says of these pairs, each taken as a prompt with two answers.

    Raises:
        ValueError: without any pair.
    """
    if not pairs:
        raise ValueError("no pairs, so there is no length bias to measure: give at least one")
    spearman, spearman_n = spearman_within(
        [((pair.chosen, pair.rejected), (pair.chosen_length, pair.rejected_length)) for pair in pairs]
    )
    return LengthBias(
        chosen_longer_share=_mean([float(pair.chosen_length > pair.rejected_length) for pair in pairs]),
        # With two answers the rank correlation is 1 or -1.
        preferred_longer_share=None if spearman is None else (spearman + 1) / 2,
        longer=_stratum(pairs, lambda pair: not _similar(pair) and pair.chosen_length > pair.rejected_length),
        shorter=_stratum(pairs, lambda pair: not _similar(pair) and pair.chosen_length < pair.rejected_length),
        similar=_stratum(pairs, _similar),
        longest_baseline=_mean([_preference(pair.chosen_length, pair.rejected_length) for pair in pairs]),
        spearman=spearman,
        spearman_n=spearman_n,
    )


def spearman_within(
    prompts: Sequence[tuple[Sequence[float], Sequence[int]]],
) -> tuple[float | None, int]:
    """Mean over prompts of Spearman's correlation between its answers' rewards and lengths.

    Within a prompt, not across: some prompts ask for longer answers than others. Prompts whose rewards or
    whose lengths are all equal have no correlation and are left out.

    Args:
        prompts: for each the rewards and the lengths of its answers.

    Returns:
        The mean, None when no prompt is left, and the number of prompts in it.
    """
    values = []
    for index, (rewards, lengths) in enumerate(prompts):
        if len(rewards) != len(lengths):
            raise ValueError(f"prompt {index} has {len(rewards)} rewards and {len(lengths)} lengths: give one for each")
        if len(set(rewards)) > 1 and len(set(lengths)) > 1:
            values.append(_spearman(rewards, lengths))
    return (_mean(values) if values else None), len(values)


def _spearman(rewards: Sequence[float], lengths: Sequence[int]) -> float:
    if len(rewards) == 2:  # not worth a call: sets of pairs hold a hundred thousand of them
        return 1.0 if (rewards[0] > rewards[1]) == (lengths[0] > lengths[1]) else -1.0
    return float(_scipy_stats().spearmanr(rewards, lengths).statistic)


def _similar(pair: ScoredPair) -> bool:
    shorter, longer = sorted((pair.chosen_length, pair.rejected_length))
    return 10 * (longer - shorter) <= longer  # in whole numbers: 0.1 * longer would round


def _stratum(pairs: Sequence[ScoredPair], belongs: Callable[[ScoredPair], bool]) -> Stratum:
    scores = [pairwise_score(pair) for pair in pairs if belongs(pair)]
    return Stratum(len(scores), _mean(scores) if scores else None)


def _groups(pairs: Sequence[ScoredPair]) -> list[str]:
    return list(dict.fromkeys(pair.group for pair in pairs))


def _sigmoid(value: float) -> float:
    # exp of a large number would overflow.
    return 1 / (1 + math.exp(-value)) if value >= 0 else 1 - 1 / (1 + math.exp(value))


def _preference(chosen: float, rejected: float) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _scipy_stats() -> ModuleType:
    try:
        import scipy.stats
    except ImportError:
        raise ModuleNotFoundError("rank correlation needs scipy: pip install 'umedtrain[eval]'") from None
    return scipy.stats
