"""Preference pairs from answers, by hand."""

import math

import pytest

from umedtrain.collection.pairs import (
    NOTHING_TO_CHOOSE,
    TIE,
    add_answers,
    checked_pairs,
    checked_rewards,
    ranked_pairs,
)
from umedtrain.data.example import Drops
from umedtrain.evaluation.questions import Question, format_question
from umedtrain.records import Prompt, read_preferences, write_jsonl

VIRUS = Question("q1", "Which is a virus?", ("Cholera", "Measles", "Typhoid"), "B", "", "made")
OPEN = Question("q2", "What causes scurvy?", (), "Vitamin C deficiency", "", "made")
A, B, C = (f"So, the answer is {letter}." for letter in "ABC")
LONG_B = "Measles is one.\n\nSo, the answer is B."
UNREADABLE = "I cannot tell."


def row(*texts: str, cut: tuple[str, ...] = (), annotator: str | None = None) -> dict:
    extra = {} if annotator is None else {"annotator": annotator}
    return {
        "answers": [
            {"text": text, "tokens": [1], "finish_reason": "length" if text in cut else "stop", **extra}
            for text in texts
        ]
    }


def texts_of(pairs) -> list[tuple[str, str]]:
    return [(pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]) for pair in pairs]


def prompt(text: str, identity: str = "p1") -> Prompt:
    return Prompt(({"role": "user", "content": text},), id=identity)


def test_add_answers():
    own = row(A, B)
    found = add_answers(own, [B, C, C, UNREADABLE], "careful", lambda text: [len(text), 9])
    assert own == row(A, B), "the row given is left as it is"
    assert found["answers"][:2] == own["answers"]
    assert found["answers"][2:] == [
        {"text": C, "tokens": [len(C), 9], "finish_reason": "stop", "annotator": "careful"},
        {"text": UNREADABLE, "tokens": [len(UNREADABLE), 9], "finish_reason": "stop", "annotator": "careful"},
    ]
    assert add_answers({**own, "index": 7}, [], "careful", list)["index"] == 7


def test_checked_pairs_are_every_right_with_every_wrong_answer():
    answers = row(A, B, A, LONG_B, UNREADABLE, B)
    found = list(checked_pairs([VIRUS], [answers], seed=0))
    assert texts_of(found) == [(B, A), (B, UNREADABLE), (LONG_B, A), (LONG_B, UNREADABLE)]
    assert found[0] == {
        "prompt_id": "q1",
        "label_type": "checked",
        "prompt": format_question(VIRUS),
        "chosen": [{"role": "user", "content": format_question(VIRUS)}, {"role": "assistant", "content": B}],
        "rejected": [{"role": "user", "content": format_question(VIRUS)}, {"role": "assistant", "content": A}],
        "metadata": {"golden_answer": "B"},
    }


def test_checked_pairs_of_an_open_question_compare_normalised_texts():
    right, wrong = "So, the answer is vitamin c  deficiency.", "So, the answer is vitamin D deficiency."
    found = checked_pairs([OPEN], [row(wrong, right)], seed=0)
    assert texts_of(found) == [(right, wrong)]


def test_checked_pairs_leave_out_what_was_cut_or_is_empty():
    assert texts_of(checked_pairs([VIRUS], [row(A, B, C, "", cut=(A,))], seed=0)) == [(B, C)]
    assert not list(checked_pairs([VIRUS], [row(A, B, cut=(B,))], seed=0))


@pytest.mark.parametrize("texts", [(B, LONG_B), (A, C, UNREADABLE), ()])
def test_checked_pairs_need_both_kinds(texts):
    assert not list(checked_pairs([VIRUS], [row(*texts)], seed=0))


def test_checked_pairs_at_most():
    questions = [VIRUS, Question("q3", "Which?", ("x", "y", "z"), "B", "", "made")]
    rows = [row(*(f"{i}. {text}" for i in range(4) for text in (A, B, C)))] * 2
    everything = [texts_of(checked_pairs([q], [r], seed=0)) for q, r in zip(questions, rows, strict=True)]
    assert [len(pairs) for pairs in everything] == [32, 32]

    def drawn(seed, questions=questions, rows=rows):
        return [(pair["prompt_id"], *texts_of([pair])[0]) for pair in checked_pairs(questions, rows, most=3, seed=seed)]

    found = drawn(5)
    assert [identity for identity, _, _ in found] == ["q1"] * 3 + ["q3"] * 3
    assert len(set(found)) == 6
    assert [pair[1:] for pair in found[:3]] != [pair[1:] for pair in found[3:]], "each question has its own draw"
    assert {pair[1:] for pair in found[:3]} <= set(everything[0])
    assert found == drawn(5)
    assert found != drawn(6)
    assert found[3:] == drawn(5, questions[1:], rows[1:]), "a question's draw does not depend on the others"
    assert len(list(checked_pairs(questions, rows, most=32, seed=5))) == 64


