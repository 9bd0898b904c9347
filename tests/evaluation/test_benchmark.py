"""Scores of a model on questions, against a table counted by hand."""

import json

import pytest

from umedtrain.evaluation.benchmark import METHODS, score_benchmark
from umedtrain.evaluation.questions import Question
from umedtrain.evaluation.statistics import mean_interval


def choice(identity: str, answer: str, options: int = 4) -> Question:
    return Question(identity, "Which?", tuple(f"item {number}" for number in range(options)), answer, "", "made")


def answers(*letters: str, cut: tuple[int, ...] = ()) -> dict:
    """Completions that choose these letters; "-" cannot be read. Those at the indices `cut` hit the limit."""
    texts = ["No idea at all." if letter == "-" else f"So, the answer is {letter}." for letter in letters]
    return {
        "answers": [
            {"text": text, "finish_reason": "length" if index in cut else "stop"} for index, text in enumerate(texts)
        ]
    }


QUESTIONS = [choice("1", "A"), choice("2", "B"), choice("3", "A", options=5), choice("4", "C", options=2 + 1)]
GREEDY = [answers("A"), answers("C"), answers("-"), answers("C")]
SAMPLES = [
    answers("A", "B", "A", "D"),
    answers("C", "C", "B", "C"),
    answers("-", "-", "-", "A"),
    answers("A", "A", "B", "-", cut=(3,)),
]
REWARDS = [
    [0.0, 5.0, 1.0, 0.5],  # best: B, wrong
    [1.0, 0.5, 2.0, 0.0],  # best: B, right
    [1.0, 0.0, 3.0, 2.0],  # best: unreadable
    [2.0, 1.0, 0.0, 3.0],  # best: unreadable
]


def test_by_hand():
    found = score_benchmark(QUESTIONS, GREEDY, SAMPLES, REWARDS)
    assert found.scores == {
        "greedy": (1.0, 0.0, 0.0, 1.0),
        "mean": (0.5, 0.25, 0.25, 0.0),
        "majority": (1.0, 0.0, 1.0, 0.0),
        # exp(reward): 1 + e < e^5; e + e^0.5 + 1 = 5.4 < e^2 = 7.4; A alone can be read; A of two wrong ones.
        "weighted": (0.0, 1.0, 1.0, 0.0),
        "best_of_n": (0.0, 1.0, 0.0, 0.0),
        "oracle": (1.0, 1.0, 1.0, 0.0),
    }
    assert found.unparsed == {"greedy": 1 / 4, "samples": 4 / 16}
    assert found.truncated == {"greedy": 0.0, "samples": 1 / 16}
    assert found.chance == pytest.approx((1 / 4 + 1 / 4 + 1 / 5 + 1 / 3) / 4)
    assert found.majority_class == 2 / 4
    assert found.samples == 4
    # Question 1: A 0 and 1 against B 5 and D 0.5, one of four pairs. Question 2: B against C 1, 0.5, 0, three of
    # three. Question 3: A 2 against three unreadable 1, 0, 3, two of three. Question 4 has no right sample.
    assert found.reward_accuracy == pytest.approx((1 / 4, 1.0, 2 / 3))


def test_as_dict():
    found = score_benchmark(QUESTIONS, GREEDY, SAMPLES, REWARDS)
    table = found.as_dict()
    assert json.loads(json.dumps(table)) == table
    assert table["questions"] == 4
    assert list(table["accuracy"]) == list(METHODS)
    assert table["accuracy"]["mean"] == mean_interval((0.5, 0.25, 0.25, 0.0)).as_dict()
    assert table["accuracy"]["greedy"]["value"] == 0.5
    assert table["accuracy"]["greedy"]["low"] < 0.5 < table["accuracy"]["greedy"]["high"]
    assert table["reward_accuracy"]["value"] == pytest.approx((1 / 4 + 1.0 + 2 / 3) / 3)
    assert table["scores"]["oracle"] == [1.0, 1.0, 1.0, 0.0]


def test_greedy_alone():
    found = score_benchmark(QUESTIONS, GREEDY)
    assert found.scores == {"greedy": (1.0, 0.0, 0.0, 1.0)}
    assert found.unparsed == {"greedy": 1 / 4}
    assert found.truncated == {"greedy": 0.0}
    assert found.samples == 0
    assert found.reward_accuracy is None
    assert found.as_dict()["reward_accuracy"] is None


def test_samples_without_rewards():
    found = score_benchmark(QUESTIONS, GREEDY, SAMPLES)
    assert list(found.scores) == ["greedy", "mean", "majority", "oracle"]
    assert found.scores["majority"] == (1.0, 0.0, 1.0, 0.0)
    assert found.reward_accuracy is None


def test_open_questions():
    def ask(identity, answer):
        return Question(identity, "What causes it?", (), answer, "", "made")

    def say(*texts):
        return {"answers": [{"text": text, "finish_reason": "stop"} for text in texts]}

    questions = [ask("1", "Measles virus"), ask("2", "Scurvy"), ask("3", "measles  virus."), ask("4", "Rabies")]
    greedy = [
        say("So, the answer is the measles virus."),
        say("Scurvy"),  # states no answer
        say("The answer is mumps."),
        say("The answer is RABIES."),
    ]
    found = score_benchmark(questions, greedy)
    assert found.scores["greedy"] == (1.0, 0.0, 0.0, 1.0)
    assert found.unparsed["greedy"] == 1 / 4
    # Three different right answers; one of them answers two of the four questions.
    assert found.chance == pytest.approx(1 / 3)
    assert found.majority_class == 2 / 4


def test_an_answer_that_may_have_been_cut_is_not_read():
    cut = {"answers": [{"text": "So, the answer is A", "finish_reason": "length"}]}
    whole = {"answers": [{"text": "So, the answer is A", "finish_reason": "stop"}]}
    found = score_benchmark([choice("1", "A"), choice("2", "A")], [cut, whole])
    assert found.scores["greedy"] == (0.0, 1.0)
    assert found.unparsed["greedy"] == found.truncated["greedy"] == 1 / 2


def test_reward_ties_count_half_and_equal_samples_once():
    questions = [choice("1", "A")] * 2
    samples = [answers("A", "A", "B", "B"), answers("A", "B", "B", "C")]
    # First: A 1 against B 1 (a tie), four times the same. Second: A 1 against B 0 twice the same, and C 2.
    found = score_benchmark(questions, [answers("A")] * 2, samples, [[1.0] * 4, [1.0, 0.0, 0.0, 2.0]])
    assert found.reward_accuracy == (0.5, 0.5)


def test_a_tied_vote_is_repeatable():
    questions = [choice(str(index), "A") for index in range(40)]
    samples = [answers("A", "B")] * 40
    first, again = (score_benchmark(questions, [answers("A")] * 40, samples, seed=3) for _ in range(2))
    assert first == again
    assert 8 <= sum(first.scores["majority"]) <= 32
    assert first != score_benchmark(questions, [answers("A")] * 40, samples, seed=4)


def test_bad_input():
    with pytest.raises(ValueError, match="shorter"):
        score_benchmark(QUESTIONS, GREEDY[:3])
    with pytest.raises(ValueError, match="equally many samples"):
        score_benchmark(QUESTIONS, GREEDY, [*SAMPLES[:3], answers("A")])
    with pytest.raises(ValueError, match="4 answers with 3 rewards"):
        score_benchmark(QUESTIONS, GREEDY, SAMPLES, [*REWARDS[:3], [1.0, 2.0, 3.0]])
