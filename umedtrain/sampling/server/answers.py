"""What clients get: OpenAI's shapes of answers, whole or in pieces."""

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from umedtrain.sampling.params import Output, TopLogprobs
from umedtrain.sampling.server.protocol import ChatRequest, CompletionRequest, Json
from umedtrain.sampling.server.worker import Progress
from umedtrain.sampling.stops import GrowingText, held_back
from umedtrain.text.tokenizer import Tokenizer

Echo = tuple[list[int], str]
"""A prompt's ids and its text, to come before the answer."""


class Record(NamedTuple):
    """One token of an answer or of an echoed prompt."""

    token: int
    logprob: float | None
    top: TopLogprobs | None
    offset: int  # of its text in the answer's


@dataclass(frozen=True)
class Piece:
    """A part of one choice, from a whole answer to the few characters of a new token.

    Attributes:
        text, records: what it is made of.
        finish_reason: with the last one.
        echoed: how many of the first records are those of the prompt.
        prompt_ids: to be told with it, if any.
    """

    text: str = ""
    records: list[Record] = field(default_factory=list)
    finish_reason: str | None = None
    echoed: int = 0
    prompt_ids: list[int] | None = None


class Pieces:
    """Text of single tokens, as logprobs spell it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            # What a second one adds: some tokenizers leave out the space before a text's first word.
            once, twice = self._tokenizer.decode([token]), self._tokenizer.decode([token, token])
            self._known[token] = twice[len(once) :]
        return self._known[token]


class GrowingChoice:
    """Turns the tokens of one sample into text that may be shown: nothing that may yet become a stop string.

    Args:
        tokenizer: decodes.
        stops: the request's stop strings.
        echo: the prompt's ids and its text, if that is to come first.
        prompt_ids: told with the first piece.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: tuple[str, ...], echo: Echo | None, *, prompt_ids: list[int]
    ) -> None:
        self._stops, self._echo = stops, echo
        self._prompt_ids: list[int] | None = prompt_ids
        self._text = GrowingText(tokenizer)
        self._tokenizer = tokenizer
        self._shown = 0
        self._records: list[Record] = []
        self._echoed = 0
        self._start = len(echo[1]) if echo else 0

    def take(self, event: Progress, prompt: tuple[list[float | None], list | None] | None = None) -> Piece | None:
        """What can be shown after new tokens; None for nothing.

        Args:
            event: the new tokens.
            prompt: log-probabilities of the prompt and its likeliest tokens, for an echo with logprobs.
        """
        before = ""
        if self._echo:
            ids, before = self._echo
            if prompt is not None:
                self._records = echoed(self._tokenizer, ids, before, *prompt)
                self._echoed = len(ids)
            self._echo = None
        last = len(event.tokens) - 1 if event.finished and isinstance(event.stop_reason, int) else None
        for index, token in enumerate(event.tokens):
            top = event.top_logprobs[index] if event.top_logprobs else None
            self._records.append(Record(token, event.logprobs[index], top, self._start + len(self._text.text)))
            if index != last:
                self._text.push(token)
        if event.finished:
            self._text.flush()
            end = len(self._text.text) if event.stop_at is None else event.stop_at
        else:
            end = len(self._text.text) - held_back(self._text.text, self._stops)
        new = before + self._text.text[self._shown : end]
        self._shown = max(self._shown, end)
        if not new and not event.finished:
            return None
        reason = None if not event.finished else "length" if event.stop_reason is None else "stop"
        piece = Piece(new, self._records, reason, self._echoed, self._prompt_ids)
        self._records, self._echoed, self._prompt_ids = [], 0, None
        return piece


def whole(tokenizer: Tokenizer, output: Output, echo: Echo | None, *, logprobs: bool, prompt_ids: list[int]) -> Piece:
    """A finished answer in one piece, with records of its tokens if logprobs are asked for."""
    before, records = "", []
    if echo:
        ids, before = echo
        if logprobs:
            records = echoed(tokenizer, ids, before, output.prompt_logprobs, output.prompt_top_logprobs)
    if logprobs:
        tops = output.top_logprobs or [None] * len(output.tokens)
        offsets = _offsets(tokenizer, output.tokens, len(before))
        records += [Record(*columns) for columns in zip(output.tokens, output.logprobs, tops, offsets, strict=True)]
    else:
        records = [Record(token, None, None, 0) for token in output.tokens]
    count = len(records) - len(output.tokens)
    return Piece(before + output.text, records, output.finish_reason, count, prompt_ids)