def test_ranked_pairs_by_hand():
    found = list(ranked_pairs([prompt("Why?")], [row(A, B)], [[0.5, 2.0]], seed=0))
    assert found == [
        {
            "prompt_id": "p1",
            "label_type": "ranked",
            "prompt": "Why?",
            "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": B}],
            "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": A}],
            "metadata": {"chosen": {"score": 2.0}, "rejected": {"score": 0.5}},
        }
    ]


def test_ranked_pairs_choose_the_policys_own_best():
    """The annotator's best answer is not chosen, and being better than the policy's best, not rejected either."""
    own = row(A, B)
    others = row(C, LONG_B, annotator="careful")
    both = {"answers": own["answers"] + others["answers"]}
    pairs = {
        texts_of(ranked_pairs([prompt("Why?")], [both], [[1.0, 0.5, 3.0, 0.0]], seed=seed))[0] for seed in range(20)
    }
    assert pairs == {(A, B), (A, LONG_B)}
    assert not list(ranked_pairs([prompt("Why?")], [others], [[1.0, 2.0]], seed=0)), "no answer of its own"


def test_ranked_pairs_leave_out_what_was_cut_ties_and_duplicates():
    assert not list(ranked_pairs([prompt("Why?")], [row(A, B, cut=(A,))], [[1.0, 0.0]], seed=0))
    assert texts_of(ranked_pairs([prompt("Why?")], [row(A, B, C, cut=(A,))], [[9.0, 1.0, 0.0]], seed=0)) == [(B, C)]
    assert not list(ranked_pairs([prompt("Why?")], [row(A, B)], [[1.0, 1.0]], seed=0)), "a tie prefers nothing"
    assert not list(ranked_pairs([prompt("Why?")], [row(A, A)], [[1.0, 1.0]], seed=0))
    assert not list(ranked_pairs([prompt("Why?")], [row(A, "")], [[1.0, 0.0]], seed=0))


def test_ranked_pairs_choose_what_is_good_and_often_drawn():
    """The scores are log 3 + 1, 2 and 0."""
    (pair,) = ranked_pairs([prompt("Why?")], [row(A, B, A, A)], [[1.0, 2.0, 1.0, 1.0]], seed=0)
    assert texts_of([pair]) == [(A, B)]
    assert pair["metadata"]["chosen"]["score"] == pytest.approx(math.log(3) + 1)
    assert texts_of(ranked_pairs([prompt("Why?")], [row(A, B, A)], [[1.0, 2.0, 1.0]], seed=0)) == [(B, A)]


def test_ranked_pairs_draw_a_repeated_answer_no_more_often():
    repeated = row(A, *[B] * 30, C)
    rewards = [[2.0, *[-5.0] * 30, 0.0]]
    rejected = [texts_of(ranked_pairs([prompt("Why?")], [repeated], rewards, seed=s))[0][1] for s in range(60)]
    assert 15 <= rejected.count(C) <= 45


def test_ranked_pairs_draw_depends_on_seed_and_prompt_only():
    prompts = [prompt(f"Why {i}?", f"p{i}") for i in range(12)]
    rows, rewards = [row(A, B, C)] * 12, [[2.0, 1.0, 0.0]] * 12

    def drawn(seed, chosen=slice(None)):
        return texts_of(ranked_pairs(prompts[chosen], rows[chosen], rewards[chosen], seed=seed))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1)[4:] == drawn(1, slice(4, None))
    assert len(set(drawn(1))) == 2


def drawn_pairs(answers: dict, rewards: list[float], seeds=range(40), **options) -> set[tuple[str, str]]:
    return {texts_of(ranked_pairs([prompt("Why?")], [answers], [rewards], seed=s, **options))[0] for s in seeds}


def test_ranked_pairs_best_and_worst():
    answers = row(A, B, C, UNREADABLE)
    assert drawn_pairs(answers, [1.0, 3.0, 0.0, 2.0], choose="max_min") == {(B, C)}
    assert drawn_pairs(answers, [1.0, 3.0, 0.0, 2.0]) == {(B, A), (B, C), (B, UNREADABLE)}


