"""What Prometheus reads from /metrics."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from umedtrain.sampling.engine import Engine
from umedtrain.sampling.server.worker import Job

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Counters and histograms of one server; its own registry, so that two servers in a process do not mix."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineState(engine))
        self._requests = Counter(
            "umedtrain_requests", "Requests answered.", ["endpoint", "status"], registry=self.registry
        )
        self._prompt_tokens = Counter("umedtrain_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self._new_tokens = Counter("umedtrain_generated_tokens", "Tokens generated.", registry=self.registry)
        self._request_seconds = Histogram(
            "umedtrain_request_seconds",
            "From a request's arrival to its answer's last byte.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._first_seconds = Histogram(
            "umedtrain_first_token_seconds",
            "From a prompt's arrival in the queue to its first new token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._token_seconds = Histogram(
            "umedtrain_token_seconds",
            "Mean time between the new tokens of a prompt's longest sample.",
            buckets=tuple(seconds / 100 for seconds in _SECONDS),
            registry=self.registry,
        )

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """A request has been answered, or its client has left (status 499)."""
        self._requests.labels(endpoint, str(status)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)

    def ended(self, job: Job, now: float) -> None:
        """A prompt's samples have ended; called by the engine's thread."""
        self._prompt_tokens.inc(len(job.request.ids))
        self._new_tokens.inc(sum(sample.generated for sample in job.samples))
        if job.first_token is not None:
            self._first_seconds.observe(job.first_token - job.began)
            if (longest := max(sample.generated for sample in job.samples)) > 1:
                self._token_seconds.observe((now - job.first_token) / (longest - 1))

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineState:
    """Read when asked for, from another thread than the engine's: each number is right, at slightly other moments."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers."""
        scheduler, pool = self._engine.scheduler, self._engine.pool
        for name, text, value in (
            ("samples_waiting", "Samples that wait for rows or pages.", scheduler.num_waiting),
            ("samples_running", "Samples that are being computed.", len(scheduler.running)),
            ("pages_in_use", "Pages of the key-value cache that samples hold.", pool.in_use),
            ("pages", "Pages of the key-value cache.", pool.num_pages),
        ):
            yield GaugeMetricFamily(f"umedtrain_{name}", text, value)
        for name, text, value in (
            (
                "computed_tokens",
                "Tokens that passed the model; those of known prefixes do not.",
                self._engine.computed_tokens,
            ),
            ("preemptions", "Samples that gave their pages back to others.", scheduler.preemptions),
        ):
            yield CounterMetricFamily(f"umedtrain_{name}", text, value)
