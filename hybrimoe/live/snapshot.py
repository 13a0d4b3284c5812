"""What people who watch a process get to see: one JSON-able object, made from what the plug-in's observer says.

`live_snapshot` is a pure function of two raw snapshots (docs/observability.md); `LiveSampler` remembers the earlier
ones. Where the raw ones come from, this process or a socket of another one, makes no difference.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA_VERSION", "LiveSampler", "live_snapshot", "main_instance"]

SCHEMA_VERSION = 1
_SHARED_S = 0.2
# Rates are over at most this time, and over at least the second one where there is so much history.
_WINDOW_S, _LEAST_S = 3.0, 0.5
_N_EVENTS = 12
_HEAVY = ("heat", "residency", "events")

Raw = Mapping[str, Any]


class LiveSampler:
    """Makes snapshots of one process. Thread-safe.

    `read` gives a raw snapshot with the events after a number; what it raises reaches those who ask.
    """

    def __init__(self, read: Callable[[int], Raw]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._history: deque[Raw] = deque(maxlen=64)
        self._latest: dict[str, Any] | None = None
        self._latest_s = 0.0
        self._instance = self._last_event = 0
        self._events: deque[dict[str, Any]] = deque(maxlen=_N_EVENTS)

    def snapshot(self) -> dict[str, Any]:
        """The state of now; rates are None until there were two snapshots. All who ask within 0.2 s share one."""
        with self._lock:
            now = time.monotonic()
            if self._latest is None or now - self._latest_s >= _SHARED_S:
                self._latest, self._latest_s = self._make(), now
            return self._latest

    def _make(self) -> dict[str, Any]:
        raw = self._read(self._last_event)
        instance = main_instance(raw)
        if instance.get("id", 0) != self._instance:  # numbers of events begin anew
            self._instance = instance.get("id", 0)
            self._events.clear()
            if self._last_event:
                self._last_event = 0
                raw = self._read(0)
                instance = main_instance(raw)
        for number, text in instance.get("events", ()):
            self._events.append({"number": number, "text": text})
            self._last_event = number
        while len(self._history) > 1 and raw["at_s"] - self._history[0]["at_s"] > _WINDOW_S:
            self._history.popleft()
        before = self._history[0] if self._history else None
        if before is None or raw["at_s"] - self._history[-1]["at_s"] >= _SHARED_S:
            self._history.append(_light(raw))
        if before is not None and raw["at_s"] - before["at_s"] < _LEAST_S:
            before = None
        return {**live_snapshot(raw, before), "events": list(self._events)}


def _light(raw: Raw) -> Raw:
    """What rates need of a raw snapshot."""
    instances = [{k: v for k, v in one.items() if k not in _HEAVY} for one in raw["instances"]]
    return {**raw, "instances": instances}


def main_instance(raw: Raw) -> dict[str, Any]:
    """The instance that is shown: the host's own, else the one that has computed most; empty when there is none."""
    host = raw.get("host") or {}
    if "instance" in host:
        return next((one for one in raw["instances"] if one["id"] == host["instance"]), {})

    def work(one: Mapping[str, Any]) -> tuple[int, int]:
        passes = one.get("passes", {})
        return passes.get("n_prompt_tokens", 0) + passes.get("n_generated_tokens", 0), one["id"]

    return max(raw["instances"], key=work, default={})


def live_snapshot(now: Raw, before: Raw | None) -> dict[str, Any]:
    """What is shown of `now`; rates since `before`, an earlier one of the same process, or None."""
    host = now.get("host") or {}
    instance, state = main_instance(now), main_instance(now).get("state", {})
    head = {
        "version": SCHEMA_VERSION,
        "pid": now["pid"],
        "command": host.get("command") or now.get("program", ""),
        "uptime_s": round(now["uptime_s"], 1),
        **{name: host[name] for name in ("url", "requests") if name in host},
    }
    phase = host.get("phase") or ("loading" if not now["instances"] else None)
    if phase == "loading":
        return {**head, "phase": phase, "model": {"name": _model_name(now), **host.get("model", {})}}
    sums = _sums(now, instance)
    earlier = None
    span_s = 0.0 if before is None else now["at_s"] - before["at_s"]
    if before is not None and span_s > 0 and main_instance(before).get("id") == instance.get("id"):
        earlier = _sums(before, main_instance(before))
    return {
        **head,
        "phase": phase or _phase(sums, earlier),
        "model": _model(now, instance),
        "context": host.get("context"),
        "plugin": host.get("plugin", True),
        "totals": _totals(sums),
        "rates": None if earlier is None else _rates(earlier, sums, span_s, state),
        "devices": _devices(state),
        "guard": state.get("guard"),
        "paused": state.get("paused", []),
        "given_up": state.get("given_up"),
        "reproducible": state.get("reproducible"),
        "costs": {"cpu_expert_us": state.get("cpu_expert_us")} if state.get("devices") else None,
        "events": [{"number": number, "text": text} for number, text in instance.get("events", ())],
        "experts": _expert_map(instance),
    }


def _model_name(raw: Raw) -> str:
    file = raw.get("model_file")
    return Path(file).stem if file else ""


