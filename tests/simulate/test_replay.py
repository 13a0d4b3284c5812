"""Replays of the committed recording: golden counts, bounds, clocks, determinism."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrimoe.errors import UsageError
from hybrimoe.machine.files import open_machine
from hybrimoe.native.core import Kind, policies
from hybrimoe.native.core_replay import replay_cache
from hybrimoe.simulate import grid
from hybrimoe.simulate.replay import Loaded, make_lookahead, replay, steps_of
from hybrimoe.simulate.run import run
from hybrimoe.trace.format import ModelIdentity, TraceFile

FIXTURE = Path(__file__).parents[1] / "trace" / "demo.trace"

# Hits of 7,952 queries at 8 and 12 of 16 slots: state kept, then cold.
GOLDEN = {
    "lru": (6125, 7199, 6090, 7175),
    "lfu": (6207, 7271, 6121, 7184),
    "lfru": (6237, 7250, 6139, 7198),
    "ema:alpha=0.1": (6179, 7237, 6141, 7197),
    "mrs": (6202, 7233, 6179, 7214),
    "arc": (6114, 7183, 6064, 7144),
    "static": (4134, 6046, 4134, 6046),
    "eam": (6208, 7274, 6121, 7184),
    "belady": (6823, 7596, 6788, 7568),
    "belady-bypass": (6953, 7624, 6914, 7590),
    "belady-lookahead": (6821, 7589, 6788, 7565),
}
MACHINE = "rtx3060-pcie3-ddr4"


def point(policy: str = "lru", n_slots: int = 8, **changes: Any) -> grid.Point:
    return grid.Point(FIXTURE, policy, n_slots, str(n_slots), changes.pop("cold", False), **changes)


def test_every_policy_has_golden_counts() -> None:
    assert {name.partition(":")[0] for name in GOLDEN} == {p.name for p in policies(Kind.EVICTION)}


@pytest.mark.parametrize("policy", GOLDEN)
def test_golden_counts_of_the_recording(demo: Loaded, policy: str) -> None:
    rows = [replay(point(policy, n, cold=cold), demo) for cold in (False, True) for n in (8, 12)]
    assert {r.queries for r in rows} == {7952}
    assert tuple(r.hits for r in rows) == GOLDEN[policy]
    for row in rows:
        assert row.mode == "event-atomic" and row.hit_rate == row.hits / row.queries
        assert row.of_belady <= 1.0 or policy.startswith("belady")
        assert row.bytes_moved == pytest.approx(row.loads * demo.trace.model.expert_bytes[0])


def test_a_clock_over_the_recording(demo: Loaded) -> None:
    row = replay(point(machine=MACHINE), demo)
    assert row.mode == "clock" and row.ms_per_token is not None and row.tokens_per_s is not None
    assert row.tokens_per_s == pytest.approx(1e3 / row.ms_per_token)
    # Prompt steps ask for an expert once for all their tokens.
    assert row.queries < 7952
    assert row.experts_cpu is not None and row.experts_gpu is not None
    assert row.experts_cpu + row.experts_gpu == row.queries
    assert row.prefill_ms_per_token is not None and row.decode_ms_per_token is not None
    assert row.prefill_ms_per_token < row.decode_ms_per_token
    assert row.gap_us is not None and row.gap_us > 0  # the recording knows the model's dense weights
    assert all(share is not None and 0 < share < 1 for share in (row.cpu_busy, row.gpu_busy, row.link_busy))
    total = sum(x or 0.0 for x in (row.demand_bytes, row.admit_bytes, row.prefetch_bytes))
    assert row.bytes_moved == pytest.approx(total)


@pytest.mark.parametrize("n_slots", [0, 4, 8, 12, 16])
def test_decode_is_never_faster_than_the_bandwidth_limit(demo: Loaded, n_slots: int) -> None:
    no_phase = Loaded(dataclasses.replace(demo.trace, is_decode=None))
    for schedule in ("two-threshold", "cpu-only", "gpu-only"):
        for prefetch in ("none", "impact"):
            row = replay(point("lru", n_slots, machine=MACHINE, schedule=schedule, prefetch=prefetch), no_phase)
            assert row.of_limit is not None and 0.02 < row.of_limit <= 1.0


def test_more_slots_and_a_faster_link_never_cost_much(demo: Loaded) -> None:
    def ms(n_slots: int, machine: str) -> float:
        value = replay(point("lru", n_slots, machine=machine), demo).ms_per_token
        assert value is not None
        return value

    assert ms(16, MACHINE) < ms(8, MACHINE) < ms(2, MACHINE)
    assert ms(4, f"{MACHINE}:link=pcie5") < ms(4, MACHINE)


def test_cold_starts_every_prompt_anew(demo: Loaded) -> None:
    kept, cold = (replay(point("lfu", 8, cold=c, machine=MACHINE), demo) for c in (False, True))
    assert kept.queries == cold.queries and kept.hits > cold.hits


def test_two_threshold_beats_the_others_in_decode(demo: Loaded) -> None:
    """Target 3 of algorithms.md, over a whole run: never worse than CPU-runs-misses and load-everything."""
    times = {s: replay(point(machine=MACHINE, schedule=s), demo) for s in ("two-threshold", "cpu-only", "gpu-only")}
    best = times.pop("two-threshold").ms_per_token
    assert best is not None
    assert all(row.ms_per_token is not None and best < row.ms_per_token for row in times.values())


def test_recorded_lookahead_is_used(demo: Loaded) -> None:
    gap = {"machine": MACHINE, "gap_us": 1500.0}
    none = replay(point(**gap), demo)
    found = {kind: replay(point(prefetch="impact", lookahead=kind, **gap), demo) for kind in ("recorded", "perfect")}
    assert none.prefetch_bytes == 0
    for row in found.values():
        assert row.prefetch_bytes and row.prefetch_useful_bytes
        assert row.ms_per_token is not None and none.ms_per_token is not None
        assert row.ms_per_token < none.ms_per_token
    assert found["perfect"].hits > found["recorded"].hits


def test_made_up_lookahead_has_the_recall_it_says(demo: Loaded) -> None:
    perfect = make_lookahead(demo.trace, "perfect")
    some = make_lookahead(demo.trace, "recall=0.6")
    assert perfect is not None and some is not None
    used = demo.trace.experts[:, 1:-1]

    def recall(lookahead: np.ndarray) -> float:
        top = np.argsort(-lookahead[:, :-2, 0], axis=2, kind="stable")[:, :, :4]
        return float((used[..., None] == top[:, :, None, :]).any(axis=3).mean())

    assert recall(perfect) == 1.0
    assert recall(some) == pytest.approx(0.6 + 0.4 * 4 / 16, abs=0.06)  # a wrong guess may be right by chance
    np.testing.assert_array_equal(some, make_lookahead(demo.trace, "recall=0.6"))
    assert (perfect[:, -1] == 0).all()


def test_steps_follow_prompts_and_phases(demo: Loaded) -> None:
    trace = demo.trace
    assert trace.is_decode is not None
    steps = steps_of(trace, 512)
    assert steps[0] == 0 and steps[-1] == trace.n_tokens
    assert set(trace.prompt_offsets.tolist()) <= set(steps.tolist())
    sizes = np.diff(steps)
    assert (sizes > 1).sum() == 2 and (sizes == 1).sum() == trace.is_decode.sum()
    assert np.diff(steps_of(trace, 8)).max() == 8
    assert (np.diff(steps_of(dataclasses.replace(trace, is_decode=None), 8)) == 1).all()


def test_processes_and_order_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrimoe.simulate import run as runner

    points = [point(p, n, machine=m) for p in ("lru", "mrs") for n in (4, 8) for m in (None, MACHINE)]
    alone = run(points, 1)
    monkeypatch.setattr(runner, "_WORTH_PROCESSES", 0)
    shares: list[float] = []
    together = run(points, 2, shares.append)
    assert together == alone
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert run(points[::-1], 1) == alone[::-1]


def test_a_policy_without_its_scores(demo: Loaded) -> None:
    bare = Loaded(dataclasses.replace(demo.trace, scores=None, weights=None, lookahead=None))
    with pytest.raises(UsageError, match="mrs needs router scores"):
        replay(point("mrs"), bare)
    with pytest.raises(UsageError, match="impact needs look-ahead scores"):
        replay(point(machine=MACHINE, prefetch="impact"), bare)
    assert replay(point(machine=MACHINE, prefetch="path"), bare).mode == "clock"
    with pytest.raises(UsageError, match="pays needs a machine"):
        replay(point(admission="pays"), demo)
    assert replay(point(admission="pays", machine=MACHINE), demo).mode == "clock"


MODEL = ModelIdentity("m", n_layers=4, n_expert=64, top_k=6, expert_bytes=(1000,) * 4, dense_bytes=1 << 30)


@pytest.mark.parametrize(
    ("text", "n"),
    [("16", 16), ("2k", 12), ("1.5k", 9), ("20k", 64), ("25%", 16), (".5", 32), ("1.0", 64), ("0", 0), ("64KB", 16),
     ("1GiB", 64), ("3999B", 0)],
)  # fmt: skip
def test_sizes(text: str, n: int) -> None:
    assert grid.parse_size_of_cache(text, MODEL) == n


@pytest.mark.parametrize("text", ["65", "150%", "auto", "many", "-3", "6XB"])
def test_impossible_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--expert-cache"):
        grid.parse_size_of_cache(text, MODEL)
    if text == "auto":
        assert grid.parse_size_of_cache("auto", MODEL, 40_000.0) == 10


def test_bytes_need_the_models_bytes() -> None:
    with pytest.raises(UsageError, match="does not know the bytes"):
        grid.parse_size_of_cache("6GiB", dataclasses.replace(MODEL, expert_bytes=()))


def test_lists_of_policies() -> None:
    found = grid.parse_policies(Kind.EVICTION, "lru,mrs:alpha=0.3,p_factor=2,ema:alpha=0.1,lru")
    assert found == ["lru", "mrs:alpha=0.3,p_factor=2", "ema:alpha=0.1"]
    assert len(grid.parse_policies(Kind.EVICTION, "all")) == len(policies(Kind.EVICTION))
    assert "exhaustive" not in grid.parse_policies(Kind.SCHEDULER, "all")
    for text, message in (
        ("lur", "there is no 'lur'"),
        ("ema:beta=1", "no parameter 'beta'"),
        (",", "names no policy"),
    ):
        with pytest.raises(UsageError, match=message):
            grid.parse_policies(Kind.EVICTION, text)


def test_a_calibration_file_is_a_machine(tmp_path: Any, demo: Loaded) -> None:
    import json

    section = open_machine(MACHINE).costs(demo.trace.model).to_json()
    path = tmp_path / "this-machine.json"
    for data in (section, {"costs": section}):
        path.write_text(json.dumps(data), encoding="utf-8")
        row = replay(point(machine=str(path), gap_us=100.0), demo)
        assert row == dataclasses.replace(replay(point(machine=MACHINE, gap_us=100.0), demo), profile=str(path))
    other = dataclasses.replace(demo.trace.model, n_layers=7, layers=(), expert_bytes=())
    with pytest.raises(UsageError, match="is for 30 MoE layers"):
        open_machine(str(path)).costs(other)
    path.write_text('{"classes": [], "layer_class": []}', encoding="utf-8")
    with pytest.raises(UsageError, match="lacks 'cpu_step_us'"):
        replay(point(machine=str(path)), demo)


def test_admission_and_bypass_are_compared_with_their_own_oracle(demo: Loaded) -> None:
    """Target 8 of algorithms.md."""
    for policy, admission in (("static", "always"), ("lru", "second-use"), ("lru", "always")):
        row = replay(point(policy, 8, admission=admission), demo)
        want = "belady" if (policy, admission) == ("lru", "always") else "belady-bypass"
        assert row.belady_hits == replay_cache(demo.core, want, 8).n_hits >= row.hits
    assert not math.isnan(replay(point("lru", 0), demo).hit_rate)


def test_a_trace_of_one_token(demo: Loaded) -> None:
    trace: TraceFile = dataclasses.replace(
        demo.trace,
        experts=demo.trace.experts[:1],
        prompt_offsets=np.array([0, 1]),
        weights=None,
        scores=None,
        lookahead=None,
        is_decode=None,
    )
    assert replay(point(machine=MACHINE), Loaded(trace)).n_tokens == 1
