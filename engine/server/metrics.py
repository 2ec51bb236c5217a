"""Prometheus metrics, named as vLLM names them, with our prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from .async_engine import AsyncEngine
from .request_stream import Event, RequestStream

LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
COUNTS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
STATES = ("loading", "ready", "restarting", "stopping", "failed")


class Metrics:
    """Metrics of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engines: Callable[[], Mapping[str, AsyncEngine]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(engines))
        self.ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.itl = self._histogram("inter_token_latency_seconds", "Between the pieces of a stream.")
        self.tpot = self._histogram("request_time_per_output_token_seconds", "A request's mean after its first token.")
        self.e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self.prompt_length = self._histogram("request_prompt_tokens", "Tokens of a prompt.", COUNTS)
        self.length = self._histogram("request_generation_tokens", "Tokens of a continuation.", COUNTS)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.finished = self._counter("request_success", "Continuations that ended, by why.", "finished_reason")
        self.visits = count_visits(self.registry)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def stream(self, events: list[Event], last: dict[int, float]) -> None:
        """Record inter-token latencies; `last` has the time of each continuation's last piece."""
        for index, piece, now in events:
            if piece.token_ids:
                if index in last:
                    self.itl.observe(now - last[index])
                last[index] = now

    def request(self, flow: RequestStream) -> None:
        """Record a finished request."""
        for generation in flow.generations:
            leader = generation.streams[0]
            length = leader.sequence.prompt_length
            self.prompt_length.observe(length)
            self.prompt_tokens.inc(length)
            self.cache_queries.inc(length)
            self.cache_hits.inc(leader.metrics.cached_tokens)
        for stream in flow.streams:
            self._continuation(stream.metrics, stream.sequence.finish_reason or "cancelled")

    def _continuation(self, metrics: Any, reason: str) -> None:
        self.finished.labels(reason).inc()
        self.length.observe(metrics.generated_tokens)
        if metrics.first_token is not None:
            self.ttft.observe(metrics.first_token - metrics.arrival)
        if metrics.finished is not None:
            self.e2e.observe(metrics.finished - metrics.arrival)
        if rate := metrics.tokens_per_second:
            self.tpot.observe(1 / rate)

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...] = LATENCY) -> Histogram:
        return Histogram(f"warploom:{name}", says, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(f"warploom:{name}", says, labels, registry=self.registry)


VISITS = "warploom:http_requests"


def count_visits(registry: CollectorRegistry) -> Counter:
    """HTTP request counters of the middleware."""
    return Counter(VISITS, "HTTP requests.", ("method", "route", "status"), registry=registry)


def join_replicas(texts: Iterable[tuple[str, str]]) -> bytes:
    """Merge the metrics of replicas, labeled `replica`, without HTTP counters (the proxy has these)."""
    families: dict[str, Metric] = {}
    for replica, text in texts:
        for family in text_string_to_metric_families(text):
            joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                joined.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Given([family for name, family in families.items() if not name.startswith(VISITS)]))
    return generate_latest(registry)


class _Given:
    """Collector of metrics that were parsed from elsewhere."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


class _Engines:
    """Collector that reads all engines when scraped, labeled `model_name`."""

    def __init__(self, engines: Callable[[], Mapping[str, AsyncEngine]]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        engines = self._engines()
        state = GaugeMetricFamily(
            "warploom:engine_state", "1 for the state the engine is in.", labels=["model_name", "state"]
        )
        restarts = CounterMetricFamily("warploom:engine_restarts", "Engines built anew.", labels=["model_name"])
        for name, bridge in engines.items():
            restarts.add_metric([name], bridge.restarts)
            for each in STATES:
                state.add_metric([name, each], each == bridge.state)
        yield from (state, restarts)
        built = {name: bridge for name, bridge in engines.items() if bridge.llm is not None}
        for kind, metric, says, value in FIGURES:
            family = kind(f"warploom:{metric}", says, labels=["model_name"])
            for name, bridge in built.items():
                family.add_metric([name], value(bridge, bridge.llm.engine))
            yield family


# Of an engine that is built: kind, name, what it says, and where it is read.
FIGURES = (
    (
        GaugeMetricFamily,
        "num_requests_running",
        "Continuations in the batch.",
        lambda _, engine: len(engine.scheduler.running),
    ),
    (
        GaugeMetricFamily,
        "num_requests_waiting",
        "Continuations that wait for a place.",
        lambda bridge, engine: max(bridge.open - len(engine.scheduler.running), 0),
    ),
    (
        GaugeMetricFamily,
        "kv_cache_usage_perc",
        "Part of the cache's pages in use, 0 to 1.",
        lambda _, engine: 1 - engine.scheduler.pool.num_free / engine.scheduler.pool.num_pages,
    ),
    (
        CounterMetricFamily,
        "num_preemptions",
        "Sequences that gave up pages.",
        lambda _, engine: engine.scheduler.preemptions,
    ),
    (CounterMetricFamily, "generation_tokens", "Tokens generated.", lambda _, engine: engine.generated_tokens),
    (
        CounterMetricFamily,
        "spec_decode_num_draft_tokens",
        "Tokens guessed ahead.",
        lambda _, engine: engine.scheduler.drafted,
    ),
    (
        CounterMetricFamily,
        "spec_decode_num_accepted_tokens",
        "Guesses that were right.",
        lambda _, engine: engine.scheduler.accepted_drafts,
    ),
    (CounterMetricFamily, "engine_failures", "Steps that failed.", lambda _, engine: engine.failures),
)
