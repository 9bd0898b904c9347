"""The HTTP endpoints."""

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from umedtrain.sampling import requests
from umedtrain.sampling.engine import RequestError
from umedtrain.sampling.params import Output, SamplingParams
from umedtrain.sampling.sampler import Sampler
from umedtrain.sampling.server.answers import (
    ChatAnswer,
    CompletionAnswer,
    Echo,
    GrowingChoice,
    Pieces,
    usage,
    whole,
)
from umedtrain.sampling.server.gate import Gate
from umedtrain.sampling.server.metrics import Metrics
from umedtrain.sampling.server.padded import Padded
from umedtrain.sampling.server.protocol import ApiError, ChatRequest, CompletionRequest, Json, Limits
from umedtrain.sampling.server.worker import EngineError, Event, Failed, Job, Mailbox, Worker
from umedtrain.text.chat import render_chat

Echoes = list[Echo] | None
Answer = CompletionAnswer | ChatAnswer
_Result = TypeVar("_Result")
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


class Service:
    """One model, its engine's thread, and what the endpoints share.

    Args:
        sampler: with a tokenizer; it serves nothing else from now on.
        name: of the model, for clients.
        limits: on requests.

    Attributes:
        draining: whether new requests are refused because the server is about to end.
    """

    def __init__(self, sampler: Sampler, name: str, limits: Limits) -> None:
        self.sampler, self.name, self.limits = sampler, name, limits
        if sampler.model.config.vocab_size > sampler.tokenizer.vocab_size:
            sampler.tokenizer = sampler.engine.tokenizer = Padded(sampler.tokenizer)
        self.worker = Worker(sampler, on_end=lambda job: self.metrics.ended(job, time.monotonic()))
        self.metrics = Metrics(sampler.engine)
        self.pieces = Pieces(sampler.tokenizer)
        self.created = int(time.time())
        self.draining = False
        self._admitted = 0
        self._mean_seconds = 1.0

    @property
    def positions(self) -> int:
        """Tokens of prompt and answer together that the model can see."""
        return self.sampler.model.config.max_position_embeddings

    def check_model(self, asked: str | None) -> None:
        """ApiError unless this model is asked for."""
        if asked is not None and asked != self.name:
            message = f"model {asked!r} is not served here; ask for {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def admit(self, samples: int, param: str) -> "Ticket":
        """Places in the queue, or an ApiError; `param` is the field that asks for so many."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", retry_after=10)
        if samples > self.limits.queue:
            message = f"{param} asks for {samples} samples in all, but the queue has room for {self.limits.queue}"
            raise ApiError(400, message, param=param)
        if self._admitted + samples > self.limits.queue:
            wait = min(60, max(1, math.ceil(self._mean_seconds)))
            message = f"the queue is full: {self._admitted} samples wait or run, of {self.limits.queue} at most"
            raise ApiError(429, message, code="queue_full", retry_after=wait)
        self._admitted += samples
        return Ticket(self, samples)

    def leave(self, samples: int, seconds: float) -> None:
        """Give places back after so much time."""
        self._admitted -= samples
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)

    def check_prompt(self, prompt: requests.Prompt, params: SamplingParams, name: str) -> requests.Request:
        """The engine's request for one prompt, or an ApiError."""
        param = name.partition("[")[0]
        try:
            checked = requests.check_request(
                prompt, params, self.sampler.tokenizer, self.sampler.model.config, name=name
            )
        except ValueError as error:
            where = param if str(error).startswith(name) else str(error).partition(" ")[0]
            raise ApiError(400, str(error), param=where) from None
        if self.limits.prompt_tokens is not None and len(checked.ids) > self.limits.prompt_tokens:
            message = f"{name} has {len(checked.ids)} tokens, but at most {self.limits.prompt_tokens} are allowed"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        unknown = [i for i in params.stop_token_ids if i >= self.sampler.model.config.vocab_size]
        if unknown:
            message = f"stop_token_ids holds {unknown[0]}, outside the model's vocabulary"
            raise ApiError(400, message, param="stop_token_ids")
        return checked

    def within_cache(self, request: requests.Request) -> requests.Request:
        """The request with no longer answer than the cache has room for, for a client that has named no length."""
        room = self.sampler.engine.cache_tokens - len(request.ids)
        return dataclasses.replace(request, limit=min(request.limit, max(1, room)))


