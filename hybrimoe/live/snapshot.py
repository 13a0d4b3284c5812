"""Snapshots of a running engine: one JSON-able object, made from counters while the engine computes.

Reading takes the dispatch's lock for about as long as one line of its report takes to write, and only while somebody
watches; a snapshot is shared by all who ask within `_SHARED_S`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.engine import Engine

__all__ = ["SCHEMA_VERSION", "LiveSampler"]

SCHEMA_VERSION = 1
_SHARED_S = 0.2
# Rates are over at most this time, and over at least the second one where there is so much history.
_WINDOW_S, _LEAST_S = 3.0, 0.5
_N_EVENTS = 12


@dataclass(frozen=True)
class _Sums:
    """What only grows, summed over layers; `at_s` is the monotonic clock."""

    at_s: float
    n_prompt: int
    n_generated: int
    prompt_s: float
    generation_s: float
    n_hits: int
    n_misses: int
    n_late: int
    n_evictions: int
    n_copies: int
    n_prefetched: int
    n_experts_cpu: int
    n_experts_gpu: int
    h2d_bytes: int
    router_us: float
    experts_us: float
    wait_us: float
    link_busy_us: float


class LiveSampler:
    """Makes snapshots of one engine. Thread-safe.

    Args:
        engine: a loaded engine, or None while it is loaded (set `engine` then).
        command: what runs it: 'serve', 'chat' or 'run'.
        more: what else belongs into every snapshot, such as the number of requests.
    """

    def __init__(
        self, engine: Engine | None, command: str, more: Callable[[], dict[str, Any]] = dict, *, model: str = ""
    ) -> None:
        self.engine = engine
        self._command = command
        self._more = more
        self._model = model
        self._started_s = time.monotonic()
        self._lock = threading.Lock()
        self._history: deque[_Sums] = deque(maxlen=64)
        self._latest: dict[str, Any] | None = None
        self._latest_s = 0.0
        self._last_event = 0
        self._events: deque[tuple[int, str]] = deque(maxlen=_N_EVENTS)

    def snapshot(self) -> dict[str, Any]:
        """The state of now; rates are None until there were two snapshots."""
        with self._lock:
            now = time.monotonic()
            if self._latest is None or now - self._latest_s >= _SHARED_S:
                self._latest, self._latest_s = self._make(now), now
            return self._latest

    def _make(self, now_s: float) -> dict[str, Any]:
        head = {
            "version": SCHEMA_VERSION,
            "pid": os.getpid(),
            "command": self._command,
            "uptime_s": round(now_s - self._started_s, 1),
            **self._more(),
        }
        engine = self.engine
        if engine is None:
            return {**head, "phase": "loading", "model": {"name": self._model}}
        state = engine.expert_state()
        sums = self._sums(engine, state, now_s)
        while self._history and now_s - self._history[0].at_s > _WINDOW_S and len(self._history) > 1:
            self._history.popleft()
        before = self._history[0] if self._history else None
        if not self._history or now_s - self._history[-1].at_s >= _SHARED_S:
            self._history.append(sums)
        if before is not None and now_s - before.at_s < _LEAST_S:
            before = None
        info = engine.info
        return {
            **head,
            "phase": engine.phase,
            "model": {
                "name": info.name,
                "architecture": info.architecture,
                "file_type": info.file_type,
                "n_layers": info.n_layers,
                "n_moe_layers": len(info.moe_layer_indices),
                "n_experts": info.n_experts,
                "top_k": info.n_experts_used,
            },
            "context": {"n_ctx": engine.context_size, "n_tokens": int(engine.n_tokens)},
            "plugin": engine.plugin is not None,
            "totals": _totals(sums),
            "rates": None if before is None else _rates(before, sums, state),
            "devices": _devices(engine, state),
            "guard": state.get("guard"),
            "paused": state.get("paused", []),
            "given_up": state.get("given_up"),
            "reproducible": state.get("reproducible"),
            "costs": {"cpu_expert_us": state.get("cpu_expert_us")} if state.get("devices") else None,
            "events": self._new_events(engine),
            "experts": _expert_map(engine),
        }

    def _sums(self, engine: Engine, state: dict[str, Any], now_s: float) -> _Sums:
        counted = engine.counted()
        values: dict[str, float] = {
            "n_prompt": engine.n_prompt_tokens,
            "n_generated": engine.n_generated,
            "prompt_s": engine.prompt_s,
            "generation_s": engine.generation_s,
            "link_busy_us": sum(device.get("copy_busy_us", 0.0) for device in state.get("devices", ())),
        }
        for field in fields(_Sums):
            if field.name != "at_s" and field.name not in values:
                values[field.name] = counted[field.name]
        return _Sums(at_s=now_s, **values)  # type: ignore[arg-type]

    def _new_events(self, engine: Engine) -> list[dict[str, Any]]:
        for number, line in engine.expert_events(self._last_event):
            self._events.append((number, line))
            self._last_event = number
        return [{"number": number, "text": line} for number, line in self._events]


def _totals(sums: _Sums) -> dict[str, Any]:
    queries = sums.n_hits + sums.n_misses
    n_experts = sums.n_experts_cpu + sums.n_experts_gpu
    return {
        "prompt_tokens": sums.n_prompt,
        "generated_tokens": sums.n_generated,
        "prompt_per_s": sums.n_prompt / sums.prompt_s if sums.prompt_s > 0 else None,
        "generation_per_s": sums.n_generated / sums.generation_s if sums.generation_s > 0 else None,
        "hits": sums.n_hits,
        "misses": sums.n_misses,
        "hit_rate": sums.n_hits / queries if queries else None,
        "late": sums.n_late,
        "evictions": sums.n_evictions,
        "copies": sums.n_copies,
        "prefetched": sums.n_prefetched,
        "experts_cpu": sums.n_experts_cpu,
        "experts_gpu": sums.n_experts_gpu,
        "gpu_share": sums.n_experts_gpu / n_experts if n_experts else None,
        "h2d_bytes": sums.h2d_bytes,
    }


def _rates(before: _Sums, now: _Sums, state: dict[str, Any]) -> dict[str, Any]:
    """What happened since `before`, per second and as shares of the wall time.

    Of the wall time, `busy.cpu` was spent in routers and experts on the CPU, `busy.wait` waiting for accelerators after
    that, and the rest outside of MoE blocks or idle. `busy.gpu` is estimated: experts computed there times what one
    takes; `busy.link` is how long copies were under way on the busiest link.
    """
    span_s = now.at_s - before.at_s

    def grown(name: str) -> float:
        return float(getattr(now, name) - getattr(before, name))

    def share(us: float) -> float:
        return min(1.0, max(0.0, us / (span_s * 1e6)))

    queries = grown("n_hits") + grown("n_misses")
    n_experts = grown("n_experts_cpu") + grown("n_experts_gpu")
    devices = state.get("devices", ())
    gpu_us = [d["gpu_expert_us"] for d in devices if d.get("gpu_expert_us")]
    prompt_s, generation_s = grown("prompt_s"), grown("generation_s")
    return {
        "window_s": round(span_s, 2),
        "prompt_per_s": grown("n_prompt") / prompt_s if prompt_s > 0 else 0.0,
        "generation_per_s": grown("n_generated") / generation_s if generation_s > 0 else 0.0,
        "hit_rate": grown("n_hits") / queries if queries else None,
        "gpu_share": grown("n_experts_gpu") / n_experts if n_experts else None,
        "experts_per_s": n_experts / span_s,
        "link_bytes_per_s": grown("h2d_bytes") / span_s,
        "evictions_per_s": grown("n_evictions") / span_s,
        "busy": {
            "cpu": share(grown("router_us") + grown("experts_us")),
            "wait": share(grown("wait_us")),
            "gpu": share(grown("n_experts_gpu") * min(gpu_us) / len(gpu_us)) if gpu_us else None,
            "link": share(grown("link_busy_us") / len(devices)) if devices else None,
        },
    }


def _devices(engine: Engine, state: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for device in state.get("devices", ()):
        found.append(
            {
                "name": device["name"],
                "description": device.get("description", ""),
                "n_slots": sum(device["n_slots"]),
                "cache_bytes": device["cache_bytes"],
                "free_bytes": device["free_bytes"],
                "total_bytes": device["total_bytes"],
                "suspended": device.get("suspended", False),
                "gpu_expert_us": device.get("gpu_expert_us"),
                "copy_expert_us": device.get("copy_expert_us"),
            }
        )
    return found


def _expert_map(engine: Engine) -> dict[str, Any]:
    """Layer by layer: shares of recent routing (None when they are not counted), and the accelerator of each expert."""
    layers = [layer for layer in engine.info.moe_layers if not layer.predicts_ahead]
    on = [[] if engine.plugin is None else engine.residency(layer.index) for layer in layers]
    heat = None
    if engine.heat is not None:
        rows = {layer.index: row for layer, row in zip(engine.info.moe_layers, engine.heat.matrix(), strict=True)}
        heat = [rows[layer.index] for layer in layers]
    return {"layers": [layer.index for layer in layers], "heat": heat, "on": on}
