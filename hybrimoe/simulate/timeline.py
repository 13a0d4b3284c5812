"""What one layer of a simulated run does when, and which experts stay resident: material for pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybrimoe.native.core import CPU, Cache, CoreError, SlotState
from hybrimoe.native.core_runtime import Runtime, Transfer
from hybrimoe.simulate.replay import machine_costs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hybrimoe.simulate.grid import Point
    from hybrimoe.trace.format import TraceFile

__all__ = ["Bar", "layer_timeline", "residency"]

_WARM_TOKENS = 64
_RESIDENCY_TOKENS = 400


@dataclass(frozen=True)
class Bar:
    """An expert on a lane, in microseconds from the start of its layer."""

    lane: str  # CPU, GPU 0, link 0
    expert: int
    start_us: float
    end_us: float


def layer_timeline(point: Point, trace: TraceFile) -> tuple[int, int, list[Bar]]:
    """(token, layer, bars) of the layer of a warm token with the most copies and the longest plan.

    The runtime is driven through the first tokens of the trace, one at a time.
    """
    assert point.machine is not None
    costs, known_gap_us = machine_costs(point.machine, trace)
    gap_us = point.gap_us if point.gap_us is not None else known_gap_us or 0.0
    m = trace.model
    runtime = Runtime(
        costs,
        m.n_expert,
        m.top_k,
        point.n_slots if costs.n_devices else [],
        eviction=point.policy,
        schedule=point.schedule,
        preload=True,
    )
    now_us, flying = 0.0, list[Transfer]()
    best: tuple[tuple[int, float], int, int, list[Bar]] = ((-1, 0.0), 0, 0, [])
    n = min(trace.n_tokens, _WARM_TOKENS)
    for token in range(n):
        for layer in range(m.n_layers):
            if trace.experts[token, layer, 0] < 0:
                continue
            for transfer in sorted((t for t in flying if t.end_us <= now_us), key=lambda t: (t.end_us, t.id)):
                runtime.on_complete(transfer.id, transfer.end_us)
                flying.remove(transfer)
            decision = runtime.on_layer(
                layer,
                trace.experts[token, layer],
                now_us,
                weights=None if trace.weights is None else trace.weights[token, layer],
                scores=None if trace.scores is None else trace.scores[token, layer],
                gap_us=gap_us,
            )
            rank = (min(2, decision.n_copies), decision.makespan_us)
            if 2 * token >= n and rank > best[0]:
                bars = []
                for p in decision.placements:
                    lane = "CPU" if p.device == CPU else f"GPU {p.device}"
                    bars.append(Bar(lane, p.expert, p.start_us, p.end_us))
                    if p.copied:
                        bars.append(Bar(f"link {p.device}", p.expert, p.copy_start_us, p.copy_end_us))
                best = (rank, token, layer, bars)
            flying.extend(decision.transfers)
            now_us += decision.makespan_us + gap_us
            runtime.on_layer_done()
    return best[1], best[2], best[3]


def residency(policy: str, n_slots: int, trace: TraceFile) -> npt.NDArray[np.float64]:
    """Share of time [n_layers, n_expert] that each expert is resident, event-atomic, over the trace's first tokens."""
    import numpy as np

    m = trace.model
    cache = Cache(m.n_layers, m.n_expert, m.top_k, n_slots, policy)
    held = np.zeros((m.n_layers, m.n_expert), bool)
    for layer in range(m.n_layers):
        for expert in range(n_slots):
            cache.begin_load(layer, expert)
            cache.complete_load(layer, expert)
        held[layer, :n_slots] = True
    total = np.zeros(held.shape)
    n = min(trace.n_tokens, _RESIDENCY_TOKENS)
    for token in range(n):
        for layer in range(m.n_layers):
            ids = trace.experts[token, layer]
            if ids[0] < 0:
                continue
            cache.begin_step(
                layer,
                ids,
                weights=None if trace.weights is None else trace.weights[token, layer],
                scores=None if trace.scores is None else trace.scores[token, layer],
            )
            for expert in ids.tolist():
                if cache.lookup(layer, expert)[0] != SlotState.ABSENT:
                    continue
                try:
                    _, evicted = cache.begin_load(layer, expert)
                except CoreError:
                    continue  # fewer slots than top-k: nothing may be evicted for it
                cache.complete_load(layer, expert)
                held[layer, expert] = True
                if evicted is not None:
                    held[evicted] = False
            cache.end_step()
        total += held
    return total / max(1, n)
