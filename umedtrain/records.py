"""The records that data files hold, and reading them.

    Conversation    messages to train on: UltraMedical's and ShareGPT's `conversations`, `messages`, or
                    {prompt, completion}
    Preference      a prompt with a better and a worse answer: UltraMedical's layout, {prompt, chosen, rejected},
                    or {chosen, rejected} as dialogs that share all but their last turn
    Prompt          what an answer is wanted to: {prompt}, or one of the above without its last answer
    Answered        a prompt with answers that are to be judged: {prompt, answer}, {prompt, completion}, a dialog that
                    ends with the assistant's turn, a pair, or {messages, completions} with a list of texts

Prompts and answers may be strings or message lists, messages {role, content} or {from, value}. A malformed file or
row is a `RecordError` that names the file, the line and the field: rows are never skipped. Fields that a record does
not know are ignored, and a field that is null counts as absent. For kinds of files, see `umedtrain.files`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umedtrain.files import RecordError, Row, file_fingerprint, kind_name, read_rows, write_jsonl

__all__ = [
    "Answered",
    "Conversation",
    "Message",
    "Messages",
    "Preference",
    "Prompt",
    "RecordError",
    "file_fingerprint",
    "read_answered",
    "read_conversations",
    "read_preferences",
    "read_prompts",
    "write_jsonl",
]

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""
Messages = tuple[Message, ...]

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}


@dataclass(frozen=True)
class Conversation:
    """Messages, at least one of them the assistant's. `answer` is the reference answer, if there is one."""

    messages: Messages
    id: str | None = None
    type: str | None = None
    answer: str | None = None
    source: str = ""
    line: int = 0


@dataclass(frozen=True)
class Preference:
    """A prompt and two different answers to it, the better one first."""

    prompt: Messages
    chosen: str
    rejected: str
    id: str | None = None
    label_type: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    line: int = 0


@dataclass(frozen=True)
class Prompt:
    """Messages that end with the user's. `answer` is the reference answer, if there is one."""

    messages: Messages
    id: str | None = None
    type: str | None = None
    answer: str | None = None
    source: str = ""
    line: int = 0


@dataclass(frozen=True)
class Answered:
    """Messages that end with the user's, and one or more answers to them; of a preference pair chosen and rejected."""

    prompt: Messages
    answers: tuple[str, ...]
    id: str | None = None
    source: str = ""
    line: int = 0


def read_conversations(path: str | Path) -> list[Conversation]:
    """All conversations of a file.

    Raises:
        RecordError: for a file that cannot be read, and for the first malformed row.
    """
    return [_conversation(row) for row in read_rows(Path(path))]


def read_preferences(path: str | Path) -> list[Preference]:
    """All preference pairs of a file. Raises as `read_conversations`."""
    return [_preference(row) for row in read_rows(Path(path))]


