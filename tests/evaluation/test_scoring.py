"""Rewards of answers: whatever is computed together, each is that of one forward pass."""

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from umedtrain.evaluation.scoring import cached_rewards, score_answers, score_rows
from umedtrain.model.config import LlamaConfig
from umedtrain.model.heads import RewardModel
from umedtrain.model.layout import Layout

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [1, 2, 3], [90]]
ANSWERS = [
    [[10, 11], [12], [10, 11], [13, 14, 15, 16, 17]],
    [[20, 21, 22, 23, 24, 25, 26]],
    [[10, 11], [12], [12], [12]],
    [[30], [31, 32], [33, 34, 35]],
]
LONGEST = 12  # prompt 0 and its last answer


@pytest.fixture
def model(tiny_config) -> RewardModel:
    model = RewardModel(tiny_config)
    model.init_weights(seed=0)
    with torch.no_grad():
        model.score.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def calls(model) -> list[tuple[int, int]]:
    """(tokens, segments) of each forward pass."""
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), inputs[1].num_segments)))
    return seen


@torch.no_grad()
def one_by_one(model: RewardModel) -> list[list[float]]:
    def reward(ids):
        return float(model(torch.tensor(ids), Layout.packed([len(ids)]))[0])

    return [[reward(prompt + answer) for answer in group] for prompt, group in zip(PROMPTS, ANSWERS, strict=True)]


@pytest.mark.parametrize("max_tokens", [LONGEST, 13, 14, 17, 20, 25, 1000])
def test_equals_one_forward_pass_per_answer(model, max_tokens):
    wanted = one_by_one(model)
    assert len({round(reward, 3) for group in wanted for reward in group}) == 9, "rewards must differ for a test"
    found = score_answers(model, PROMPTS, ANSWERS, max_tokens=max_tokens)
    assert [len(group) for group in found] == [4, 1, 4, 3]
    for found_group, wanted_group in zip(found, wanted, strict=True):
        assert found_group == pytest.approx(wanted_group, abs=1e-5)


def test_equal_answers_and_prompts_are_computed_once(model, calls):
    score_answers(model, PROMPTS, ANSWERS)
    # Tokens: prompt 7 + 2 + 1 + 5, 2 + 7, 3 + 2 + 1, 1 + 1 + 2 + 3. Segments: 4, 2, 3, 4.
    assert calls == [(15 + 9 + 6 + 7, 13)]


@pytest.mark.parametrize("max_tokens", [LONGEST, 15, 20])
def test_budget_is_kept(model, calls, max_tokens):
    score_answers(model, PROMPTS, ANSWERS, max_tokens=max_tokens)
    assert len(calls) > 1
    assert max(tokens for tokens, _ in calls) <= max_tokens


def test_answers_split_over_passes_repeat_their_prompt(model, calls):
    score_answers(model, PROMPTS[:1], ANSWERS[:1], max_tokens=LONGEST)
    # 7 + 2 + 1 fit together, the answer of five tokens has a pass and the prompt for itself.
    assert calls == [(10, 3), (12, 2)]


def test_equal_answers_get_equal_rewards(model):
    first = score_answers(model, PROMPTS, ANSWERS)
    assert first[0][0] == first[0][2]
    assert len(set(first[2][1:])) == 1


def test_nothing_to_score(model, calls):
    assert score_answers(model, [], []) == []
    assert score_answers(model, [[1, 2]], [[]]) == [[]]
    assert calls == []


def test_errors_name_the_prompt(model):
    with pytest.raises(ValueError, match="prompt 1: prompt and answer must hold at least one token"):
        score_answers(model, [[1], []], [[[2]], [[3]]])
    with pytest.raises(ValueError, match="prompt 0: prompt and answer must hold at least one token"):
        score_answers(model, [[1]], [[[2], []]])
    with pytest.raises(ValueError, match="prompt 0: prompt and answer hold 12 tokens, over max_tokens = 11"):
        score_answers(model, PROMPTS, ANSWERS, max_tokens=LONGEST - 1)
    with pytest.raises(ValueError, match="argument 2 is"):
        score_answers(model, PROMPTS, ANSWERS[:2])


CONFIG = LlamaConfig(101, 32, 64, 2, 4, 2, 8)
MANY = [[1, 2, 3 + index] for index in range(9)]
THEIRS = [[[10 + index, 20 + answer] for answer in range(1 + index % 3)] for index in range(9)]


def model_of(seed):
    model = RewardModel(CONFIG)
    model.init_weights(seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5
    return model


def keep(world, folder, **changes):
    """Rewards, and how many tokens this rank computed."""
    model, tokens = model_of(1), []
    model.register_forward_pre_hook(lambda _, inputs: tokens.append(len(inputs[0])))
    arguments = {"prompts": MANY, "answers": THEIRS, "weights": "one", "block": 2} | changes
    return cached_rewards(model, folder=Path(folder), world=world, progress=False, **arguments), sum(tokens)


def keep_on_two_ranks(world, folder, other):
    """What `keep` gives, that of `score_rows`, and what is said of another run's folder."""
    with pytest.raises(ValueError) as refused:
        keep(world, other, weights="two")
    rows = [{"answers": [{"tokens": ids} for ids in group]} for group in THEIRS]
    return keep(world, folder), score_rows(model_of(1), MANY, rows, world), str(refused.value)


def stored(folder):
    return sorted(line for part in Path(folder).glob("part-*") for line in part.read_bytes().splitlines())


def test_kept_rewards_are_the_same_on_any_number_of_ranks(world, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    whole, tokens = keep(world, one)
    assert len({reward for group in whole for reward in group}) == sum(map(len, THEIRS))
    for found, wanted in zip(whole, score_answers(model_of(1), MANY, THEIRS), strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    shares = []
    for (rewards, share), rows, refused in run_ranks(2, keep_on_two_ranks, two, one):
        assert rewards == whole
        assert [reward for group in rows for reward in group] == pytest.approx(
            [reward for group in whole for reward in group], abs=1e-5
        )
        assert refused == f"{one} holds a reward cache with other weights; choose another folder or remove it"
        shares.append(share)
    assert sum(shares) == tokens
    assert min(shares) > 0.3 * tokens
    assert stored(two) == stored(one)


def test_interrupted_rewards_are_completed_to_the_last_bit(world, tmp_path):
    whole, tokens = keep(world, tmp_path)
    part = tmp_path / "part-00000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    # The second row of the second block is torn: the block is computed again, its first row kept.
    part.write_bytes(b"".join(lines[:4])[:-5])
    again, fewer = keep(world, tmp_path)
    assert again == whole
    assert 0 < fewer < tokens
    assert part.read_bytes() == b"".join(lines)
    assert keep(world, tmp_path) == (whole, 0)


@pytest.mark.parametrize("change", [{"weights": "two"}, {"answers": [[[1]]] * 9}, {"block": 3}, {"max_tokens": 99}])
def test_rewards_of_something_else_are_refused(world, tmp_path, change):
    keep(world, tmp_path)
    with pytest.raises(ValueError, match=f"holds a reward cache with other {next(iter(change))};"):
        keep(world, tmp_path, **change)


def test_a_reward_that_is_not_finite_is_an_error(world, tmp_path):
    model = model_of(1)
    model.score.weight.data *= float("nan")
    with pytest.raises(FloatingPointError, match=r"prompt 0: a reward is not finite: \[nan\]"):
        cached_rewards(model, MANY, THEIRS, tmp_path, world, weights="one", progress=False)
    assert not stored(tmp_path)
