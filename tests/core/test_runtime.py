"""The composed runtime: invariants, determinism, replays, and that prefetch stays out of the way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe.native.core import CPU, CoreError, CoreUsageError, Costs, SlotState
from hybrimoe.native.core_abi import OUT_OF_ORDER
from hybrimoe.native.core_replay import Trace, replay_cache
from hybrimoe.native.core_runtime import EventLog, EventType, Runtime, TransferKind

N_LAYERS, N_EXPERT, TOP_K = 6, 32, 4


def costs_of(**changes: Any) -> Costs:
    """A machine where a copy takes as long as two experts on the CPU."""
    given = {"expert_bytes": 1e6, "cpu_us": 40.0, "gpu_us": 5.0, "copy_us": 80.0, **changes}
    return Costs.simple(N_LAYERS, **given)


def lookahead_of(trace: Trace) -> np.ndarray:
    """True scores of the next three layers: a perfect look-ahead gate."""
    assert trace.scores is not None
    out = np.zeros((trace.n_tokens, trace.n_layers, 3, trace.n_expert), dtype=np.float32)
    for distance in (1, 2, 3):
        out[:, :-distance, distance - 1] = trace.scores[:, distance:]
    return out


def test_a_runtime_that_copies_freely_sees_the_replays_hits(synthetic: Trace) -> None:
    """With copies that cost nothing every miss is admitted at once, as in the event-atomic replay.

    (Not so for `arc`: its lists are ordered by the end of the copies.)
    """
    costs = costs_of(copy_us=1e-6, cpu_us=1e6)
    for eviction in ("lru", "lfu", "lfru", "ema", "mrs", "eam"):
        runtime = Runtime(costs, N_EXPERT, TOP_K, 8, eviction=eviction, schedule="gpu-only", preload=True)
        runtime.simulate(synthetic)
        assert runtime.stats()["n_hits"] == replay_cache(synthetic, eviction, 8).n_hits


@pytest.mark.parametrize("schedule", ["two-threshold", "hybrimoe", "cpu-only", "gpu-only", "static"])
def test_every_expert_is_computed_once(synthetic: Trace, schedule: str) -> None:
    runtime = Runtime(costs_of(), N_EXPERT, TOP_K, 8, schedule=schedule, prefetch="impact")
    run = runtime.simulate(synthetic, lookahead=lookahead_of(synthetic))
    assert run.n_layers_run == synthetic.n_tokens * N_LAYERS
    layers = run.layers
    assert (layers["n_cpu"] + layers["n_gpu"] == TOP_K).all()
    assert (layers["n_hits"] + layers["n_misses"] == TOP_K).all()
    assert (layers["makespan_us"] > 0).all()
    stats = runtime.stats()
    assert stats["n_cpu"] + stats["n_gpu"] == stats["n_hits"] + stats["n_misses"] == 7680


def test_two_threshold_is_fastest_on_the_virtual_clock(synthetic: Trace) -> None:
    times = {
        s: Runtime(costs_of(), N_EXPERT, TOP_K, 8, schedule=s).simulate(synthetic).total_us
        for s in ("two-threshold", "cpu-only", "gpu-only")
    }
    assert times["two-threshold"] < times["gpu-only"]
    # cpu-only leaves the whole link to admissions, so only its planning is comparable; it must not win by much.
    assert times["two-threshold"] < 1.05 * times["cpu-only"]


@pytest.mark.parametrize("prefetch", ["next-layer", "impact", "fate", "path", "eam"])
def test_prefetch_never_delays_a_demanded_copy(synthetic: Trace, prefetch: str) -> None:
    costs = costs_of(copy_us=30.0, dram_bytes_per_us=60000.0)
    runtime = Runtime(costs, N_EXPERT, TOP_K, 8, prefetch=prefetch, pay_back=False)
    runtime.simulate(synthetic, lookahead=lookahead_of(synthetic), gap_us=50.0)
    stats = runtime.stats()
    assert stats["n_transfers"][TransferKind.PREFETCH] > 100
    assert stats["n_transfers"][TransferKind.DEMAND] > 100
    assert stats["n_delayed_demands"] == 0
    assert stats["stall_us"] == 0.0  # nothing came late


def test_prefetch_with_true_lookahead_pays(synthetic: Trace) -> None:
    costs = costs_of(copy_us=30.0)
    plain = Runtime(costs, N_EXPERT, TOP_K, 8).simulate(synthetic, gap_us=50.0)
    for prefetch in ("next-layer", "impact", "fate"):
        runtime = Runtime(costs, N_EXPERT, TOP_K, 8, prefetch=prefetch)
        run = runtime.simulate(synthetic, lookahead=lookahead_of(synthetic), gap_us=50.0)
        assert run.total_us < 0.97 * plain.total_us
        stats = runtime.stats()
        # Fate also takes what lies above the percentile but below the top-k.
        assert stats["prefetch_useful_bytes"] > (1 if prefetch == "fate" else 20) * stats["prefetch_wasted_bytes"]


def test_prefetch_that_does_not_pay_switches_itself_off(synthetic: Trace) -> None:
    """Look-ahead that is wrong on purpose: wasted copies cost DRAM time and push out experts in use."""
    wrong = np.roll(lookahead_of(synthetic), 13, axis=3)
    costs = costs_of(copy_us=10.0, dram_bytes_per_us=120000.0)
    on = Runtime(costs, N_EXPERT, TOP_K, 8, prefetch="next-layer", pay_back=False)
    off = Runtime(costs, N_EXPERT, TOP_K, 8, prefetch="next-layer", pay_back=True)
    for runtime in (on, off):
        runtime.simulate(synthetic, lookahead=wrong, gap_us=50.0)
    assert off.stats()["n_prefetch_switches"] >= 1
    issued = [r.stats()["n_transfers"][TransferKind.PREFETCH] for r in (off, on)]
    assert issued[0] < 0.6 * issued[1]


def test_prefill_streams_through_scratch(synthetic: Trace) -> None:
    """Steps of 40 tokens: loads above 1, more copies than slots, every expert computed once."""
    costs = costs_of(copy_us=20.0)
    runtime = Runtime(costs, N_EXPERT, TOP_K, 2)
    run = runtime.simulate(synthetic, step_offsets=synthetic.prompt_offsets)
    assert (run.layers["n_rows"] == 40).all()
    assert run.layers["n_copies"].max() > 2
    assert runtime.stats()["n_transfers"][TransferKind.SCRATCH] > 0
    assert (run.layers["n_cpu"] + run.layers["n_gpu"] == run.layers["n_hits"] + run.layers["n_misses"]).all()


def test_no_device_runs_everything_on_the_cpu(synthetic: Trace) -> None:
    costs = costs_of(n_devices=0)
    runtime = Runtime(costs, N_EXPERT, TOP_K, [], prefetch="impact")
    run = runtime.simulate(synthetic.head(1), lookahead=lookahead_of(synthetic.head(1)))
    assert (run.layers["n_cpu"] == TOP_K).all()
    assert run.layers["makespan_us"].min() == TOP_K * 40.0


def test_two_devices_share_the_experts(synthetic: Trace) -> None:
    costs = costs_of(n_devices=2)
    runtime = Runtime(costs, N_EXPERT, TOP_K, [[6] * N_LAYERS, [4] * N_LAYERS])
    runtime.simulate(synthetic)
    held = [0, 0]
    for layer in range(N_LAYERS):
        for expert in range(N_EXPERT):
            state, device, _ = runtime.lookup(layer, expert)
            if state != SlotState.ABSENT:
                held[device] += 1
    assert held == [36, 24]


def test_limits_are_the_guards_steps(synthetic: Trace) -> None:
    ids = synthetic.experts
    runtime = Runtime(costs_of(copy_us=10.0), N_EXPERT, TOP_K, 8, prefetch="path", preload=True)
    runtime.set_limits(prefetch=False, demand_copies=False, admission=False)
    for token in range(40):
        for layer in range(N_LAYERS):
            decision = runtime.on_layer(layer, ids[token, layer], 1e4 * (token * N_LAYERS + layer), gap_us=1e3)
            assert decision.transfers == ()
    runtime.set_limits()
    assert runtime.on_layer(0, ids[40, 0], 1e8, gap_us=1e3).n_misses >= 0
    kinds = {t.kind for t in runtime.on_layer(1, ids[41, 1], 2e8, gap_us=1e3).transfers}
    assert kinds


def test_transfers_follow_the_protocol(synthetic: Trace) -> None:
    runtime = Runtime(costs_of(), N_EXPERT, TOP_K, 8)
    decision = runtime.on_layer(0, [1, 2, 3, 4], 0.0, gap_us=500.0)
    assert decision.n_misses == 4
    assert decision.transfers
    first = decision.transfers[0]
    assert runtime.lookup(0, first.expert)[0] == SlotState.LOADING
    with pytest.raises(CoreError) as caught:
        runtime.on_complete(999, 1.0)
    assert caught.value.code == OUT_OF_ORDER
    runtime.on_fail(first.id, 50.0)
    assert runtime.lookup(0, first.expert)[0] == SlotState.ABSENT
    with pytest.raises(CoreError, match="not in flight"):
        runtime.on_complete(first.id, 60.0)
    for transfer in decision.transfers[1:]:
        runtime.on_complete(transfer.id, transfer.end_us)
        assert runtime.lookup(0, transfer.expert)[0] == SlotState.RESIDENT
    with pytest.raises(CoreUsageError, match="clock went back"):
        runtime.on_layer(1, [1, 2, 3, 4], -1.0)
    with pytest.raises(CoreUsageError, match="expert 32 is outside"):
        runtime.on_layer(1, [1, 2, 3, 32], 1e3)
    assert runtime.stats()["n_events"] == 1


def test_a_late_copy_is_waited_for_or_bypassed() -> None:
    runtime = Runtime(costs_of(copy_us=30.0), N_EXPERT, TOP_K, 8)
    decision = runtime.on_layer(0, [1, 2, 3, 4], 0.0, gap_us=10.0)
    late = decision.transfers[-1]
    # The next token comes before the copy has been reported: it is loading, not a hit, and never used before its end.
    again = runtime.on_layer(0, [late.expert, 9, 10, 11], late.start_us + 1.0)
    assert again.n_late == 1
    placed = again.placements[0]
    assert placed.device == CPU or placed.start_us >= late.end_us - (late.start_us + 1.0)


def test_same_events_same_decisions(synthetic: Trace) -> None:
    """algorithms.md target 16, core side: a recorded run replayed in one call gives the same decisions, bit for bit."""
    options = {"eviction": "mrs", "prefetch": "impact", "admission": "second-use:window=64"}
    slower = costs_of(copy_us=160.0)
    runtime = Runtime(costs_of(), N_EXPERT, TOP_K, 8, **options)
    log = EventLog(N_EXPERT)
    ahead = lookahead_of(synthetic)
    now, pending = 0.0, []
    for token in range(120):
        if token % 40 == 0 and token:
            runtime.begin_prompt()
            log.add(EventType.PROMPT)
        if token == 50:
            runtime.set_costs(slower)
            log.add(EventType.COSTS, a=0)
        if token == 70:
            runtime.set_limits(demand_copies=False)
            log.add(EventType.LIMITS, a=1, b=0, c=1)
        for layer in range(N_LAYERS):
            for transfer in [t for t in pending if t.end_us * 1.1 <= now]:
                pending.remove(transfer)
                if transfer.id % 17 == 0:
                    runtime.on_fail(transfer.id, now)
                    log.add(EventType.FAIL, id=transfer.id, now_us=now)
                else:
                    runtime.on_complete(transfer.id, now)
                    log.add(EventType.COMPLETE, id=transfer.id, now_us=now)
            if token == 60 and layer == 0:
                runtime.on_layer_done()
                log.add(EventType.LAYER_DONE)
                runtime.resize(3, 10)
                log.add(EventType.RESIZE, layer=3, a=0, b=10)
            arguments = {"scores": synthetic.scores[token, layer], "gap_us": 40.0}
            decision = runtime.on_layer(
                layer, synthetic.experts[token, layer], now, lookahead=ahead[token, layer], **arguments
            )
            log.add_layer(layer, synthetic.experts[token, layer], now, lookahead=ahead[token, layer], **arguments)
            pending.extend(decision.transfers)
            now += decision.makespan_us * (1.0 + 0.1 * (token % 3)) + 40.0
    again = Runtime(costs_of(), N_EXPERT, TOP_K, 8, **options)
    assert again.replay(log, [slower]) == len(log)
    assert again.stats() == runtime.stats()
    assert again.cache_stats() == runtime.cache_stats()
    other = Runtime(costs_of(), N_EXPERT, TOP_K, 8, **{**options, "eviction": "lru"})
    with pytest.raises(CoreError):  # other decisions, other transfers: the log does not fit
        other.replay(log, [slower])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_runs_keep_the_invariants(data: st.DataObject) -> None:
    """No capacity exceeded, no use before completion, no eviction of what is in use or in flight."""
    n_slots = data.draw(st.integers(0, 12), label="slots")
    options = {
        "eviction": data.draw(st.sampled_from(["lru", "lfu", "ema", "arc", "eam", "static"])),
        "schedule": data.draw(st.sampled_from(["two-threshold", "hybrimoe", "gpu-only", "cpu-only"])),
        "prefetch": data.draw(st.sampled_from(["none", "next-layer", "impact", "fate", "path", "eam"])),
        "admission": data.draw(st.sampled_from(["always", "second-use", "pays"])),
        "pooled": data.draw(st.booleans()),
        "max_window_layers": data.draw(st.sampled_from([1, 4])),
    }
    copy_us = data.draw(st.sampled_from([5.0, 60.0, 1e4]))
    runtime = Runtime(costs_of(copy_us=copy_us), N_EXPERT, TOP_K, n_slots, **options)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    pending: dict[int, Any] = {}
    resident: set[tuple[int, int]] = set()
    now = 0.0
    for step in range(60):
        layer = step % N_LAYERS
        n_rows = int(rng.choice([1, 1, 1, 7]))
        ids = np.array([rng.choice(N_EXPERT, TOP_K, replace=False) for _ in range(n_rows)])
        for transfer_id in [i for i in pending if rng.random() < 0.5]:
            transfer = pending.pop(transfer_id)
            if rng.random() < 0.1:
                runtime.on_fail(transfer_id, now)
            else:
                runtime.on_complete(transfer_id, now)
                if transfer.slot >= 0:
                    resident.add((transfer.layer, transfer.expert))
        ahead = [rng.random(N_EXPERT) for _ in range(3)]
        decision = runtime.on_layer(layer, ids, now, lookahead=ahead, gap_us=50.0, scratch=n_rows > 1)
        active = {(layer, int(e)) for e in ids.ravel()}
        assert len(decision.placements) == len(active)
        flying = {(t.layer, t.expert) for t in pending.values() if t.slot >= 0}
        for transfer in decision.transfers:
            if transfer.evicted is not None:
                assert transfer.evicted in resident
                assert transfer.evicted not in active | flying
                resident.discard(transfer.evicted)
            pending[transfer.id] = transfer
        copied = {t.expert for t in decision.transfers if t.kind in (TransferKind.DEMAND, TransferKind.SCRATCH)}
        for placement in decision.placements:
            key = (layer, placement.expert)
            if placement.device != CPU and not placement.copied:
                assert key in resident or key in flying
            assert placement.copied == (placement.expert in copied)
        if step % 10 == 9:
            keys = [(one, e) for one in range(N_LAYERS) for e in range(N_EXPERT)]
            held = {key for key in keys if runtime.lookup(*key)[0] != SlotState.ABSENT}
            assert held == resident | {(t.layer, t.expert) for t in pending.values() if t.slot >= 0}
            assert len(held) <= n_slots * N_LAYERS
            for one in range(N_LAYERS):
                assert options["pooled"] or sum(key[0] == one for key in held) <= n_slots
        now += decision.makespan_us + 50.0


def test_bad_runtime_configurations() -> None:
    with pytest.raises(CoreUsageError, match="'belady' is an oracle"):
        Runtime(costs_of(), N_EXPERT, TOP_K, 8, eviction="belady")
    with pytest.raises(CoreUsageError, match="max_window_layers = 0"):
        Runtime(costs_of(), N_EXPERT, TOP_K, 8, max_window_layers=0)
    with pytest.raises(CoreUsageError, match="1 devices, the cache 6 and 2"):
        Runtime(costs_of(), N_EXPERT, TOP_K, [[4] * N_LAYERS] * 2)
    with pytest.raises(CoreError, match="unknown"):
        Runtime(Costs(N_LAYERS, 1), N_EXPERT, TOP_K, 8)
    runtime = Runtime(costs_of(), N_EXPERT, TOP_K, 8)
    with pytest.raises(CoreUsageError, match="not 6 and 1"):
        runtime.set_costs(Costs.simple(2, expert_bytes=1, cpu_us=1, gpu_us=1, copy_us=1))
    with pytest.raises(CoreUsageError, match="must be finite"):
        runtime.on_layer(0, [0, 1, 2, 3], math.nan)