def _model(raw: Raw, instance: Mapping[str, Any]) -> dict[str, Any]:
    """What the host says of its model, else what its blocks have shown."""
    counters = instance.get("counters", {})
    known = {
        "name": _model_name(raw),
        "architecture": None,
        "file_type": None,
        "n_layers": None,
        "n_moe_layers": len(counters.get("layer", ())),
        "n_experts": max(counters.get("n_experts", ()), default=0),
        "top_k": min(counters.get("top_k", ()), default=0),
    }
    return {**known, **(raw.get("host") or {}).get("model", {})}


def _sums(raw: Raw, instance: Mapping[str, Any]) -> dict[str, float]:
    """What only grows: counters summed over layers, tokens and seconds, how long copies were under way."""
    sums: dict[str, float] = {
        name: sum(column)
        for name, column in instance.get("counters", {}).items()
        if name not in ("layer", "n_experts", "top_k")
    }
    passes = instance.get("passes", {})
    tokens = (raw.get("host") or {}).get("tokens") or {
        "prompt": passes.get("n_prompt_tokens", 0),
        "generated": passes.get("n_generated_tokens", 0),
        "prompt_s": passes.get("prompt_s", 0.0),
        "generation_s": passes.get("generation_s", 0.0),
    }
    sums |= {f"tokens_{name}": value for name, value in tokens.items()}
    devices = instance.get("state", {}).get("devices", ())
    sums["link_busy_us"] = sum(device.get("copy_busy_us", 0.0) for device in devices)
    return sums


def _phase(now: Mapping[str, float], before: Mapping[str, float] | None) -> str:
    """What a host that does not say so has been doing."""
    if before is None:
        return "idle"
    if now["tokens_generated"] > before["tokens_generated"]:
        return "generating"
    return "prompt" if now["tokens_prompt"] > before["tokens_prompt"] else "idle"


def _totals(sums: Mapping[str, float]) -> dict[str, Any]:
    def total(name: str) -> float:
        return sums.get(name, 0)

    queries = total("n_hits") + total("n_misses")
    n_experts = total("n_experts_cpu") + total("n_experts_gpu")
    prompt_s, generation_s = sums["tokens_prompt_s"], sums["tokens_generation_s"]
    return {
        "prompt_tokens": sums["tokens_prompt"],
        "generated_tokens": sums["tokens_generated"],
        "prompt_per_s": sums["tokens_prompt"] / prompt_s if prompt_s > 0 else None,
        "generation_per_s": sums["tokens_generated"] / generation_s if generation_s > 0 else None,
        "hits": total("n_hits"),
        "misses": total("n_misses"),
        "hit_rate": total("n_hits") / queries if queries else None,
        "late": total("n_late"),
        "evictions": total("n_evictions"),
        "copies": total("n_copies"),
        "prefetched": total("n_prefetched"),
        "experts_cpu": total("n_experts_cpu"),
        "experts_gpu": total("n_experts_gpu"),
        "gpu_share": total("n_experts_gpu") / n_experts if n_experts else None,
        "h2d_bytes": total("h2d_bytes"),
    }


def _rates(
    before: Mapping[str, float], now: Mapping[str, float], span_s: float, state: Mapping[str, Any]
) -> dict[str, Any]:
    """What happened since `before`, per second and as shares of the wall time.

    Of the wall time, `busy.cpu` was spent in routers and experts on the CPU, `busy.wait` waiting for accelerators after
    that, and the rest outside of MoE blocks or idle. `busy.gpu` is estimated: experts computed there times what one
    takes; `busy.link` is how long copies were under way on the busiest link.
    """

    def grown(name: str) -> float:
        return float(now.get(name, 0) - before.get(name, 0))

    def share(us: float) -> float:
        return min(1.0, max(0.0, us / (span_s * 1e6)))

    queries = grown("n_hits") + grown("n_misses")
    n_experts = grown("n_experts_cpu") + grown("n_experts_gpu")
    devices = state.get("devices", ())
    gpu_us = [d["gpu_expert_us"] for d in devices if d.get("gpu_expert_us")]
    prompt_s, generation_s = grown("tokens_prompt_s"), grown("tokens_generation_s")
    return {
        "window_s": round(span_s, 2),
        "prompt_per_s": grown("tokens_prompt") / prompt_s if prompt_s > 0 else 0.0,
        "generation_per_s": grown("tokens_generated") / generation_s if generation_s > 0 else 0.0,
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


def _devices(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
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
        for device in state.get("devices", ())
    ]


def _expert_map(instance: Mapping[str, Any]) -> dict[str, Any]:
    """Layer by layer: shares of recent routing (None when they are not counted), and the accelerator of each expert."""
    layers = instance.get("state", {}).get("layers", [])
    counted = instance.get("heat")
    heat = None
    if counted is not None:
        heat = []
        for i, layer in enumerate(layers):
            row = counted[i] if i < len(counted) else []
            heat.append((row + [0.0] * layer["n_experts"])[: layer["n_experts"]])
    on = instance.get("residency") or [[] for _ in layers]
    return {"layers": [layer["layer"] for layer in layers], "heat": heat, "on": on}
