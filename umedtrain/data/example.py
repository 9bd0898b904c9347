"""Examples: what training sees of a record. Segments of token ids, and which of them are learned.

A conversation is one segment. A preference pair is three: the prompt, and the chosen and the rejected answer
with the prompt as parent, so that the prompt is computed once.

Shape suffixes: L tokens of a segment.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from umedtrain.records import Conversation, Messages, Preference
from umedtrain.text.chat import render_chat
from umedtrain.text.tokenizer import Tokenizer

Record = TypeVar("Record")


@dataclass(frozen=True, eq=False, slots=True)
class Segment:
    """A run of tokens.

    Attributes:
        tokens: int32 [L], L at least 1.
        loss_mask: bool [L], which tokens are to be learned.
        parent: index, in the example, of the earlier segment that this one continues; None for a root.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    parent: int | None = None

    @property
    def num_targets(self) -> int:
        """Tokens to be learned that have a predecessor; a root's first has none, a child's is in its parent."""
        return int(np.count_nonzero(self.loss_mask if self.parent is not None else self.loss_mask[1:]))


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """The segments of one record.

    Attributes:
        segments: parents before their children.
        source: file that the record stands in.
        line: of that file.
        full_tokens: tokens before the record was truncated; None if it was not.
        pairs: (better, worse) numbers of answers, the childless segments counted from 0.
        margins: by how much the better answer of each pair is better, None where the record does not say; () where
            nobody asked.
    """

    segments: tuple[Segment, ...]
    source: str = ""
    line: int = 0
    full_tokens: int | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    margins: tuple[float | None, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def num_targets(self) -> int:
        """Targets of all segments; see `Segment.num_targets`."""
        return sum(segment.num_targets for segment in self.segments)


@dataclass(frozen=True)
class Dropped:
    """A sound record that training cannot use, and why."""

    reason: str
    source: str
    line: int


@dataclass
class Drops:
    """Every record that was dropped, or kept but truncated, with its reason and place."""

    rows: list[Dropped] = field(default_factory=list)

    def add(self, dropped: Dropped) -> None:
        """Count one more."""
        self.rows.append(dropped)

    def count(self) -> dict[str, int]:
        """How many records each reason has, the most frequent first."""
        return dict(Counter(row.reason for row in self.rows).most_common())

    def summary(self, *, first: int = 5) -> dict[str, dict[str, Any]]:
        """{reason: {"count": int, "first": the first few as "file:line"}}, for a run's records."""
        places: dict[str, list[str]] = {}
        for row in self.rows:
            places.setdefault(row.reason, []).append(f"{row.source}:{row.line}")
        return {reason: {"count": count, "first": places[reason][:first]} for reason, count in self.count().items()}


def encode_conversation(
    conversation: Conversation,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    too_long: Literal["drop", "truncate"] = "drop",
    train_on: Literal["assistant", "all"] = "assistant",
    template: str | None = None,
    trim: bool = True,
) -> Example | Dropped:
    """One root segment: the rendered conversation.

    Args:
        conversation: what to render.
        tokenizer: see `umedtrain.text.tokenizer`.
        max_tokens: longest example.
        too_long: drop a longer conversation, or cut its end. One whose targets are all cut is dropped.
        train_on: learn the assistant's words and the ends of its turns, or every token.
        template: chat template; None or "auto" for the tokenizer's own.
        trim: strip white space around messages.
    """
    _check_choice("too_long", too_long, ("drop", "truncate"))
    _check_choice("train_on", train_on, ("assistant", "all"))
    ids, mask = render_chat(list(conversation.messages), tokenizer, template=_template(template), trim=trim)
    source, line = conversation.source, conversation.line
    if len(ids) > max_tokens and too_long == "drop":
        return Dropped(f"longer than {max_tokens} tokens", source, line)
    segment = Segment(
        np.array(ids[:max_tokens], dtype=np.int32),
        np.array(mask[:max_tokens], dtype=bool) | (train_on == "all"),
    )
    truncated = len(ids) > max_tokens
    if segment.num_targets == 0:
        reason = f"nothing to learn in the first {max_tokens} tokens" if truncated else "nothing to learn"
        return Dropped(reason, source, line)
    return Example((segment,), source, line, full_tokens=len(ids) if truncated else None)


def encode_preference(
    preference: Preference,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    template: str | None = None,
    trim: bool = True,
    margins: bool = False,
) -> Example | Dropped:
    """Three segments: prompt, chosen answer, rejected answer; every token of the answers is learned.

    An answer ends with the token that ends its turn, so that a reward model reads it there. A pair that holds more
    than `max_tokens` tokens, the prompt counted once, is dropped whole: cutting an answer would change which is
    better, and cutting the prompt would change the question. So is a pair whose answers differ only in white space
    that `trim` takes away.

    Arguments as for `encode_conversation`, and `margins`: keep `score_margin` as the pair's margin.
    """
    prompt_ids, answers = encode_answers(
        preference.prompt, (preference.chosen, preference.rejected), tokenizer, template=template, trim=trim
    )
    if len(prompt_ids) + sum(map(len, answers)) > max_tokens:
        return Dropped(f"pair longer than {max_tokens} tokens", preference.source, preference.line)
    if answers[0] == answers[1]:
        return Dropped("chosen and rejected are the same tokens", preference.source, preference.line)
    segments = (
        _whole_segment(prompt_ids, learned=False, parent=None),
        *(_whole_segment(ids, learned=True, parent=0) for ids in answers),
    )
    return Example(
        segments,
        preference.source,
        preference.line,
        pairs=((0, 1),),
        margins=(score_margin(preference),) if margins else (),
    )


def score_margin(preference: Preference) -> float | None:
    """metadata.chosen.score - metadata.rejected.score, or None unless both are finite numbers."""
    scores = []
    for side in ("chosen", "rejected"):
        notes = preference.metadata.get(side)
        score = notes.get("score") if isinstance(notes, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            return None
        scores.append(float(score))
    return scores[0] - scores[1]


def encode_answers(
    prompt: Messages,
    answers: Sequence[str],
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    trim: bool = True,
) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt up to where an answer begins, and of each answer, which ends with the token that ends its turn.

    Arguments as for `encode_conversation`.
    """
    options = {"template": _template(template), "trim": trim}
    prompt_ids, _ = render_chat(list(prompt), tokenizer, add_generation_prompt=True, **options)
    encoded = []
    for text in answers:
        ids, mask = render_chat([*prompt, {"role": "assistant", "content": text}], tokenizer, **options)
        assert ids[: len(prompt_ids)] == prompt_ids, "a prompt's ids must not depend on its answer"
        # A template may put a line break after the turn's end, which the model never writes.
        encoded.append(ids[len(prompt_ids) : _last_learned(mask) + 1])
    return prompt_ids, encoded


def encode_all(
    records: Sequence[Record],
    encode: Callable[[Record], Example | Dropped],
    progress: str | None = None,
) -> tuple[list[Example], Drops]:
    """Encode records in order; returns the examples, and what was dropped or truncated.

    Args:
        records: as read from one file.
        encode: for instance `functools.partial(encode_conversation, tokenizer=tokenizer, max_tokens=2048)`.
        progress: title of a progress bar; None for none.

    Raises:
        ValueError: when no example is left, with the file's name and the reasons.
    """
    examples: list[Example] = []
    drops = Drops()
    for record in tqdm(records, desc=progress, unit="row", disable=progress is None, leave=False):
        result = encode(record)
        if isinstance(result, Dropped):
            drops.add(result)
            continue
        if result.full_tokens is not None:
            drops.add(Dropped(f"kept, truncated to {result.num_tokens} tokens", result.source, result.line))
        examples.append(result)
    if not examples:
        raise ValueError(_nothing_left(drops))
    return examples, drops


def _nothing_left(drops: Drops) -> str:
    files = ", ".join(sorted({row.source for row in drops.rows})) or "no file"
    reasons = ", ".join(f"{reason}: {count}" for reason, count in drops.count().items()) or "no records given"
    return f"{files}: no example is left to train on ({reasons}); raise data.max_tokens or mend the data"


def _last_learned(mask: Sequence[bool]) -> int:
    return len(mask) - 1 - list(reversed(mask)).index(True)


def _whole_segment(ids: Sequence[int], *, learned: bool, parent: int | None) -> Segment:
    tokens = np.array(ids, dtype=np.int32)
    return Segment(tokens, np.full(len(tokens), learned), parent)


def _template(name: str | None) -> str | None:
    return None if name == "auto" else name


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(choices)}, not {value!r}")
