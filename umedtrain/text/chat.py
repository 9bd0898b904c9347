"""Dialogs to ids and a loss mask, never by way of one text: special tokens are placed, not spelled.

A template is a function from messages to parts: special tokens and stretches of text, each with a flag that says
whether the model is trained on it. Neighbouring stretches of text are encoded together, because that is what the
published templates do (their text is tokenized between special tokens) and ids may depend on what stands before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from umedtrain.text.specials import DOCUMENT_ENDS, SMOLLM2_SYSTEM
from umedtrain.text.tokenizer import Tokenizer, encode_continued

ROLES = ("system", "user", "assistant")
TEMPLATES = ("llama3", "llama3.1", "chatml", "plain")
DEFAULT_DATE = "26 Jul 2024"  # Llama-3.1's template, when no date is given
TRIMMED = ("llama3", "llama3.1", "plain")  # SmolLM2's ChatML, as published, takes contents as they are


@dataclass(frozen=True)
class _Special:
    id: int
    train: bool = False


@dataclass(frozen=True)
class _Text:
    text: str
    train: bool = False
    apart: bool = False  # encode from here on without looking at the text before


_Part = _Special | _Text


def render_chat(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    template: str | None = None,
    trim: bool = True,
    date: str | None = None,
) -> tuple[list[int], list[bool]]:
    """Ids of a dialog, and for each id whether to train on it.

    messages: {"role": "system" | "user" | "assistant", "content": text}. Text that spells a special token stays text;
    an empty content is allowed.
    add_generation_prompt: end with the header of an assistant's answer, for sampling.
    template: "llama3", "llama3.1" (a system block with `date` comes first), "chatml" (SmolLM2's, with its default
    system prompt), "plain"; default: the tokenizer's.
    trim: strip white space around each content where the published template does: all but "chatml" do. With
    trim=False, "llama3" gives the ids of Meta's own ChatFormat. An untrimmed answer that begins with white space
    may have other ids than the same text rendered by jinja, which can join its first characters to the header's line
    break: here the prompt's ids always begin the ids of the whole dialog.
    date: of "llama3.1" only, written as in "26 Jul 2024", which is the default (never today: the same call gives the
    same ids every day).

    The mask is True on the tokens of each assistant content and on the one token that ends it. "plain" is for
    vocabularies without chat tokens: the begin token if there is one, then "System:\\n", "User:\\n" or "Assistant:\\n",
    the content, and after it an empty line, or for the assistant the end-of-document token.

    Raises ValueError, naming message and field, for an unknown role, a missing or non-text content, no messages, a
    generation prompt after an assistant's message, an unknown template, or a special token that the vocabulary lacks.
    """
    template = tokenizer.chat_template if template is None else template
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r} is unknown; use one of {', '.join(TEMPLATES)}.")
    if date is not None and template != "llama3.1":
        raise ValueError(f"date={date!r} has no place in the {template!r} template; only 'llama3.1' shows a date.")
    _validate(messages, add_generation_prompt)
    strip = trim and template in TRIMMED
    turns = [(m["role"], m["content"].strip() if strip else m["content"]) for m in messages]
    if template == "llama3":
        parts = _llama3(turns, tokenizer, add_generation_prompt, apart=not strip)
    elif template == "llama3.1":
        parts = _llama3(_dated(turns, date or DEFAULT_DATE), tokenizer, add_generation_prompt, apart=not strip)
    elif template == "chatml":
        parts = _chatml(turns, tokenizer, add_generation_prompt)
    else:
        parts = _plain(turns, tokenizer, add_generation_prompt)
    return _encode(parts, tokenizer)


def render_prompt_and_answer(
    prompt: Sequence[Mapping[str, str]],
    answer: str,
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    trim: bool = True,
    date: str | None = None,
) -> tuple[list[int], list[int]]:
    """(prompt ids with the assistant's header, answer ids with what ends it); together the ids of the full dialog.

    Two answers to one prompt share the prompt's ids exactly. The answer's ids end with the terminator; "chatml" alone
    has one more id after it, a line break that `render_chat`'s mask leaves out.
    Raises ValueError as `render_chat` does.
    """
    options = {"template": template, "trim": trim, "date": date}
    prompt_ids, _ = render_chat(prompt, tokenizer, add_generation_prompt=True, **options)
    full_ids, _ = render_chat([*prompt, {"role": "assistant", "content": answer}], tokenizer, **options)
    assert full_ids[: len(prompt_ids)] == prompt_ids
    return prompt_ids, full_ids[len(prompt_ids) :]


def plain_end(tokenizer: Tokenizer) -> int:
    """The id that ends an assistant's turn in the "plain" template: the end-of-document token."""
    for name in DOCUMENT_ENDS:
        if (found := tokenizer.special_id(name)) is not None:
            return found
    if not tokenizer.eos_ids:
        raise ValueError("The 'plain' template needs an end token, but the vocabulary has none.")
    return tokenizer.eos_ids[-1]


def _validate(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of messages, not {type(messages).__name__}.")
    if not messages:
        raise ValueError("messages is empty: a dialog needs at least one message.")
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{n}] must have 'role' and 'content', but is {type(message).__name__}.")
        for field in ("role", "content"):
            if field not in message:
                raise ValueError(f"messages[{n}] has no {field!r}.")
            if not isinstance(message[field], str):
                raise ValueError(f"messages[{n}][{field!r}] must be text, not {type(message[field]).__name__}.")
        if message["role"] not in ROLES:
            raise ValueError(f"messages[{n}]['role'] is {message['role']!r}; use one of {', '.join(ROLES)}.")
        if message.get("tool_calls"):
            raise ValueError(f"messages[{n}]['tool_calls'] is set, but tool calls are not rendered; remove them.")
    if add_generation_prompt and messages[-1]["role"] == "assistant":
        raise ValueError(
            f"add_generation_prompt: messages[{len(messages) - 1}] is already the assistant's; leave it out or ask for "
            "no generation prompt."
        )


def _llama3(turns: list[tuple[str, str]], tokenizer: Tokenizer, prompt: bool, *, apart: bool) -> Iterable[_Part]:
    start, end, eot = (_need(tokenizer, n) for n in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    yield _Special(_need(tokenizer, "<|begin_of_text|>"))
    for role, content in turns:
        train = role == "assistant"
        yield from (_Special(start), _Text(role), _Special(end), _Text("\n\n"))
        yield from (_Text(content, train, apart), _Special(eot, train))
    if prompt:
        yield from (_Special(start), _Text("assistant"), _Special(end), _Text("\n\n"))


def _dated(turns: list[tuple[str, str]], date: str) -> list[tuple[str, str]]:
    """Llama-3.1's: the first message is a system block that states dates, before the caller's system text if any."""
    system, rest = (turns[0][1], turns[1:]) if turns[0][0] == "system" else ("", turns)
    return [("system", f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n{system}"), *rest]


def _chatml(turns: list[tuple[str, str]], tokenizer: Tokenizer, prompt: bool) -> Iterable[_Part]:
    start, end = _need(tokenizer, "<|im_start|>"), _need(tokenizer, "<|im_end|>")
    if turns[0][0] != "system":
        turns = [("system", SMOLLM2_SYSTEM), *turns]
    for role, content in turns:
        train = role == "assistant"
        yield from (
            _Special(start),
            _Text(f"{role}\n"),
            _Text(content, train),
            _Special(end, train),
            _Text("\n"),
        )
    if prompt:
        yield from (_Special(start), _Text("assistant\n"))


def _plain(turns: list[tuple[str, str]], tokenizer: Tokenizer, prompt: bool) -> Iterable[_Part]:
    end = plain_end(tokenizer)
    if tokenizer.bos_id is not None:
        yield _Special(tokenizer.bos_id)
    for role, content in turns:
        yield _Text(f"{role.capitalize()}:\n")
        if role == "assistant":
            yield from (_Text(content, True), _Special(end, True))
        else:
            yield _Text(f"{content}\n\n")
    if prompt:
        yield _Text("Assistant:\n")


def _need(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.special_id(name)
    if found is None:
        raise ValueError(f"The vocabulary has no {name!r}, which the chat template needs; choose template='plain'.")
    return found


def _encode(parts: Iterable[_Part], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    run: list[_Text] = []

    def add(new: list[int], train: bool) -> None:
        ids.extend(new)
        mask.extend([train] * len(new))

    def flush() -> None:
        for new, train in _encode_run(run, tokenizer):
            add(new, train)
        run.clear()

    for part in parts:
        if isinstance(part, _Special):
            flush()
            add([part.id], part.train)
            continue
        if part.apart:
            flush()
        if part.text:
            run.append(part)
    flush()
    return ids, mask


def _encode_run(run: list[_Text], tokenizer: Tokenizer) -> Iterable[tuple[list[int], bool]]:
    """Encode text between two special tokens: all of one kind together, an answer as the continuation of its header.

    A token may not lie across the edge of an answer: the header's ids must be those that the model is given when it
    writes the answer itself. Where encoding both together would give such a token (an untrimmed answer that begins
    with white space), the answer is encoded on its own.
    """
    before = "".join(part.text for part in run if not part.train)
    answer = "".join(part.text for part in run if part.train)
    assert not any(a.train and not b.train for a, b in pairwise(run))
    before_ids = encode_continued(tokenizer, before) if before else []
    yield before_ids, False
    if answer:
        both = encode_continued(tokenizer, before + answer) if before else []
        fits = bool(before) and both[: len(before_ids)] == before_ids
        yield (both[len(before_ids) :] if fits else encode_continued(tokenizer, answer)), True
