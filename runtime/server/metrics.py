"""What Prometheus reads at /metrics: queue, batch, pages, tokens, and how long tokens take."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qcompiler.runtime.service import Service

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics(Collector):
    """Observes a service and reads its numbers when asked; a registry of its own, for tests and embedding."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._service: Service | None = None
        self._first = Histogram(
            "qcompiler_time_to_first_token_seconds",
            "From submission to the first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._next = Histogram(
            "qcompiler_inter_token_seconds",
            "Between two tokens of a sequence.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._ends = Counter(
            "qcompiler_sequences_total", "Sequences that ended.", ["reason"], registry=self.registry
        )
        self._responses = Counter(
            "qcompiler_http_responses_total", "Responses by status.", ["status"], registry=self.registry
        )

    def watch(self, service: Service) -> None:
        """Read this service's numbers from now on."""
        self._service = service
        self.registry.register(self)

    def first_token(self, seconds: float) -> None:
        """See `Observer`."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """See `Observer`."""
        self._next.observe(seconds)

    def finished(self, reason: str) -> None:
        """See `Observer`."""
        self._ends.labels(reason).inc()

    def response(self, status: int) -> None:
        """Count a response of the API."""
        self._responses.labels(str(status)).inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Numbers of the service at this moment."""
        if self._service is None:
            return
        stats = self._service.stats()
        counts = stats.counters
        for name, text, value in (
            ("sequences_waiting", "Sequences in the queue.", stats.waiting),
            ("sequences_running", "Sequences in the batch.", stats.running),
            ("cache_pages", "Pages of the KV cache.", stats.pages_total),
            ("cache_pages_held", "Pages that sequences hold.", stats.pages_held),
            ("cache_pages_reusable", "Pages kept for prompts that begin alike.", stats.pages_cached),
            ("ready", "Whether requests are taken.", int(self._service.ready)),
        ):
            yield GaugeMetricFamily(f"qcompiler_{name}", text, value)
        for name, text, value in (
            ("steps", "Steps computed.", counts.steps),
            ("prompt_tokens", "Prompt tokens, cached ones included.", counts.prompt_tokens),
            ("cached_tokens", "Prompt tokens found in the cache.", counts.cached_tokens),
            ("generated_tokens", "Tokens generated.", counts.generated_tokens),
            ("preemptions", "Sequences that gave their pages up.", counts.preemptions),
            ("failures", "Sequences that failed in a step.", counts.failures),
        ):
            yield CounterMetricFamily(f"qcompiler_{name}", text, value)