def read_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a file. Raises as `read_conversations`."""
    return [_prompt(row) for row in read_rows(Path(path))]


def read_answered(path: str | Path) -> list[Answered]:
    """All answered prompts of a file. Raises as `read_conversations`."""
    return [_answered(row) for row in read_rows(Path(path))]


def _conversation(row: Row) -> Conversation:
    if row.has("conversations") or row.has("messages"):
        messages = _dialog(row)
    elif row.has("prompt") and row.has("completion"):
        messages = _prompt_field(row) + _completion(row)
    else:
        row.expected("`conversations`, `messages`, or `prompt` and `completion`")
    messages = _with_system(row, messages)
    if not any(message["role"] == "assistant" for message in messages):
        row.fail(_dialog_key(row), "has no assistant turn, so there is nothing to learn from it; remove the row")
    return Conversation(messages, **_common(row))


def _prompt(row: Row) -> Prompt:
    if row.has("chosen") and row.has("rejected"):
        return Prompt(_preference(row).prompt, **_common(row))
    if row.has("prompt"):
        messages, key = _prompt_field(row), "prompt"
    elif row.has("conversations") or row.has("messages"):
        messages, key = _dialog(row), _dialog_key(row)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    else:
        row.expected("`prompt`, `conversations` or `messages`")
    if not messages or messages[-1]["role"] != "user":
        row.fail(key, "has no user turn where an answer could follow")
    return Prompt(_with_system(row, messages), **_common(row))


def _preference(row: Row) -> Preference:
    if not (row.has("chosen") and row.has("rejected")):
        row.expected("`chosen` and `rejected`")
    chosen_prompt, chosen = _answer(row, "chosen")
    rejected_prompt, rejected = _answer(row, "rejected")
    if not _same(chosen_prompt, rejected_prompt):
        row.fail("rejected", "answers another prompt than `chosen`; a pair must share its prompt")
    prompt = chosen_prompt
    if row.has("prompt"):
        given = _prompt_field(row)
        # A prompt that is a bare string may be one turn of a longer dialog that the answers repeat whole.
        repeated = isinstance(row.values["prompt"], str) and any(_same(given, (turn,)) for turn in chosen_prompt)
        if not chosen_prompt:
            prompt = given
        elif not (repeated or _same(given, chosen_prompt)):
            row.fail("prompt", "is not the prompt that `chosen` and `rejected` answer")
    if not prompt:
        row.expected("`prompt`, or `chosen` and `rejected` as message lists that begin with it")
    if prompt[-1]["role"] != "user":
        row.fail("prompt", "must end with the user's turn")
    if chosen == rejected:
        row.fail("rejected", "equals `chosen`, so the pair prefers nothing; remove the row")
    return Preference(
        _with_system(row, prompt),
        chosen,
        rejected,
        id=row.record_id(),
        label_type=row.optional_text("label_type"),
        metadata=row.optional("metadata", dict, "an object") or {},
        source=str(row.path),
        line=row.line,
    )


def _answered(row: Row) -> Answered:
    if row.has("chosen") or row.has("rejected"):
        pair = _preference(row)
        return Answered(pair.prompt, (pair.chosen, pair.rejected), pair.id, pair.source, pair.line)
    dialog = row.has("conversations") or row.has("messages")
    if row.has("completions"):
        if not (dialog or row.has("prompt")):
            row.expected("`messages` or `prompt` beside `completions`")
        prompt, key = (_dialog(row), _dialog_key(row)) if dialog else (_prompt_field(row), "prompt")
        answers = _completions(row)
    elif dialog:
        messages, key = _dialog(row), _dialog_key(row)
        if messages[-1]["role"] != "assistant":
            row.fail(f"{key}[{len(messages) - 1}]", "must be the assistant's turn, for it is the answer")
        prompt, answers = messages[:-1], (messages[-1]["content"],)
    elif row.has("prompt") and (row.has("completion") or row.has("answer")):
        # Beside a completion, `answer` is the reference answer.
        field = "completion" if row.has("completion") else "answer"
        before, answer = _answer(row, field)
        prompt, key, answers = _prompt_field(row) + before, "prompt", (answer,)
    else:
        row.expected(
            "`prompt` with `answer`, `completion` or `completions`, `messages`, `conversations`, or `chosen` and "
            "`rejected`"
        )
    if not prompt or prompt[-1]["role"] != "user":
        row.fail(key, "has no user turn right before the answer")
    return Answered(_with_system(row, prompt), answers, row.record_id(), str(row.path), row.line)


def _completions(row: Row) -> tuple[str, ...]:
    """A list of texts, which may be empty ones: a model can end its turn at once."""
    texts = row.optional("completions", list, "a list of texts")
    if not texts:
        row.fail("completions", "is an empty list, so there is nothing to judge; remove the row")
    return tuple(row.check_text(text, f"completions[{index}]") for index, text in enumerate(texts))


def _common(row: Row) -> dict[str, Any]:
    return {
        "id": row.record_id(),
        "type": row.optional_text("type"),
        "answer": row.optional_text("answer"),
        "source": str(row.path),
        "line": row.line,
    }


def _dialog_key(row: Row) -> str:
    return next(key for key in ("conversations", "messages", "completion") if row.has(key))


def _dialog(row: Row) -> Messages:
    if row.has("conversations") and row.has("messages"):
        row.fail("messages", "stands beside `conversations`; keep the one that is meant")
    return _messages(row, _dialog_key(row))


def _prompt_field(row: Row) -> Messages:
    if isinstance(row.values["prompt"], str):
        return ({"role": "user", "content": row.filled_text("prompt")},)
    return _messages(row, "prompt")


def _completion(row: Row) -> Messages:
    if isinstance(row.values["completion"], str):
        return ({"role": "assistant", "content": row.filled_text("completion")},)
    return _messages(row, "completion")


def _answer(row: Row, key: str) -> tuple[Messages, str]:
    """The turns before the answer (none when the field is the bare answer), and the answer."""
    if isinstance(row.values[key], str):
        return (), row.filled_text(key)
    messages = _messages(row, key)
    if messages[-1]["role"] != "assistant":
        row.fail(f"{key}[{len(messages) - 1}]", "must be the assistant's turn, for it is the answer")
    return messages[:-1], messages[-1]["content"]


def _messages(row: Row, key: str) -> Messages:
    """A list of {role, content} or {from, value} objects, with roles in their common spelling."""
    turns = row.values[key]
    if not isinstance(turns, list):
        row.fail(key, f"must be a list of messages, not {kind_name(turns)}")
    if not turns:
        row.fail(key, "is an empty list; it needs at least one message")
    messages = []
    for index, turn in enumerate(turns):
        place = f"{key}[{index}]"
        if not isinstance(turn, dict):
            row.fail(place, f"must be an object with role and content, not {kind_name(turn)}")
        role_key, text_key = ("from", "value") if turn.get("from") is not None else ("role", "content")
        spelled = turn.get(role_key)
        role = _ROLES.get(spelled) if isinstance(spelled, str) else None
        if role is None:
            row.fail(f"{place}.{role_key}", f"unknown role {spelled!r}; known are {', '.join(_ROLES)}")
        content = row.check_text(turn.get(text_key), f"{place}.{text_key}")
        if role != "system":
            row.filled(content, f"{place}.{text_key}")
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _with_system(row: Row, messages: Messages) -> Messages:
    """Put the row's own `system` text, which some ShareGPT files have beside the turns, first."""
    text = row.optional_text("system")
    if not text:
        return messages
    if messages[0]["role"] == "system":
        row.fail("system", "stands beside a system turn; keep the one that is meant")
    return ({"role": "system", "content": text}, *messages)


def _same(first: Messages, second: Messages) -> bool:
    """Whether two prompts are the same but for white space around their messages."""
    stripped = [[(turn["role"], turn["content"].strip()) for turn in turns] for turns in (first, second)]
    return stripped[0] == stripped[1]
