"""Compile every launch of the cases and read what came out, each case in a process of its own.

A compiler that crashes takes its process with it, and one that hangs is stopped: either is one case's failure.
"""

import importlib
import multiprocessing
import os
import pkgutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from triton.runtime.cache import triton_key

from umedtrain.kernels.offline.capture import capture
from umedtrain.kernels.offline.cases import LlamaShape
from umedtrain.kernels.offline.lint import Finding, lint
from umedtrain.kernels.offline.resources import Resources, resources

CASES = "umedtrain.kernels.offline.cases"
_SECONDS = 900


@dataclass(frozen=True)
class Binary:
    """One compiled kernel, with the case and the shapes that launched it (the first case, if several did)."""

    module: str
    case: str
    shapes: tuple[str, ...]
    target: str
    kernel: str
    grid: tuple[int, int, int]
    resources: Resources
    findings: tuple[Finding, ...]

    @property
    def name(self) -> str:
        """As the budgets name it."""
        return f"{self.module}.{self.kernel}"


@dataclass(frozen=True)
class Failure:
    """A case that could not be compiled."""

    module: str
    case: str
    target: str
    reason: str

    def __str__(self) -> str:
        return f"{self.module}: case {self.case!r} on {self.target}: {self.reason}"


@dataclass(frozen=True)
class Job:
    """One case of one module, for one target, at all shapes."""

    module: str
    case: str
    target: str
    launches: dict[str, Callable[[], None]]


def find_modules(package: str = CASES) -> list[str]:
    """Names of the files in a package of cases."""
    return sorted(info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__))


def find_jobs(modules: list[str], targets: list[str], shapes: list[LlamaShape], package: str = CASES) -> list[Job]:
    """All cases of `modules`, which are imported here."""
    jobs = []
    for module in modules:
        cases_of = importlib.import_module(f"{package}.{module}").cases
        by_shape = {shape.name: cases_of(shape) for shape in shapes}
        names = dict.fromkeys(name for cases in by_shape.values() for name in cases)
        for name in names:
            launches = {shape: cases[name] for shape, cases in by_shape.items() if name in cases}
            jobs += [Job(module, name, target, launches) for target in targets]
    return jobs


def measure(jobs: list[Job], processes: int = 2) -> Iterator[list[Binary] | Failure]:
    """Run `jobs`, at most `processes` at a time, and give what each came to, in the order in which they end."""
    context = multiprocessing.get_context("fork")
    _prepare()
    waiting, running = list(reversed(jobs)), {}
    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.pop()
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed when its process has ended)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(job, sender, log.fileno()))
            process.start()
            sender.close()
            running[receiver] = job, process, log, time.monotonic() + _SECONDS
        next_end = min(end for *_, end in running.values())
        ready = wait(running, timeout=max(0.0, next_end - time.monotonic()))
        now = time.monotonic()
        late = [receiver for receiver, (*_, end) in running.items() if now >= end and receiver not in ready]
        for receiver in [*ready, *late]:
            job, process, log, _ = running.pop(receiver)
            yield _collect(job, process, receiver, log, receiver in late)


def _prepare() -> None:
    """What costs Triton two seconds at its first compilation; children inherit it, and all imports, by forking."""
    importlib.import_module("triton.experimental.gluon")
    triton_key()


def _collect(job: Job, process: Any, receiver: Connection, log: Any, late: bool) -> list[Binary] | Failure:
    try:
        if late:
            process.kill()
            return Failure(job.module, job.case, job.target, f"not compiled after {_SECONDS} seconds")
        result = receiver.recv()
        return result if isinstance(result, list) else Failure(job.module, job.case, job.target, result)
    except EOFError:
        process.join()
        log.seek(0)
        last = " ".join(log.read()[-400:].split())
        return Failure(job.module, job.case, job.target, f"the compiler died with code {process.exitcode}: {last}")
    finally:
        process.join()
        receiver.close()
        log.close()


def _run(job: Job, sender: Connection, log: int) -> None:
    """In the child: everything that is printed goes to `log`, the result to `sender`."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        result: list[Binary] | str = _compile(job)
    except Exception as error:
        result = f"{type(error).__name__}: {' '.join(str(error).split())[-600:]}"
    sender.send(result)


def _compile(job: Job) -> list[Binary]:
    launched = {}
    for shape, launch in job.launches.items():
        with capture(job.target) as launches:
            launch()
        if not launches:
            raise RuntimeError(f"at shape {shape} it launches nothing")
        for one in launches:
            launched.setdefault(one.kernel.hash, (one, []))[1].append(shape)
    return [
        Binary(
            module=job.module,
            case=job.case,
            shapes=tuple(dict.fromkeys(shapes)),
            target=job.target,
            kernel=one.name,
            grid=one.grid,
            resources=resources(one.kernel),
            findings=tuple(lint(one.kernel)),
        )
        for one, shapes in launched.values()
    ]
