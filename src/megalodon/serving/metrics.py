"""Prometheus metrics: what the engine counts, read when they are asked for, and latencies."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megalodon.inference.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The registry of one server and its latency histograms."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(engine))
        name = "megalodon_"
        self.first_token = Histogram(
            f"{name}time_to_first_token_seconds",
            "From submission to a choice's first text",
            buckets=SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            f"{name}time_per_token_seconds", "Between tokens of a choice", buckets=SECONDS, registry=registry
        )
        self.requests = Counter(f"{name}http_requests", "Answers", ["route", "status"], registry=registry)
        self.refused = Counter(f"{name}refused", "Requests refused by a limit", ["limit"], registry=registry)
        self.prompt_tokens = Counter(f"{name}prompt_tokens", "Tokens before generation", registry=registry)
        self.cached_tokens = Counter(f"{name}cached_tokens", "Of these, not read again", registry=registry)
        self.completion_tokens = Counter(f"{name}completion_tokens", "Tokens of completed requests", registry=registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, counters = self._engine, self._engine.counters
        gauges = {
            "queue_length": ("Requests that have not begun", engine.waiting),
            "reading": ("Requests whose text is being read", counters.reading),
            "generating": ("Slots in use", counters.generating),
            "slots": ("Slots that there are", engine.slots),
            "batch_occupancy": ("Share of the slots in use", counters.generating / engine.slots),
            "state_bytes": ("Memory of all slots", engine.decoder.nbytes),
        }
        totals = {
            "steps": ("Steps of the engine", counters.steps),
            "step_seconds": ("Seconds spent in steps", counters.step_seconds),
            "read_tokens": ("Tokens read by the model", counters.read_tokens),
            "generated_tokens": ("Tokens generated", counters.generated_tokens),
            "failures": ("Requests that failed", counters.failures),
        }
        if engine.prefixes is not None:
            cache = engine.prefixes.counters
            gauges["prefix_cache_bytes"] = ("States in memory", cache.memory_bytes)
            gauges["prefix_cache_disk_bytes"] = ("States on disk", cache.disk_bytes)
            gauges["prefix_cache_entries"] = ("States in memory", cache.memory_entries)
            totals["prefix_cache_hits"] = ("Texts whose beginning was known", cache.hits)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"megalodon_{name}", text, value)
        for name, (text, value) in totals.items():
            yield CounterMetricFamily(f"megalodon_{name}", text, value)
