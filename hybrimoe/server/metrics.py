"""`GET /metrics` for Prometheus: counters that are read when asked for, never a ready-made rate.

Names are llama-server's where it has the same figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from hybrimoe.server.worker import Worker

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The collector of one server."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: prometheus-client would collect to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        engine = self._worker.engine
        if engine is None:
            return
        counters = engine.counters()
        state = engine.expert_state()

        def total(name: str) -> float:
            return float(sum(getattr(c, name) for c in counters))

        hits = total("n_hits")
        yield _counter("hybrimoe:expert_queries", "Experts asked for where a cache is in use", hits + total("n_misses"))
        yield _counter("hybrimoe:expert_hits", "Of these, experts that were on an accelerator", hits)
        yield _counter("hybrimoe:expert_evictions", "Experts that lost their slot", total("n_evictions"))
        yield _counter("hybrimoe:expert_copies", "Experts sent to accelerators", total("n_copies"))
        yield _counter("hybrimoe:expert_prefetch_issued", "Of these, ahead of time", total("n_prefetched"))
        stats = state.get("stats") or {}
        if "n_prefetch_used" in stats:
            yield _counter("hybrimoe:expert_prefetch_used", "Prefetched and used", stats["n_prefetch_used"])
        for name, text in (("useful", "were used"), ("late", "came late"), ("wasted", "were evicted unused")):
            key = f"prefetch_{name}_bytes"
            if key in stats:
                yield _counter(f"hybrimoe:{key}", f"Bytes of prefetched experts that {text}", stats[key])
        computed = CounterMetricFamily("hybrimoe:expert_compute", "Experts computed", labels=["device"])
        computed.add_metric(["cpu"], total("n_experts_cpu"))
        computed.add_metric(["gpu"], total("n_experts_gpu"))
        yield computed
        yield _counter("hybrimoe:h2d_bytes", "Bytes of all copies to accelerators", total("h2d_bytes"))
        yield _counter("hybrimoe:stall_seconds", "Waiting for accelerators", total("wait_us") / 1e6)
        slots = GaugeMetricFamily("hybrimoe:cache_slots", "Slots for experts", labels=["device"])
        for device in state.get("devices", ()):
            slots.add_metric([device["name"]], float(sum(device["n_slots"])))
        yield slots
        paused = GaugeMetricFamily("hybrimoe:paused", "Not used for now, and tried again", labels=["reason"])
        for kind in sorted({pause["kind"] for pause in state.get("paused", ())}):
            paused.add_metric([kind], 1.0)
        yield paused

    def _requests(self) -> Iterator[Metric]:
        worker, totals = self._worker, self._worker.totals
        yield _counter("llamacpp:prompt_tokens", "Prompt tokens computed", totals.n_prompt)
        yield _counter("llamacpp:prompt_seconds", "Time of prompts", totals.prompt_s)
        yield _counter("llamacpp:tokens_predicted", "Tokens generated", totals.n_generated)
        yield _counter("llamacpp:tokens_predicted_seconds", "Time of generation", totals.generation_s)
        yield GaugeMetricFamily("llamacpp:requests_processing", "Requests being answered", value=int(worker.is_busy))
        yield GaugeMetricFamily("llamacpp:requests_deferred", "Requests that wait", value=worker.n_waiting)
        ended = CounterMetricFamily("hybrimoe:requests", "Requests for answers", labels=["end"])
        for end, n in (("done", totals.n_done), ("failed", totals.n_failed), ("cancelled", totals.n_cancelled)):
            ended.add_metric([end], n)
        yield ended


def _counter(name: str, text: str, value: Any) -> Metric:
    return CounterMetricFamily(name, text, value=float(value))
