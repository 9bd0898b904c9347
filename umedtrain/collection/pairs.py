"""Preference pairs out of sampled answers: by a checker that knows the right answer, or by a reward model.

Rows have the layout of the released UltraMedical-Preference: prompt_id, label_type, prompt, chosen, rejected, metadata.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal

from umedtrain.data.example import Dropped, Drops
from umedtrain.evaluation.extraction import extract, right_answer
from umedtrain.evaluation.questions import Question, format_question
from umedtrain.records import Messages, Prompt

TIE = "tie: no answer is better than another"
NOTHING_TO_CHOOSE = "fewer than two different finished answers"

Row = Mapping[str, Any]
"""A rollout's row: {"answers": [{"text", "tokens", "finish_reason"}]}. Answers that are not the policy's own also have
an `annotator`."""


def add_answers(
    row: Row, texts: Sequence[str], annotator: str, encode: Callable[[str], Sequence[int]]
) -> dict[str, Any]:
    """The row with the answers of another annotator; `encode` gives their token ids, terminator included.

    The paper's pool holds models of different skill, and they matter: a pool of the policy's own samples has pairs only
    for questions on which the policy errs, and there its favourite answer is nearly always the rejected one. What is
    learned from such pairs is to distrust the favourite.
    """
    known = {answer["text"] for answer in row["answers"]}
    others = [
        {"text": text, "tokens": list(encode(text)), "finish_reason": "stop", "annotator": annotator}
        for text in dict.fromkeys(texts)
        if text not in known
    ]
    return {**row, "answers": [*row["answers"], *others]}


def checked_pairs(
    questions: Sequence[Question], rows: Sequence[Row], *, most: int = 0, seed: int
) -> Iterator[dict[str, Any]]:
    """Pairs of a right and a wrong answer to the same question; questions without both kinds give none.

    Args:
        questions: with their right answers.
        rows: answers. Unreadable ones are wrong; those cut at the token limit are left out; equal ones count once.
        most: pairs per question at most, drawn at random; 0 for all.
        seed: of the draw.
    """
    for question, row in zip(questions, rows, strict=True):
        complete = dict.fromkeys(
            answer["text"] for answer in row["answers"] if answer["finish_reason"] == "stop" and answer["text"]
        )
        right = [text for text in complete if extract(question, text) == right_answer(question)]
        wrong = [text for text in complete if text not in right]
        pairs = list(product(right, wrong))
        if most and len(pairs) > most:
            pairs = random.Random(f"{seed} {question.id}").sample(pairs, most)
        messages = ({"role": "user", "content": format_question(question)},)
        for chosen, rejected in pairs:
            yield _row(question.id, messages, chosen, rejected, "checked", {"golden_answer": question.answer})


def ranked_pairs(
    prompts: Sequence[Prompt],
    rows: Sequence[Row],
    rewards: Sequence[Sequence[float]],
    *,
    seed: int,
    choose: Literal["max_random", "max_min"] = "max_random",
    length_penalty: float = 0.0,
    repeats: bool = True,
    skipped: Drops | None = None,
) -> Iterator[dict[str, Any]]:
    """Pairs of the policy's own answer with the largest score and another answer with a smaller one.

    With `repeats` an answer's score is log(sum of exp(reward) over the samples that are equal to it): its reward, and
    the logarithm of how often it was drawn. The policy that maximises reward under a KL penalty of weight 1 is
    proportional to pi(y) exp(reward(y)) (Rafailov et al. 2023, arXiv 2305.18290, eq. 4), and that is what exp(score)
    estimates. Where no two answers are equal, score and reward are the same.

    Args:
        prompts: what was asked; reference answers, if there are any, are not looked at.
        rows: answers; those cut at the token limit are left out.
        rewards: one per answer.
        seed: of the draws.
        choose: whether the other answer is drawn at random or is the one with the smallest score. Among answers that
            share the largest or the smallest score one is drawn.
        length_penalty: is taken off the reward for every hundred tokens of the answer.
        repeats: count how often an answer was drawn. Without, its score is its reward.
        skipped: collects the prompts that give no pair, with the reason.
    """
    for prompt, row, values in zip(prompts, rows, rewards, strict=True):
        same: dict[str, list[float]] = {}
        own = set()
        for reward, answer in zip(values, row["answers"], strict=True):
            if answer["finish_reason"] == "stop" and answer["text"].strip():
                score = reward - length_penalty * len(answer["tokens"]) / 100
                same.setdefault(answer["text"], []).append(score)
                if "annotator" not in answer:
                    own.add(answer["text"])
        scores = {text: _log_sum_exp(equal) if repeats else max(equal) for text, equal in same.items()}
        best = max((scores[text] for text in own), default=-math.inf)
        others = sorted((score, text) for text, score in scores.items() if score < best)
        if not others:
            if skipped is not None:
                reason = TIE if own and len(same) > 1 else NOTHING_TO_CHOOSE
                skipped.add(Dropped(reason, prompt.source, prompt.line))
            continue
        if choose == "max_min":
            others = [(score, text) for score, text in others if score == others[0][0]]
        key = f"{seed} {prompt.messages if prompt.id is None else prompt.id}"
        worse, rejected = random.Random(key).choice(others)
        chosen = random.Random(f"{key} best").choice(sorted(text for text in own if scores[text] == best))
        metadata = {"chosen": {"score": best}, "rejected": {"score": worse}}
        yield _row(prompt.id, prompt.messages, chosen, rejected, "ranked", metadata)


def checked_rewards(questions: Sequence[Question], rows: Sequence[Row]) -> list[list[float]]:
    """For each answer 1 if its final answer is the question's, 0 if it is another or unreadable."""
    rewards = []
    for question, row in zip(questions, rows, strict=True):
        answers = [(answer["text"], answer["finish_reason"] == "length") for answer in row["answers"]]
        given = [extract(question, text, truncated=cut) for text, cut in answers]
        rewards.append([float(answer == right_answer(question)) for answer in given])
    return rewards


def _log_sum_exp(values: Sequence[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


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
