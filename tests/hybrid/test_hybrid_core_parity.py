"""The engine's decisions are those of the policy core fed with the same routing: hits, misses, evictions, every plan.

Chosen so that the real clock decides nothing: given costs that stay, no prefetch, and every miss a demanded copy, which
the step waits for, so that no copy is under way when the next layer is planned. Policies that need the router's scores
are left out: with ids from a trace, the scores are still those of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import route_trace
from hybrid_checks import FORCED, ask_both, check_used, settings_of, total
from sides import Side

from hybrimoe.native.core import CPU, Costs, Kind, SlotState, policies
from hybrimoe.native.core_runtime import Runtime

N_LAYERS, N_EXPERT, TOP_K = 2, 16, 4  # the tiny qwen3moe
N_STEPS = 60
EVICTION = [p.name for p in policies(Kind.EVICTION) if not p.oracle and not p.needs_scores and p.name != "static"]


@pytest.fixture(scope="module")
def skewed() -> np.ndarray[Any, Any]:
    """Routing with favourites that change, int32 [N_STEPS, N_LAYERS, TOP_K]."""
    rng = np.random.default_rng(7)
    ids = np.empty((N_STEPS, N_LAYERS, TOP_K), np.int32)
    for step in range(N_STEPS):
        for layer in range(N_LAYERS):
            weights = 1.0 / (1 + (np.arange(N_EXPERT) + 5 * layer + step // 20) % N_EXPERT)
            ids[step, layer] = rng.choice(N_EXPERT, TOP_K, replace=False, p=weights / weights.sum())
    return ids


def costs_of(n_devices: int) -> Costs:
    # Bytes cancel out: a copy takes copy_us whatever an expert weighs.
    return Costs.simple(N_LAYERS, expert_bytes=1e4, n_devices=n_devices, **FORCED)


class Core:
    """The policy core alone, told what the engine's dispatch is told."""

    def __init__(self, n_slots: Sequence[int], **policy_names: str) -> None:
        n_devices = len(n_slots)
        slots = [[n] * N_LAYERS for n in n_slots]
        self.runtime = Runtime(costs_of(n_devices), N_EXPERT, TOP_K, slots, **policy_names)
        self.now_us = 0.0
        self.pending: list[int] = []
        for layer in range(N_LAYERS):
            experts = iter(range(N_EXPERT))
            for device, n in enumerate(n_slots):
                for _ in range(n):
                    self.runtime.warm(layer, next(experts), device)

    def step(self, ids: np.ndarray[Any, Any]) -> None:
        """One pass; ids [n_tokens, N_LAYERS, TOP_K]."""
        for layer in range(N_LAYERS):
            self.now_us += 1000.0
            for transfer in self.pending:  # the engine, too, hears of them when it plans again
                self.runtime.on_complete(transfer, self.now_us)
            made = self.runtime.on_layer(layer, ids[:, layer], self.now_us, scratch=len(ids) > 1)
            self.pending = [transfer.id for transfer in made.transfers]

    def facts(self) -> dict[str, Any]:
        stats = self.runtime.stats()
        kept = {name: stats[name] for name in ("n_events", "n_hits", "n_misses", "n_late", "n_cpu", "n_gpu")}
        demanded, streamed, admitted, prefetched = stats["n_transfers"]
        return {
            **kept,
            "n_demanded": demanded,
            "n_streamed": streamed,
            "n_admitted": admitted,
            "n_prefetched": prefetched,
            "n_evictions": self.runtime.cache_stats()["n_evictions"],
            "decision_hash": str(stats["decision_hash"]),
        }


def residency(core: Core) -> dict[str, list[int]]:
    def device_of(layer: int, expert: int) -> int:
        state, device, _ = core.runtime.lookup(layer, expert)
        return device if state == SlotState.RESIDENT else CPU

    return {str(layer): [device_of(layer, expert) for expert in range(N_EXPERT)] for layer in range(N_LAYERS)}


