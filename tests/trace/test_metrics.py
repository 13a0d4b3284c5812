"""Metrics: hand-made cases, brute force, and the published figures on real traces."""

from __future__ import annotations

import math

import numpy as np
import pytest
from core.conftest import real_trace

from hybrimoe.native.core_replay import Trace, replay_cache
from hybrimoe.trace import metrics
from hybrimoe.trace.format import TraceFile


def brute_srp(trace: Trace, m: int) -> float:
    """The formula as written, window by window."""
    counts = []
    for tokens in trace.prompts():
        for first in range(tokens.start, tokens.stop - m + 1):
            for layer in range(trace.n_layers):
                used = trace.experts[first : first + m, layer].ravel()
                counts += np.bincount(used[used >= 0], minlength=trace.n_expert).tolist()
    f = np.array(counts)
    return max(100 * 2 * f[f >= a].sum() / (m * (f >= a) + f).sum() for a in range(1, m + 1))


def test_srp_is_the_formula(synthetic: Trace) -> None:
    trace = Trace(synthetic.experts[:60, :2], 32, prompt_offsets=[0, 25, 60])
    for m in (1, 4, 16):
        assert metrics.srp(trace, m) == pytest.approx(brute_srp(trace, m), rel=1e-12)
    assert math.isnan(metrics.srp(trace, 36))


def test_srp_of_fixed_routing_is_perfect() -> None:
    same = np.broadcast_to(np.array([0, 3]), (20, 4, 2))
    assert metrics.srp(Trace(np.ascontiguousarray(same), 8), 16) == pytest.approx(100.0)


def test_srp_on_deepseek(deepseek_40: Trace) -> None:
    """algorithms.md target 9: 37.9 in the paper."""
    assert metrics.srp(deepseek_40, 16) == pytest.approx(37.9, abs=2.0)
    assert metrics.srp(real_trace("deepseek-v2-lite"), 16) == pytest.approx(37.9, abs=2.0)


def test_sch_is_between_lru_and_belady(synthetic: Trace) -> None:
    for slots in (8, 16):
        rate = metrics.sch(synthetic, slots, 16)
        assert (
            replay_cache(synthetic, "lru", slots).hit_rate < rate <= replay_cache(synthetic, "belady", slots).hit_rate
        )
    assert metrics.sch(synthetic, 32, 16) == 1.0


def test_sch_by_hand() -> None:
    """2 slots, 1 of 4 experts used: the resident used least in the next 3 tokens goes."""
    ids = np.array([2, 0, 2, 0, 3, 2]).reshape(-1, 1, 1)
    # 0, 1 resident. 2: miss, 1 goes (0 is used again). 0, 2, 0: hits. 3: miss, 0 goes. 2: hit.
    assert metrics.sch(Trace(ids, 4), 2, 3) == pytest.approx(4 / 6)


def test_overlap_reuse_and_working_set_by_hand() -> None:
    ids = np.array([[0, 1], [1, 2], [0, 1], [5, 6]]).reshape(4, 1, 2)
    trace = Trace(ids, 8, prompt_offsets=[0, 3, 4])
    assert metrics.adjacent_overlap(trace) == pytest.approx(2 / 4)  # 1 of 2, 1 of 2; the other prompt has one token
    assert sorted(metrics.reuse_distances(trace).tolist()) == [1, 1, 2]
    assert metrics.working_set(trace, 3) == 3.0
    assert math.isnan(metrics.working_set(trace, 4))


def test_lookahead_recall_of_the_demo_falls_with_distance(demo: TraceFile) -> None:
    """algorithms.md target 10: gate look-ahead from recorded gate inputs of a real run."""
    found = metrics.lookahead_recall(demo, [4, 8])
    assert set(found) == {1, 2, 3}
    assert found[1][4] > found[2][4] > found[3][4] > 4 / 16
    assert found[1][8] > found[1][4] > 0.55


def test_measure_gives_advice(demo: TraceFile) -> None:
    found = metrics.measure(demo)
    assert found.advice.startswith("caches well: 8 slots per layer")
    assert found.sch_slots == 8 and found.hits_lru <= found.sch <= 1.0
    assert found.overlap > found.overlap_uniform == 0.25
    assert len(found.entropy_per_layer) == demo.model.n_layers and 0 < found.entropy < 1
    assert found.path_recall[4] < found.path_recall[8]
    assert any("look-ahead recall" in line and "distance 3" in line for line in metrics.lines(found))


def test_uniform_routing_is_called_so() -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((400, 4, 64)), axis=2)[:, :, :4]
    trace = Trace(ids, 64)
    lru, belady = (replay_cache(trace, p, 8).hit_rate for p in ("lru", "belady"))
    assert metrics._advice(8, 64, lru, belady).startswith("near uniform")