def echoed(
    tokenizer: Tokenizer, ids: list[int], text: str, logprobs: list[float | None], tops: list | None
) -> list[Record]:
    """Records of a prompt's tokens; the begin token that a string was given is no part of its text."""
    hidden = 1 if ids[0] == tokenizer.bos_id and not text.startswith(tokenizer.decode(ids[:1])) else 0
    offsets = [0] * hidden + _offsets(tokenizer, ids[hidden:], 0)
    return [Record(*columns) for columns in zip(ids, logprobs, tops or [None] * len(ids), offsets, strict=True)]


def _offsets(tokenizer: Tokenizer, tokens: list[int], start: int) -> list[int]:
    text, offsets = GrowingText(tokenizer), []
    for token in tokens:
        offsets.append(start + len(text.text))
        text.push(token)
    return offsets


class _Answer:
    """One HTTP answer's constant parts."""

    prefix, whole_name, chunk_name = "", "", ""

    @property
    def wants_logprobs(self) -> bool:
        """Whether records have to be complete."""
        return self._request.logprobs is not None and self._request.logprobs is not False

    def __init__(self, model: str, pieces: Pieces, request: CompletionRequest | ChatRequest) -> None:
        self._pieces, self._request = pieces, request
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._tell_usage = bool(request.stream_options and request.stream_options.include_usage)

    def response(self, choices: list[Json], usage: Json) -> Json:
        """A whole answer."""
        return {**self._head, "object": self.whole_name, "choices": choices, "usage": usage}

    def chunk(self, choices: list[Json]) -> Json:
        """An event of a stream."""
        usage = {"usage": None} if self._tell_usage else {}
        return {**self._head, "object": self.chunk_name, "choices": choices, **usage}

    def last_chunk(self, usage: Json) -> Json | None:
        """The event that tells what was used, if that is wanted."""
        return self.chunk([]) | {"usage": usage} if self._tell_usage else None

    def first_chunks(self, choices: int) -> Iterable[Json]:
        """Events before any text."""
        return ()

    def _ids(self, piece: Piece) -> Json:
        if not self._request.return_token_ids:
            return {}
        prompt = {} if piece.prompt_ids is None else {"prompt_token_ids": piece.prompt_ids}
        return {**prompt, "token_ids": [record.token for record in piece.records[piece.echoed :]]}


class CompletionAnswer(_Answer):
    """Of /v1/completions."""

    prefix, whole_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, piece: Piece) -> Json:
        """Of a whole answer or of a chunk."""
        logprobs = self._logprobs(piece.records) if self.wants_logprobs else None
        shown = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        return shown | self._ids(piece)

    chunk_choice = choice

    def _logprobs(self, records: list[Record]) -> Json:
        return {
            "tokens": [self._pieces[record.token] for record in records],
            "token_logprobs": [record.logprob for record in records],
            "top_logprobs": [self._top(record) for record in records],
            "text_offset": [record.offset for record in records],
        }

    def _top(self, record: Record) -> dict[str, float] | None:
        if record.logprob is None:
            return None
        top: dict[str, float] = {}
        # Several tokens may be spelled alike (parts of characters): the likeliest one stands for them.
        for token, logprob in (*(record.top or ()), (record.token, record.logprob)):
            top.setdefault(self._pieces[token], logprob)
        return top


class ChatAnswer(_Answer):
    """Of /v1/chat/completions."""

    prefix, whole_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, piece: Piece) -> Json:
        """Of a whole answer."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(index, piece, {"message": message})

    def chunk_choice(self, index: int, piece: Piece) -> Json:
        """Of a chunk."""
        return self._choice(index, piece, {"delta": {"content": piece.text} if piece.text else {}})

    def first_chunks(self, choices: int) -> Iterable[Json]:
        """Who speaks."""
        for index in range(choices):
            delta = {"role": "assistant", "content": ""}
            yield self.chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, index: int, piece: Piece, content: Json) -> Json:
        logprobs = self._logprobs(piece.records) if self.wants_logprobs else None
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        return choice | self._ids(piece)

    def _logprobs(self, records: list[Record]) -> Json:
        content = [
            {
                **self._spelled(record.token, record.logprob),
                "top_logprobs": [self._spelled(*likely) for likely in record.top or ()],
            }
            for record in records
        ]
        return {"content": content, "refusal": None}

    def _spelled(self, token: int, logprob: float) -> Json:
        text = self._pieces[token]
        # A part of a character has bytes that its text does not tell.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """OpenAI's counts; a prompt counts once for all its samples."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
