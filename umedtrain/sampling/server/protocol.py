"""What clients may ask: OpenAI's requests as far as they are supported, and what each is for the sampler."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, model_validator

from umedtrain.sampling.params import MAX_TOP_LOGPROBS, SamplingParams

Json = dict[str, Any]

_MOST = 2**31 - 1
# Each of these costs something at every token of every sample, for everyone.
_MOST_STOPS, _LONGEST_STOP, _MOST_STOP_IDS, _MOST_BIASES = 16, 256, 64, 1024
# Fields that the official client can send and that have no influence on an answer.
_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
# Fields that it can send and that would have one: only these values, which ask for nothing, are taken.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field that is at fault.
        code: a word for programs.
        retry_after: seconds after which asking again may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> Json:
        """The JSON that clients get."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What a client may ask for at most.

    Attributes:
        prompt_tokens: of one prompt; None for what the model's positions allow.
        max_tokens: new tokens of a sample; None likewise.
        n: samples of a prompt, `best_of` included.
        queue: samples that wait or run, of all clients together.
        body_bytes: of a request.
        client_seconds: time to send a request, and to take each piece of its answer.
    """

    prompt_tokens: int | None = None
    max_tokens: int | None = None
    n: int = 128
    queue: int = 1024
    body_bytes: int = 4 * 2**20
    client_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


def _described(text: str) -> WrapValidator:
    """One sentence for a field of several types, instead of one for each type."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValueError:
            raise ValueError(text) from None

    return WrapValidator(check)


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # The bounds are those of the types that the engine computes with; the sampler itself looks at the rest.
    model: str | None = None
    max_tokens: int | None = Field(None, ge=0, le=_MOST)
    temperature: float | None = Field(None, le=100)
    top_p: float | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = None
    stop: Annotated[str | list[str] | None, _described("must be a string or a list of strings")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # Not in OpenAI's protocol.
    top_k: int | None = Field(None, le=_MOST)
    min_p: float | None = None
    min_tokens: int | None = Field(None, le=_MOST)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool = False
    stop_token_ids: list[Annotated[int, Field(ge=0, le=_MOST)]] | None = None
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for name, neutral in _NEUTRAL.items():
            if data.get(name) is not None and data[name] not in neutral:
                instead = " or ".join([*map(json.dumps, neutral), "left out"])
                raise ApiError(400, f"{name} is not supported; it must be {instead}", param=name)
        return {name: value for name, value in data.items() if name not in _IGNORED and name not in _NEUTRAL}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options must be left out when stream is not true", param="stream_options")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > _MOST_STOPS or any(len(stop) > _LONGEST_STOP for stop in stops):
            message = f"stop must be at most {_MOST_STOPS} strings of at most {_LONGEST_STOP} characters"
            raise ApiError(400, message, param="stop")
        for name, most in (("stop_token_ids", _MOST_STOP_IDS), ("logit_bias", _MOST_BIASES)):
            if (given := getattr(self, name)) and len(given) > most:
                raise ApiError(400, f"{name} must name at most {most} tokens, got {len(given)}", param=name)
        return self

    def _params(self, limits: Limits, *, max_tokens: int, n: int, **more: Any) -> SamplingParams:
        if limits.max_tokens is not None and max_tokens > limits.max_tokens:
            raise ApiError(400, f"max_tokens must be at most {limits.max_tokens}, got {max_tokens}", param="max_tokens")
        samples = max(n, more.get("best_of") or 0)
        if samples > limits.n:
            name = "n" if n == samples else "best_of"
            raise ApiError(400, f"{name} must be at most {limits.n}, got {samples}", param=name)
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "min_tokens")}
        given |= {"repetition_penalty": self.repetition_penalty, "stop": self.stop, "logit_bias": self._bias()}
        given |= {"stop_token_ids": self.stop_token_ids}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return SamplingParams(
                max_tokens=max_tokens, n=n, seed=self.seed, ignore_eos=self.ignore_eos, **given, **more
            )
        except ValueError as error:
            raise field_error(error, self) from None

    def _bias(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if wrong := [key for key in self.logit_bias if not re.fullmatch("[0-9]{1,18}", key)]:
            message = f"logit_bias must have token ids as its keys, got {wrong[0]!r}"
            raise ApiError(400, message, param="logit_bias")
        return {int(key): value for key, value in self.logit_bias.items()}


def field_error(error: ValueError, request: BaseModel) -> ApiError:
    """A mistake that the sampler found; its sentences begin with the field's name."""
    name = re.match(r"\w*", str(error))[0]
    return ApiError(400, str(error), param=name if name in type(request).model_fields else None)


_PROMPT = "must be a string, a list of strings, a list of token ids or a list of lists of token ids"


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], _described(_PROMPT)]
    best_of: int | None = Field(None, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def prompts(self) -> list[str] | list[list[int]]:
        """Each one apart."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError(400, "prompt is empty; it needs at least one token", param="prompt")
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    def params(self, limits: Limits) -> SamplingParams:
        """For the sampler; `max_tokens` is 16 if left out, as OpenAI's."""
        n = self.n or 1
        if self.stream and self.best_of is not None and self.best_of > n:
            raise ApiError(400, "best_of must not exceed n when stream is true", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens must be at least 1, or echo be true, got 0", param="max_tokens")
        # Without new tokens only the prompt is computed; the sampler wants a reason for that.
        scored = bool(self.echo) and (self.logprobs is not None or self.max_tokens == 0)
        return self._params(
            limits,
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            n=n,
            best_of=self.best_of,
            top_logprobs=self.logprobs or 0,
            prompt_logprobs=scored,
        )


class ContentPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


_CONTENT = 'must be a string or a list of {"type": "text", "text": string}'


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[ContentPart], _described(_CONTENT)]

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, data: Any) -> Any:
        """Answers are sent back as they came, with `refusal: null` and the like."""
        if not isinstance(data, Mapping):
            return data
        return {name: value for name, value in data.items() if name in ("role", "content") or value not in (None, [])}

    def turn(self) -> dict[str, str]:
        """For `render_chat`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def names_length(self) -> bool:
        """Whether the client has said how long an answer may be."""
        return self.max_tokens is not None or self.max_completion_tokens is not None

    def params(self, limits: Limits, positions: int) -> SamplingParams:
        """For the sampler; without `max_tokens` an answer may be as long as the limits and the model's positions."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        asked = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        most = limits.max_tokens or positions
        return self._params(
            limits,
            max_tokens=most if asked is None else asked,
            n=self.n or 1,
            top_logprobs=self.top_logprobs or 0,
        )
