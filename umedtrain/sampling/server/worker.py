"""The one thread that runs the engine, and how requests get into it and results out of it.

Nothing else touches the engine. Handlers put jobs and cancellations into an inbox; what has become of a job is posted
to its mailbox, which lives in the handlers' event loop.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from umedtrain.sampling.engine import Engine, RequestError
from umedtrain.sampling.params import Output, TopLogprobs
from umedtrain.sampling.requests import Request
from umedtrain.sampling.sampler import Sampler
from umedtrain.sampling.sequence import Sequence as Sample

_LOG = logging.getLogger(__name__)
# A round lasts about so long: whoever joins or leaves, and whoever reads a stream, waits no longer than that.
_ROUND_SECONDS = 0.05
_MOST_TOKENS = 16


class EngineError(RuntimeError):
    """The engine is not running any more, so nothing can be asked of it."""


@dataclass(frozen=True)
class Progress:
    """New tokens of one sample of a job that streams.

    Attributes:
        sample: which one.
        tokens, logprobs, top_logprobs: what is new; the last is empty unless it was asked for.
        finished: whether these are the last.
        stop_reason, stop_at: as in `sequence.Sequence`.
        prompt: with the first tokens, if it was asked for: log-probabilities and likeliest tokens of the prompt.
    """

    sample: int
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    finished: bool
    stop_reason: int | str | None
    stop_at: int | None
    prompt: tuple[list[float | None], list[TopLogprobs | None] | None] | None = None


@dataclass(frozen=True)
class Finished:
    """All samples of a job that does not stream, in order."""

    outputs: list[Output]


@dataclass(frozen=True)
class Failed:
    """A job that has no answer."""

    error: Exception


Event = Progress | Finished | Failed


class Mailbox:
    """Events of one handler's jobs, in order; made in the handler's event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[Job, Event]] = asyncio.Queue()

    def post(self, job: "Job", event: Event) -> None:
        """Called by the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (job, event))
        except RuntimeError:  # the loop has ended, and its handlers with it
            _LOG.debug("nobody is left to read what became of %s", job.request.name)

    async def get(self) -> tuple["Job", Event]:
        """The next event."""
        return await self._queue.get()


@dataclass(eq=False)
class Job:
    """One prompt.

    Attributes:
        request: what is asked.
        mailbox: where its events go.
        index: of the prompt among those of the handler.
        stream: post tokens as they come, instead of everything at the end.
        began: when it was submitted.
        first_token: when it had its first new token.
        samples, told, ended: the engine's sequences, how many tokens of each have been reported, and whether that was
            all; the engine thread's own.
    """

    request: Request
    mailbox: Mailbox
    index: int = 0
    stream: bool = False
    began: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    samples: list[Sample] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)


class Worker:
    """Runs a sampler's engine in its own thread.

    Args:
        sampler: used by this thread only, from now on.
        on_end: called in the thread with every job that has ended by itself.
    """

    def __init__(self, sampler: Sampler, on_end: Callable[[Job], None] = lambda job: None) -> None:
        self.sampler, self.on_end = sampler, on_end
        self.error: BaseException | None = None
        self._jobs: dict[Request, Job] = {}
        self._inbox: deque[tuple[str, Sequence[Job]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_per_token = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def engine(self) -> Engine:
        """The engine, to be looked at only."""
        return self.sampler.engine

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not self._closed

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End all jobs and the thread; returns when it has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs; each gets events until one is `Finished` or `Failed`, or says so of every sample.

        Raises:
            EngineError: when the thread has ended.
        """
        self._put("submit", jobs, refuse=True)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop jobs, ended or not; nothing more need come from them."""
        self._put("cancel", jobs, refuse=False)

    def _put(self, what: str, jobs: Sequence[Job], *, refuse: bool) -> None:
        with self._changed:
            if self._closed and refuse:
                raise EngineError("the engine has stopped")
            self._inbox.append((what, jobs))
            self._changed.notify()

    def _run(self) -> None:
        reason: Exception = EngineError("the server is shutting down")
        try:
            while self._take_inbox():
                self._step()
        except BaseException as error:  # whatever it is: nobody may be left waiting for an answer
            _LOG.exception("the engine has failed")
            self.error = error
            reason = EngineError(f"the engine has failed: {type(error).__name__}: {error}")
        finally:
            with self._changed:
                self._closed = True
                late = [job for what, jobs in self._inbox if what == "submit" for job in jobs]
                self._inbox.clear()
            for job in [*self._jobs.values(), *late]:
                if self.error is None:
                    self.engine.cancel(job.samples)
                self._fail(job, reason)
            self._jobs.clear()

    def _take_inbox(self) -> bool:
        """Do what the inbox says, after waiting for it if there is nothing to compute; False at the end."""
        with self._changed:
            while not (self._inbox or self._closed or self.engine.busy):
                self._changed.wait()
            if self._closed:
                return False
            taken = list(self._inbox)
            self._inbox.clear()
        for what, jobs in taken:
            for job in jobs:
                self._submit(job) if what == "submit" else self._cancel(job)
        return True

    def _submit(self, job: Job) -> None:
        try:
            job.samples = self.engine.submit(job.request)
        except ValueError as error:
            self._fail(job, error)
            return
        job.told, job.ended = [0] * len(job.samples), [False] * len(job.samples)
        self._jobs[job.request] = job

    def _cancel(self, job: Job) -> None:
        if self._jobs.pop(job.request, None) is not None:
            self.engine.cancel(job.samples)

    def _step(self) -> None:
        if not self.engine.busy:
            return
        most = _MOST_TOKENS
        if self._seconds_per_token:
            most = max(1, min(most, int(_ROUND_SECONDS / self._seconds_per_token)))
        began = time.monotonic()
        try:
            progressed = self.engine.step(most)
        except RequestError as error:
            if (job := self._jobs.pop(error.request, None)) is not None:
                self.engine.cancel(job.samples)
                self._fail(job, error)
            # The round was not in vain for the others.
            progressed = [sample for job in self._jobs.values() for sample in job.samples]
        jobs = {sample.request: job for sample in progressed if (job := self._jobs.get(sample.request)) is not None}
        tokens = max((self._report_or_fail(job) for job in jobs.values()), default=0)
        if tokens:
            self._seconds_per_token = (time.monotonic() - began) / tokens

    def _report_or_fail(self, job: Job) -> int:
        try:
            return self._report(job)
        except Exception as error:  # nothing in there concerns other jobs
            if not isinstance(error, RequestError):
                _LOG.exception("an answer could not be made")
            self._cancel(job)
            self._fail(job, RequestError(str(error), job.request))
            return 0

    def _report(self, job: Job) -> int:
        """Post what is new of a job; returns the most tokens that one of its samples has got."""
        grown = [sample.generated - told for sample, told in zip(job.samples, job.told, strict=True)]
        if job.first_token is None and any(grown):
            job.first_token = time.monotonic()
        done = [s for s, ended in zip(job.samples, job.ended, strict=True) if s.finished and not ended]
        # The engine looks at what it draws, and names one request at a time; scored prompts are looked at only here.
        if not all(math.isfinite(sum(s.logprobs)) and math.isfinite(sum(s.prompt_logprobs)) for s in done):
            raise RequestError("the model's logits are not finite numbers", job.request)
        for index, sample in enumerate(job.samples):
            if job.stream and not job.ended[index] and (grown[index] or sample.finished):
                job.mailbox.post(job, self._progress(job, sample))
            job.told[index], job.ended[index] = sample.generated, sample.finished
        if all(job.ended):
            del self._jobs[job.request]
            if not job.stream:
                job.mailbox.post(job, Finished(self.sampler.outputs(job.samples)))
            self.on_end(job)
        return max(grown)

    def _progress(self, job: Job, sample: Sample) -> Progress:
        told, params, prompt = job.told[sample.sample], sample.request.params, None
        if sample.sample == 0 and not told and params.prompt_logprobs:
            # Now, since a preemption later on drops them for a while.
            top = [None, *sample.prompt_top_logprobs] if params.top_logprobs else None
            prompt = ([None, *sample.prompt_logprobs], top)
        return Progress(
            sample.sample,
            sample.answer[told:],
            sample.logprobs[told:],
            sample.top_logprobs[told:],
            sample.finished,
            sample.stop_reason,
            sample.stop_at,
            prompt,
        )

    def _fail(self, job: Job, error: Exception) -> None:
        job.mailbox.post(job, Failed(error))
        self.on_end(job)