class Ticket:
    """A request's places in the queue and its jobs, until it is closed."""

    def __init__(self, service: Service, samples: int) -> None:
        self._service, self._samples, self._began = service, samples, time.monotonic()
        self.mailbox = Mailbox()
        self.jobs: list[Job] = []
        self._closed = False

    def submit(self, checked: list[requests.Request], *, stream: bool) -> None:
        """Hand the prompts to the engine."""
        self.jobs = [Job(request, self.mailbox, index, stream) for index, request in enumerate(checked)]
        try:
            self._service.worker.submit(self.jobs)
        except EngineError as error:
            raise as_api_error(error, self._service) from None

    async def get(self) -> tuple[Job, Event]:
        """The next event; ApiError for a failure."""
        job, event = await self.mailbox.get()
        if isinstance(event, Failed):
            raise as_api_error(event.error, self._service)
        return job, event

    def close(self) -> None:
        """Cancel what has not ended."""
        if self._closed:
            return
        self._closed = True
        self._service.worker.cancel(self.jobs)
        self._service.leave(self._samples, time.monotonic() - self._began)


def as_api_error(error: Exception, service: Service) -> ApiError:
    """What a client is told when a job has no answer."""
    if isinstance(error, EngineError):
        failed = service.worker.error is not None
        return ApiError(500 if failed else 503, str(error), retry_after=None if failed else 10)
    if isinstance(error, RequestError):
        return ApiError(500, str(error))
    return ApiError(400, str(error), param="max_tokens")  # it asks for more than the cache could hold


class _EventStream(StreamingResponse):
    """Server-sent events; the ticket is closed however it ends."""

    def __init__(self, events: AsyncIterator[str], ticket: Ticket) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.close()