def test_ranked_pairs_draw_among_equals():
    found = drawn_pairs(row(A, B, C, UNREADABLE), [1.0, 0.0, 1.0, 0.0], choose="max_min")
    assert found == {(A, B), (A, UNREADABLE), (C, B), (C, UNREADABLE)}


def test_ranked_pairs_without_counting_repeats():
    answers = row(A, B, A, A, A)
    assert drawn_pairs(answers, [1.0, 2.0, 1.0, 1.0, 1.0]) == {(A, B)}
    (pair,) = ranked_pairs([prompt("Why?")], [answers], [[1.0, 2.0, 1.0, 1.0, 1.0]], seed=0, repeats=False)
    assert texts_of([pair]) == [(B, A)]
    assert pair["metadata"] == {"chosen": {"score": 2.0}, "rejected": {"score": 1.0}}


def test_ranked_pairs_with_a_length_penalty():
    answers = row(A, B, C)
    for answer, tokens in zip(answers["answers"], (300, 50, 100), strict=True):
        answer["tokens"] = [1] * tokens
    assert drawn_pairs(answers, [3.0, 1.0, 2.0], choose="max_min") == {(A, B)}
    # 3 - 3 * 0.9, 1 - 0.5 * 0.9, 2 - 0.9
    (pair,) = ranked_pairs([prompt("Why?")], [answers], [[3.0, 1.0, 2.0]], seed=0, choose="max_min", length_penalty=0.9)
    assert texts_of([pair]) == [(C, A)]
    assert pair["metadata"]["chosen"]["score"] == pytest.approx(1.1)
    assert pair["metadata"]["rejected"]["score"] == pytest.approx(0.3)


def test_ranked_pairs_say_why_a_prompt_gives_none():
    skipped = Drops()
    rows = [row(A, B), row(A, B, cut=(A,)), row(A, A), row(A, B), row(A, " \n")]
    prompts = [Prompt(({"role": "user", "content": "Why?"},), source="p.jsonl", line=line) for line in range(1, 6)]
    rewards = [[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 0.0]]
    assert texts_of(ranked_pairs(prompts, rows, rewards, seed=0, skipped=skipped)) == [(B, A)]
    assert skipped.summary() == {
        NOTHING_TO_CHOOSE: {"count": 3, "first": ["p.jsonl:2", "p.jsonl:3", "p.jsonl:5"]},
        TIE: {"count": 1, "first": ["p.jsonl:1"]},
    }


def test_prompts_without_ids_have_draws_of_their_own():
    prompts = [Prompt(({"role": "user", "content": f"Why {i}?"},)) for i in range(12)]
    pairs = texts_of(ranked_pairs(prompts, [row(A, B, C)] * 12, [[2.0, 1.0, 0.0]] * 12, seed=1))
    assert set(pairs) == {(A, B), (A, C)}


def test_checked_rewards():
    answers = row(A, B, LONG_B, UNREADABLE, "So, the answer is B", cut=("So, the answer is B",))
    assert checked_rewards([VIRUS], [answers]) == [[0.0, 1.0, 1.0, 0.0, 0.0]]
    right, wrong = "So, the answer is vitamin c  deficiency.", "So, the answer is vitamin D deficiency."
    assert checked_rewards([VIRUS, OPEN], [row(B), row(right, wrong)]) == [[1.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="shorter"):
        checked_rewards([VIRUS, OPEN], [row(A)])


def test_rows_are_readable(tmp_path):
    system = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})
    pairs = [
        *checked_pairs([VIRUS, OPEN], [row(A, B), row("The answer is scurvy.", UNREADABLE)], seed=0),
        *ranked_pairs([Prompt(system, id="p1"), prompt("How?", "p2")], [row(A, B)] * 2, [[1.0, 0.0]] * 2, seed=0),
    ]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    checked, first, second = read_preferences(tmp_path / "pairs.jsonl")
    assert (checked.id, checked.label_type, checked.chosen, checked.rejected) == ("q1", "checked", B, A)
    assert checked.prompt == ({"role": "user", "content": format_question(VIRUS)},)
    assert checked.metadata == {"golden_answer": "B"}
    assert (first.prompt, first.chosen, first.rejected) == (system, A, B)
    assert (second.id, second.label_type) == ("p2", "ranked")
    assert second.metadata == {"chosen": {"score": 1.0}, "rejected": {"score": 0.0}}


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="shorter"):
        list(checked_pairs([VIRUS, OPEN], [row(A, B)], seed=0))
    with pytest.raises(ValueError, match="longer"):
        list(ranked_pairs([prompt("Why?")], [row(A, B)], [[1.0]], seed=0))
