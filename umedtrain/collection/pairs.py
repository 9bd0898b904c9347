"""Preference pairs out of sampled answers: by a checker that knows the right answer, or by a reward model.

Rows have the layout of the released UltraMedical-Preference: prompt_id, label_type, prompt, chosen, rejected, metadata.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from umedtrain.evaluation.extraction import extract, right_answer
from umedtrain.evaluation.questions import Question, format_question
from umedtrain.records import Messages, Prompt

Row = Mapping[str, Any]
"""A rollout's row: {"answers": [{"text", "finish_reason"}]}."""


def checked_pairs(
    questions: Sequence[Question],
    rows: Sequence[Row],
    *,
    reference: str | None = None,
    most: int = 0,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Pairs of a right and a wrong answer to the same question; questions without both kinds give none.

    Args:
        questions: with their right answers.
        rows: sampled answers. Unreadable ones are wrong; answers cut at the token limit are left out.
        reference: text of an answer with the place `{answer}` for the right one, which joins the right answers (as
            the paper's online step ranks reference answers among the samples); None for samples only.
        most: pairs per question at most, drawn at random; 0 for all.
        seed: of the draw.
    """
    for question, row in zip(questions, rows, strict=True):
        right, wrong = _split(question, row)
        if reference is not None:
            right.setdefault(reference.format(answer=question.answer), None)
        pairs = list(product(right, wrong))
        if most and len(pairs) > most:
            pairs = random.Random(f"{seed} {question.id}").sample(pairs, most)
        for chosen, rejected in pairs:
            messages = ({"role": "user", "content": format_question(question)},)
            yield _row(question.id, messages, chosen, rejected, "checked", {"golden_answer": question.answer})


def ranked_pairs(
    prompts: Sequence[Prompt], rows: Sequence[Row], rewards: Sequence[Sequence[float]], *, margin: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Pairs of the answer with the largest and the one with the smallest reward.

    Args:
        prompts: what was asked; reference answers, if there are any, are not looked at.
        rows: sampled answers; those cut at the token limit are left out.
        rewards: one per sampled answer.
        margin: a prompt whose rewards differ by no more than this gives no pair.
    """
    for prompt, row, values in zip(prompts, rows, rewards, strict=True):
        ranked = [
            (reward, answer["text"])
            for reward, answer in zip(values, row["answers"], strict=True)
            if answer["finish_reason"] == "stop"
        ]
        if not ranked:
            continue
        (best, chosen), (worst, rejected) = max(ranked), min(ranked)
        if best - worst > margin and chosen != rejected:
            metadata = {"chosen": {"score": best}, "rejected": {"score": worst}}
            yield _row(prompt.id, prompt.messages, chosen, rejected, "ranked", metadata)


def _split(question: Question, row: Row) -> tuple[dict[str, None], dict[str, None]]:
    """Different right and wrong answers, in the order of the samples."""
    right: dict[str, None] = {}
    wrong: dict[str, None] = {}
    for answer in row["answers"]:
        if answer["finish_reason"] == "stop" and answer["text"]:
            is_right = extract(question, answer["text"]) == right_answer(question)
            (right if is_right else wrong)[answer["text"]] = None
    return right, wrong


def _row(
    prompt_id: str | None,
    messages: Messages,
    chosen: str,
    rejected: str,
    label_type: str,
    metadata: dict[str, Any],
) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "label_type": label_type,
        "prompt": messages[-1]["content"],
        "chosen": [*messages, {"role": "assistant", "content": chosen}],
        "rejected": [*messages, {"role": "assistant", "content": rejected}],
        "metadata": metadata,
    }