def build_app(
    sampler: Sampler,
    *,
    name: str = "model",
    limits: Limits | None = None,
    api_key: str | None = None,
    hosts: frozenset[str] | None = None,
) -> tuple[Gate, Service]:
    """The ASGI application, whose engine runs between its startup and shutdown, and what its endpoints share.

    `hosts` are the names that it may be asked under; None for all.

    Raises:
        ValueError: when the sampler has no tokenizer, or one of another model.
    """
    check_tokenizer(sampler)
    service = Service(sampler, name, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await run_in_threadpool(service.worker.stop)

    app = FastAPI(title="umedtrain", docs_url=None, redoc_url=None, lifespan=lifespan)
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        service.check_model(asked.model)
        prompts, params = asked.prompts(), asked.params(service.limits)

        def check() -> list[requests.Request]:
            names = ["prompt"] if len(prompts) == 1 else [f"prompt[{index}]" for index in range(len(prompts))]
            return [service.check_prompt(p, params, name) for p, name in zip(prompts, names, strict=True)]

        return await _answer(service, http, asked, params, len(prompts), check, prompts if asked.echo else None)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, http: Request) -> Response:
        service.check_model(asked.model)
        params = asked.params(service.limits, service.positions)

        def check() -> list[requests.Request]:
            turns = [message.turn() for message in asked.messages]
            try:
                requests.check_characters(turns, sampler.model.config, name="messages")
                ids, _ = render_chat(turns, sampler.tokenizer, add_generation_prompt=True)
            except ValueError as error:
                raise ApiError(400, str(error), param="messages") from None
            checked = service.check_prompt(ids, params, "messages")
            return [checked if asked.names_length else service.within_cache(checked)]

        return await _answer(service, http, asked, params, 1, check, None)

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Json:
        service.check_model(name)
        return _card(service)

    @app.get("/health")
    async def health() -> JSONResponse:
        if not service.worker.alive:
            return JSONResponse({"status": "failed"}, status_code=503)
        status = "draining" if service.draining else "ok"
        return JSONResponse({"status": status}, status_code=503 if service.draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    answered = _counted(service.metrics)
    return Gate(app, limits=service.limits, api_key=api_key, hosts=hosts, answered=answered), service


def check_tokenizer(sampler: Sampler) -> None:
    """ValueError for a model that cannot be served for want of a fitting tokenizer."""
    if sampler.tokenizer is None:
        raise ValueError("a model can be served only with its tokenizer")
    known, rows = sampler.tokenizer.vocab_size, sampler.model.config.vocab_size
    if known > rows:
        raise ValueError(
            f"the tokenizer has {known} tokens, but the model only {rows} embeddings: they do not belong together"
        )


async def _answer(
    service: Service,
    http: Request,
    asked: CompletionRequest | ChatRequest,
    params: SamplingParams,
    prompts: int,
    check: Callable[[], list[requests.Request]],
    echo: list[str] | list[list[int]] | None,
) -> Response:
    """From a checked body to a response. `check` makes the engine's requests, which takes a while for long texts."""

    def prepare() -> tuple[list[requests.Request], Echoes]:
        checked = check()
        if echo is None:
            return checked, None
        texts = [p if isinstance(p, str) else service.sampler.tokenizer.decode(p) for p in echo]
        return checked, [(request.ids, text) for request, text in zip(checked, texts, strict=True)]

    ticket = service.admit(prompts * params.samples, "prompt" if prompts > 1 else "n")
    try:
        checked, shown = await run_in_threadpool(prepare)
        shape = CompletionAnswer if isinstance(asked, CompletionRequest) else ChatAnswer
        answer = shape(service.name, service.pieces, asked)
        ticket.submit(checked, stream=bool(asked.stream))
        if asked.stream:
            return _EventStream(_events(service, ticket, params, answer, shown), ticket)
        finished = await _unless_left(http, _all_finished(ticket))
        if finished is None:
            ticket.close()
            return Response(status_code=499)
        body = await run_in_threadpool(_whole_answer, service, ticket, finished, params, answer, shown)
        ticket.close()
        return Response(body, media_type="application/json")
    except BaseException:
        ticket.close()
        raise


async def _unless_left(http: Request, work: Coroutine[Any, Any, _Result]) -> _Result | None:
    """The result of `work`, which is cancelled when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _all_finished(ticket: Ticket) -> dict[int, list[Output]]:
    """Outputs by the index of their prompt."""
    finished = {}
    while len(finished) < len(ticket.jobs):
        job, event = await ticket.get()
        finished[job.index] = event.outputs
    return finished


def _whole_answer(
    service: Service,
    ticket: Ticket,
    finished: dict[int, list[Output]],
    params: SamplingParams,
    answer: Answer,
    echo: Echoes,
) -> str:
    choices, made = [], 0
    for job in ticket.jobs:
        made += sum(sample.generated for sample in job.samples)
        for number, output in enumerate(finished[job.index]):
            piece = whole(
                service.sampler.tokenizer,
                output,
                echo[job.index] if echo else None,
                logprobs=answer.wants_logprobs,
                prompt_ids=job.request.ids,
            )
            choices.append(answer.choice(job.index * params.n + number, piece))
    return _json(answer.response(choices, usage(_prompt_tokens(ticket), made)))


async def _events(
    service: Service, ticket: Ticket, params: SamplingParams, answer: Answer, echo: Echoes
) -> AsyncIterator[str]:
    """A stream's events; a failure is the last one."""
    growing = {
        (job.index, sample): GrowingChoice(
            service.sampler.tokenizer, params.stop, echo[job.index] if echo else None, prompt_ids=job.request.ids
        )
        for job in ticket.jobs
        for sample in range(params.n)
    }
    scored: dict[int, tuple] = {}
    left, made = len(growing), 0
    for chunk in answer.first_chunks(len(growing)):
        yield _event(chunk)
    try:
        while left:
            job, event = await ticket.get()
            if event.prompt is not None:
                scored[job.index] = event.prompt
            made += len(event.tokens)
            left -= event.finished
            piece = growing[job.index, event.sample].take(event, scored.get(job.index))
            if piece is not None:
                yield _event(answer.chunk([answer.chunk_choice(job.index * params.n + event.sample, piece)]))
    except ApiError as error:
        yield _event(error.body)
        return
    if (last := answer.last_chunk(usage(_prompt_tokens(ticket), made))) is not None:
        yield _event(last)
    yield "data: [DONE]\n\n"


def _prompt_tokens(ticket: Ticket) -> int:
    return sum(len(job.request.ids) for job in ticket.jobs)


def _event(data: Json) -> str:
    return f"data: {_json(data)}\n\n"


def _json(data: Json) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _card(service: Service) -> Json:
    card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "umedtrain"}
    return card | {"max_model_len": service.positions}


def _counted(metrics: Metrics) -> Callable[[str, int, float], None]:
    def answered(path: str, status: int, seconds: float) -> None:
        metrics.answered(path if path in _PATHS else "other", status, seconds)

    return answered


async def _on_error(http: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        error = _validation_error(error.errors()[0])
    elif isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail))
    elif not isinstance(error, ApiError):
        error = ApiError(500, f"{type(error).__name__} in the server; its log says more")
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.body, error.status, headers)


def _validation_error(found: Json) -> ApiError:
    """One sentence for what pydantic found first."""
    steps = found["loc"][1:]
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {found['ctx']['error']}", code="invalid_json")
    if found["type"] == "string_unicode" and not steps:
        return ApiError(400, f"{found['input']!a} is not a known field", code="unknown_field")
    if not steps:
        return ApiError(400, "the body must be a JSON object, sent with 'Content-Type: application/json'")
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"{path} is not a known field", param=path, code="unknown_field")
    if found["type"] == "missing":
        return ApiError(400, f"{path} is missing", param=path)
    problem = found["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{path}: {problem[:1].lower()}{problem[1:]}", param=path)
