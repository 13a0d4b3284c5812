"""Golden counts and bounds of the event-atomic replay, on the committed trace and on traces of real models."""

from __future__ import annotations

import numpy as np
import pytest

from hybrimoe.native.core import CoreError, CoreUsageError, Costs, Kind, policies
from hybrimoe.native.core_abi import MISSING_COST, MISSING_SCORES
from hybrimoe.native.core_replay import Trace, replay_cache, replay_recall

from .conftest import TRACES, real_trace

# Hits of 7,680 queries at 8, 16, 24 of 32 slots: state kept, then cold; last: one pool of 6 x 8 slots, kept.
SYNTHETIC = {
    "lru": (5395, 6760, 7279, 5391, 6777, 7280, 5284),
    "lfu": (4754, 6173, 7113, 5638, 6814, 7280, 3123),
    "lfru": (5422, 6670, 7271, 5635, 6812, 7280, 5320),
    "ema": (5495, 6723, 7288, 5618, 6805, 7280, 5252),
    "mrs": (5547, 6773, 7295, 5556, 6801, 7302, 5516),
    "arc": (5423, 6759, 7277, 5440, 6776, 7275, 5285),
    "static": (1974, 3728, 5575, 1974, 3728, 5575, 1974),
    "eam": (4703, 5984, 7055, 5638, 6814, 7280, 2661),
    "belady": (6181, 7166, 7506, 6156, 7123, 7433, 6431),
    "belady-bypass": (6370, 7185, 7509, 6335, 7135, 7433, 6459),
    "belady-lookahead": (6181, 7089, 7408, 6156, 7075, 7382, 6431),
}

# algorithms.md target 7: the shared traces' README, hits at 16, 32, 48 of 64 slots.
DEEPSEEK = {
    ("lru", False): (358750, 534628, 667283),
    ("lru", True): (359098, 534125, 664979),
    ("lfu", False): (342745, 510749, 647026),
    ("lfu", True): (374301, 547253, 667917),
    ("ema:alpha=0.5", False): (361473, 535883, 667491),
    ("ema:alpha=0.5", True): (361790, 535236, 665157),
    ("ema:alpha=0.1", False): (374441, 544944, 668971),
    ("ema:alpha=0.1", True): (374776, 543731, 666473),
    ("belady", False): (499977, 648756, 716066),
    ("belady", True): (496756, 643427, 711746),
}

ONLINE = [name for name in SYNTHETIC if not name.startswith("belady")]


def test_every_policy_has_golden_counts() -> None:
    assert {p.name for p in policies(Kind.EVICTION)} == set(SYNTHETIC)


@pytest.mark.parametrize("policy", SYNTHETIC)
def test_synthetic_counts(synthetic: Trace, policy: str) -> None:
    results = [replay_cache(synthetic, policy, n, cold=cold) for cold in (False, True) for n in (8, 16, 24)]
    results.append(replay_cache(synthetic, policy, 8, pooled=True))
    assert {r.n_queries for r in results} == {7680}
    assert tuple(r.n_hits for r in results) == SYNTHETIC[policy]
    assert all(sum(r.hits_per_layer) == r.n_hits for r in results)


@pytest.mark.parametrize("n_slots", [0, 1, 3, 32])
def test_extreme_sizes(synthetic: Trace, n_slots: int) -> None:
    for policy in SYNTHETIC:
        hits = replay_cache(synthetic, policy, n_slots).n_hits
        assert hits == {0: 0, 32: 7680}.get(n_slots, hits)
        assert hits < 7680 or n_slots == 32


@pytest.mark.parametrize(("policy", "cold"), DEEPSEEK)
def test_deepseek_counts(deepseek_40: Trace, policy: str, cold: bool) -> None:
    results = [replay_cache(deepseek_40, policy, n, cold=cold) for n in (16, 32, 48)]
    assert {r.n_queries for r in results} == {744120}
    assert tuple(r.n_hits for r in results) == DEEPSEEK[policy, cold]


def test_belady_with_bypass_on_deepseek(deepseek_40: Trace) -> None:
    """algorithms.md target 8."""
    assert replay_cache(deepseek_40, "belady-bypass", 16).n_hits == 523961


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_no_policy_beats_belady_of_the_same_freedom(synthetic: Trace, cold: bool, pooled: bool) -> None:
    for n_slots in (5, 8, 16):
        bound = replay_cache(synthetic, "belady", n_slots, cold=cold, pooled=pooled).n_hits
        bypass = replay_cache(synthetic, "belady-bypass", n_slots, cold=cold, pooled=pooled).n_hits
        assert bypass >= bound
        for policy in [*ONLINE, "belady-lookahead:window=4"]:
            # `static` refuses every miss, which is a freedom that only the bypassing oracle has.
            limit = bypass if policy == "static" else bound
            assert replay_cache(synthetic, policy, n_slots, cold=cold, pooled=pooled).n_hits <= limit
        for admission in ("second-use", "second-use:window=8"):
            assert replay_cache(synthetic, "lru", n_slots, cold=cold, admission=admission).n_hits <= bypass


