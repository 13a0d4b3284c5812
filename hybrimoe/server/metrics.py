"""`GET /metrics` for Prometheus, of any process: counters that are read when asked for, never a ready-made rate.

Names are llama-server's where it has the same figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Raw = Mapping[str, Any]


class Metrics:
    """The collector of one process; `read` gives its raw snapshot (docs/observability.md)."""

    def __init__(self, read: Callable[[], Raw]) -> None:
        self._read = read
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """Raises what `read` raises."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: prometheus-client would collect to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        raw = self._read()
        yield from _requests(raw)
        if raw["instances"]:
            yield from _experts(raw["instances"])


def _experts(instances: Sequence[Raw]) -> Iterator[Metric]:
    """What the experts of all contexts did."""

    def total(name: str) -> float:
        return float(sum(sum(one.get("counters", {}).get(name, ())) for one in instances))

    states = [one.get("state", {}) for one in instances]
    hits = total("n_hits")
    yield _counter("hybrimoe:expert_queries", "Experts asked for where a cache is in use", hits + total("n_misses"))
    yield _counter("hybrimoe:expert_hits", "Of these, experts that were on an accelerator", hits)
    yield _counter("hybrimoe:expert_evictions", "Experts that lost their slot", total("n_evictions"))
    yield _counter("hybrimoe:expert_copies", "Experts sent to accelerators", total("n_copies"))
    yield _counter("hybrimoe:expert_prefetch_issued", "Of these, ahead of time", total("n_prefetched"))
    stats = [state["stats"] for state in states if state.get("stats")]
    if stats:
        used = sum(one["n_prefetch_used"] for one in stats)
        yield _counter("hybrimoe:expert_prefetch_used", "Prefetched and used", used)
        for name, text in (("useful", "were used"), ("late", "came late"), ("wasted", "were evicted unused")):
            key = f"prefetch_{name}_bytes"
            n_bytes = sum(one[key] for one in stats)
            yield _counter(f"hybrimoe:{key}", f"Bytes of prefetched experts that {text}", n_bytes)
    computed = CounterMetricFamily("hybrimoe:expert_compute", "Experts computed", labels=["device"])
    computed.add_metric(["cpu"], total("n_experts_cpu"))
    computed.add_metric(["gpu"], total("n_experts_gpu"))
    yield computed
    yield _counter("hybrimoe:h2d_bytes", "Bytes of all copies to accelerators", total("h2d_bytes"))
    yield _counter("hybrimoe:stall_seconds", "Waiting for accelerators", total("wait_us") / 1e6)
    slots = GaugeMetricFamily("hybrimoe:cache_slots", "Slots for experts", labels=["device"])
    n_slots: dict[str, int] = {}
    for state in states:
        for device in state.get("devices", ()):
            n_slots[device["name"]] = n_slots.get(device["name"], 0) + sum(device["n_slots"])
    for name, n in n_slots.items():
        slots.add_metric([name], float(n))
    yield slots
    paused = GaugeMetricFamily("hybrimoe:paused", "Not used for now, and tried again", labels=["reason"])
    for kind in sorted({pause["kind"] for state in states for pause in state.get("paused", ())}):
        paused.add_metric([kind], 1.0)
    yield paused
    given_up = GaugeMetricFamily("hybrimoe:given_up", "Asked for and not used in this process", labels=["reason"])
    for reason in sorted({state["given_up"] for state in states if state.get("given_up")}):
        given_up.add_metric([reason], 1.0)
    yield given_up


def _requests(raw: Raw) -> Iterator[Metric]:
    """Tokens and time, as the host counts them where it does so; requests of a host that has some."""
    host = raw.get("host") or {}
    answers = host.get("answers")
    if answers is None:
        passes = [one.get("passes", {}) for one in raw["instances"]]
        answers = {
            name: sum(one.get(key, 0) for one in passes)
            for name, key in (
                ("prompt_tokens", "n_prompt_tokens"),
                ("prompt_s", "prompt_s"),
                ("generated_tokens", "n_generated_tokens"),
                ("generation_s", "generation_s"),
            )
        }
    yield _counter("llamacpp:prompt_tokens", "Prompt tokens computed", answers["prompt_tokens"])
    yield _counter("llamacpp:prompt_seconds", "Time of prompts", answers["prompt_s"])
    yield _counter("llamacpp:tokens_predicted", "Tokens generated", answers["generated_tokens"])
    yield _counter("llamacpp:tokens_predicted_seconds", "Time of generation", answers["generation_s"])
    requests = host.get("requests")
    if requests is None:
        return
    yield GaugeMetricFamily("llamacpp:requests_processing", "Requests being answered", value=requests["running"])
    yield GaugeMetricFamily("llamacpp:requests_deferred", "Requests that wait", value=requests["waiting"])
    ended = CounterMetricFamily("hybrimoe:requests", "Requests for answers", labels=["end"])
    for end in ("done", "failed", "cancelled"):
        ended.add_metric([end], requests[end])
    yield ended


def _counter(name: str, text: str, value: Any) -> Metric:
    return CounterMetricFamily(name, text, value=float(value))