CASES = [(eviction, "gpu-only", n_slots) for eviction in EVICTION for n_slots in ([4], [3, 3])]
CASES += [("lru", schedule, n_slots) for schedule in ("two-threshold", "hybrimoe") for n_slots in ([7], [3, 3])]


@pytest.mark.parametrize(("eviction", "schedule", "n_slots"), CASES)
def test_decode(
    hybrid: Side,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    skewed: np.ndarray[Any, Any],
    eviction: str,
    schedule: str,
    n_slots: list[int],
) -> None:
    trace = tmp_path / "trace.raw"
    route_trace.write_raw(trace, skewed)
    settings = settings_of(
        devices=["CPU"] * len(n_slots),
        expert_cache=sum(n_slots),
        cache_policy=eviction,
        schedule=schedule,
        route_trace=str(trace),
    )
    # One pass learns the layers, with the router's own experts; the trace begins with the second.
    got = hybrid.ask("logits", tiny_model("qwen3moe", "Q4_0"), prefill=[1], decode=N_STEPS, settings=settings)
    check_used(got)
    core = Core(n_slots, eviction=eviction, schedule=schedule)
    for step in range(N_STEPS):
        core.step(skewed[step : step + 1])
    stats = got.facts["state"]["stats"]
    expected = core.facts()
    assert {name: stats[name] for name in expected} == expected
    assert got.facts["residency"] == residency(core)
    for name in ("n_hits", "n_misses", "n_late", "n_evictions"):
        assert total(got, name) == expected[name]
    assert total(got, "n_copies") == expected["n_demanded"] + expected["n_streamed"] + expected["n_admitted"]
    assert total(got, "n_experts_gpu") == expected["n_gpu"]


def test_the_trace_is_what_is_computed(
    plain: Side, hybrid: Side, tiny_model: Callable[..., Path], tmp_path: Path, skewed: np.ndarray[Any, Any]
) -> None:
    """The same trace without an accelerator gives the same logits, and other ones than the model's own routing."""
    trace = tmp_path / "trace.raw"
    route_trace.write_raw(trace, skewed)
    path = tiny_model("qwen3moe", "Q4_0")
    cpu, routed = ask_both(plain, hybrid, path, settings_of(expert_cache=0, route_trace=str(trace)))
    gpu, same = ask_both(plain, hybrid, path, settings_of(expert_cache=4, route_trace=str(trace)))
    assert routed.nmse > 1e-6
    assert routed.nmse == same.nmse
    assert all(np.array_equal(cpu.arrays[name], gpu.arrays[name]) for name in cpu.arrays)
    check_used(gpu)
    assert total(cpu, "n_experts_gpu") == 0


@pytest.mark.parametrize("eviction", ["lru", "lfu"])
def test_prompts_between(
    hybrid: Side, tiny_model: Callable[..., Path], tmp_path: Path, skewed: np.ndarray[Any, Any], eviction: str
) -> None:
    """Prompts stream experts through scratch slots; the decode steps after them find what they left."""
    trace = tmp_path / "trace.raw"
    route_trace.write_raw(trace, skewed)
    settings = settings_of(expert_cache=5, cache_policy=eviction, schedule="gpu-only", route_trace=str(trace))
    # Passes: one that learns, 8 single tokens, a prompt of 11 (a token reads a line of the trace), 8 single tokens.
    got = hybrid.ask("logits", tiny_model("qwen3moe", "Q4_0"), prefill=[1, 11], decode=8, settings=settings)
    check_used(got)
    core = Core([5], eviction=eviction, schedule="gpu-only")
    at = 0
    for n_tokens in [1] * 8 + [11] + [1] * 8:
        if at == 8 + 11:
            core.runtime.begin_prompt()
        core.step(skewed[at : at + n_tokens])
        at += n_tokens
    expected = core.facts()
    assert expected["n_streamed"] > 0
    assert {name: got.facts["state"]["stats"][name] for name in expected} == expected