@pytest.mark.parametrize("name", TRACES)
def test_no_policy_beats_belady_on_real_traces(name: str) -> None:
    trace = real_trace(name, 10)
    for n_slots in (trace.n_expert // 4, trace.n_expert // 2):
        bound = replay_cache(trace, "belady", n_slots).n_hits
        for policy in ONLINE:
            if policy == "static" or (policy == "mrs" and trace.weights is None):
                continue
            assert replay_cache(trace, policy, n_slots).n_hits <= bound


def test_belady_lookahead_grows_with_its_window(synthetic: Trace) -> None:
    hits = [replay_cache(synthetic, f"belady-lookahead:window={w}", 8).n_hits for w in (1, 4, 16, 1000)]
    assert hits == sorted(hits)
    assert hits[0] > replay_cache(synthetic, "lru", 8).n_hits
    assert hits[-1] == replay_cache(synthetic, "belady", 8).n_hits


def test_static_pins_from_other_prompts(deepseek_40: Trace) -> None:
    """algorithms.md target 12: the most used experts of other prompts, pinned, are 8 points below LRU at 25 %."""
    whole = real_trace("deepseek-v2-lite")
    others = whole.experts[int(whole.prompt_offsets[40]) :]
    resident = np.zeros((whole.n_layers, whole.n_expert), dtype=np.uint8)
    for layer in range(whole.n_layers):
        uses = np.bincount(others[:, layer].ravel(), minlength=whole.n_expert)
        resident[layer, np.argsort(-uses, kind="stable")[:16]] = 1
    pinned = replay_cache(deepseek_40, "static", 16, resident=resident).hit_rate
    assert pinned <= replay_cache(deepseek_40, "lru", 16).hit_rate - 0.08
    assert pinned > 0.25  # better than any 16 of 64 experts


def test_path_table_recall(deepseek_40: Trace) -> None:
    """algorithms.md target 11, learned online over the first half."""
    recall = replay_recall(deepseek_40, "path", [6, 12, 16], n_warm_tokens=deepseek_40.n_tokens // 2)
    assert recall[0] >= 0.38
    assert recall[1] >= 0.57
    assert recall[2] >= 0.65


def test_mrs_reads_scores(synthetic: Trace) -> None:
    full = replay_cache(synthetic, "mrs", 8).n_hits
    assert full > replay_cache(synthetic, "lru", 8).n_hits
    ids_only = Trace(synthetic.experts, 32, prompt_offsets=synthetic.prompt_offsets)
    with pytest.raises(CoreError, match="needs router scores") as caught:
        replay_cache(ids_only, "mrs", 8)
    assert caught.value.code == MISSING_SCORES


def test_layers_that_did_not_run_are_not_queries() -> None:
    experts = np.array([[[0, 1], [255, 255]], [[2, 3], [0, 1]]], dtype=np.uint8)
    result = replay_cache(Trace(experts, 4), "lru", 2)
    assert result.queries_per_layer == (4, 2)
    assert result.hits_per_layer == (2, 2)


def test_preload_off_starts_empty(synthetic: Trace) -> None:
    first = synthetic.head(1)
    result = replay_cache(first, "lru", 32, preload=False)
    used = sum(len(np.unique(first.experts[:, layer])) for layer in range(first.n_layers))
    assert result.n_queries - result.n_hits == used == result.n_loads


def test_admission_that_pays(synthetic: Trace) -> None:
    with pytest.raises(CoreError) as caught:
        replay_cache(synthetic, "lru", 8, admission="pays")
    assert caught.value.code == MISSING_COST
    cheap = Costs.simple(6, expert_bytes=1e6, cpu_us=100, gpu_us=1, copy_us=1)
    dear = Costs.simple(6, expert_bytes=1e6, cpu_us=100, gpu_us=1, copy_us=1e9)
    assert replay_cache(synthetic, "lru", 8, admission="pays", costs=cheap).n_loads > 1000
    assert replay_cache(synthetic, "lru", 8, admission="pays", costs=dear).n_loads == 0


def test_bad_traces(synthetic: Trace) -> None:
    experts = synthetic.experts.copy()
    experts[3, 2, 1] = 32
    with pytest.raises(CoreUsageError, match=r"token 3, layer 2: expert 32 is outside 0\.\.31"):
        replay_cache(Trace(experts, 32), "lru", 8)
    with pytest.raises(CoreUsageError, match="prompt offsets must run"):
        replay_cache(Trace(synthetic.experts, 32, prompt_offsets=[0, 5]), "lru", 8)
    with pytest.raises(CoreUsageError, match=r"outside 0\.\.32"):
        replay_cache(synthetic, "lru", 33)
    with pytest.raises(CoreUsageError, match="integers"):
        Trace(np.zeros((2, 2, 2)), 4)
