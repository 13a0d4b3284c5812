"""Schedulers, slot allocation, self-description and bad input through the C API."""

from __future__ import annotations

import math

import pytest

from hybrimoe.errors import PluginError, UsageError
from hybrimoe.native import core_abi
from hybrimoe.native.core import (
    CPU,
    Cache,
    CoreError,
    CoreUsageError,
    Costs,
    Curve,
    Kind,
    Policy,
    Scheduler,
    SlotState,
    WorkItem,
    allocate_slots,
    policies,
)


def golden_items() -> list[WorkItem]:
    """HybriMoE fig. 5: A:1, B:1, C:3 uncached; D:4, E:1 cached."""
    return [WorkItem(0, 1), WorkItem(1, 1), WorkItem(2, 3), WorkItem(3, 4, device=0), WorkItem(4, 1, device=0)]


def golden_costs() -> Costs:
    """GPU 1 per expert, CPU = load, copy = 3."""
    return Costs.simple(1, expert_bytes=1.0, cpu_us=1.0, gpu_us=1.0, copy_us=3.0)


@pytest.mark.parametrize("name", ["two-threshold", "hybrimoe"])
def test_golden_layer(name: str) -> None:
    """algorithms.md target 1; the shared expert is first on the GPU."""
    plan = Scheduler(name).plan(golden_costs(), golden_items(), gpu_ready_us=[1.0])
    assert plan.makespan_us == 4.0
    assert [p.device for p in plan.placements] == [CPU, CPU, 0, 0, CPU]
    assert [p.copied for p in plan.placements] == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("name", "makespan_us"), [("exhaustive", 4), ("cpu-only", 5), ("gpu-only", 10), ("static", 10)]
)
def test_golden_layer_under_the_rivals(name: str, makespan_us: float) -> None:
    plan = Scheduler(name).plan(golden_costs(), golden_items(), gpu_ready_us=[1.0])
    assert plan.makespan_us == makespan_us


def test_static_is_by_layer() -> None:
    costs = Costs.simple(2, expert_bytes=1.0, cpu_us=1.0, gpu_us=1.0, copy_us=3.0)
    scheduler = Scheduler("static:n_cpu_layers=1")
    assert scheduler.plan(costs, golden_items(), layer=0).n_gpu == 0
    assert scheduler.plan(costs, golden_items(), layer=1).n_cpu == 0


def test_copy_limit() -> None:
    plan = Scheduler("gpu-only").plan(golden_costs(), golden_items(), max_copies=[1])
    assert plan.n_copies == 1
    assert plan.placements[2].copied  # the heaviest


@pytest.mark.parametrize("kind", list(Kind))
def test_policies_describe_themselves(kind: Kind) -> None:
    found = policies(kind)
    assert len(found) >= 3
    assert len({p.name for p in found}) == len(found)
    for policy in found:
        assert policy.doc.endswith(".")
        for p in policy.params:
            assert p.min <= p.default <= p.max
            assert p.doc
            assert not p.integer or p.default == int(p.default)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown scheduler 'fastest'; known: two-threshold, hybrimoe"):
        Scheduler("fastest")
    with pytest.raises(CoreUsageError, match="unknown eviction policy 'lur'; known: lru, lfu"):
        Cache(1, 4, 2, 2, "lur")
    with pytest.raises(CoreUsageError, match="'ema' has no parameter 'beta'; known: alpha"):
        Cache(1, 4, 2, 2, "ema:beta=1")
    with pytest.raises(CoreUsageError, match=r"ema: alpha = 2 is outside 1e-06..1"):
        Cache(1, 4, 2, 2, "ema:alpha=2")
    with pytest.raises(CoreUsageError, match="whole number"):
        Cache(1, 4, 2, 2, "eam:n_nearest=1.5")
    with pytest.raises(CoreUsageError, match="not parameter=number"):
        Policy.parse("ema:alpha")


def test_policy_text_round_trip() -> None:
    for text in ("lru", "mrs:alpha=0.75,p_factor=2"):
        assert str(Policy.parse(text)) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0, 1, 0), r"n_expert = 0 is outside 1\.\.1024"),
        ((1, 4, 5, 2), r"top_k = 5 is outside 1\.\.4"),
        ((1, 4, 2, 5), r"5 slots for one layer is outside 0\.\.4"),
        ((1, 4, 2, -1), r"-1 slots"),
        ((2, 4, 2, [1]), "1 slot counts given for 2 layers"),
        ((0, 4, 2, []), "0 layers"),
    ],
)
def test_impossible_sizes(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(CoreUsageError, match=message):
        Cache(*arguments)


def test_calls_out_of_order() -> None:
    cache = Cache(2, 4, 2, 1)
    with pytest.raises(CoreError, match="expert 1 of layer 0 is not loading") as caught:
        cache.complete_load(0, 1)
    assert caught.value.code == core_abi.OUT_OF_ORDER
    assert cache.begin_load(0, 1) == (0, None)
    with pytest.raises(CoreError, match="already resident or loading"):
        cache.begin_load(0, 1)
    with pytest.raises(CoreError, match="layer 1 is not loading"):
        cache.complete_load(1, 1)
    with pytest.raises(CoreError, match="none of 1 slots may be evicted") as caught:
        cache.begin_load(0, 2)
    assert caught.value.code == core_abi.NO_SLOT
    cache.complete_load(0, 1)
    with pytest.raises(CoreError, match="not loading"):
        cache.complete_load(0, 1)
    with pytest.raises(CoreUsageError, match="expert 4 is outside"):
        cache.begin_step(0, [4, 0])
    cache.begin_step(0, [1, 0])
    with pytest.raises(CoreError, match="may be evicted"):
        cache.begin_load(0, 2)  # 1 is in use
    cache.end_step()
    assert cache.begin_load(0, 2) == (0, (0, 1))
    assert cache.lookup(0, 2) == (SlotState.LOADING, 0, 0)
    assert cache.lookup(0, 1) == (SlotState.ABSENT, CPU, -1)
    assert cache.stats()["n_refused"] == 2
    cache.verify()


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_costs(value: float) -> None:
    costs = Costs(1, 1)
    for setter in (
        lambda: costs.set_bytes(value),
        lambda: costs.set_cpu(Curve(value, 1.0), 0.0),
        lambda: costs.set_cpu(Curve(1.0, 1.0), value),
        lambda: costs.set_gpu(0, Curve(1.0, value)),
        lambda: costs.set_gpu(0, Curve(points=((1, value),))),
        lambda: costs.set_link(0, 0.0, value),
        lambda: costs.set_step(0, value),
    ):
        with pytest.raises(CoreUsageError, match=r"must be"):
            setter()
    if not math.isinf(value):
        with pytest.raises(CoreUsageError):
            costs.set_dram(value)


def test_unknown_costs_are_named_never_guessed() -> None:
    costs = Costs(2, 1, 2)
    steps = [
        ("layer 0 has no layer class", lambda: [costs.set_layer_class(i, i) for i in range(2)]),
        ("expert bytes of layer class 0", lambda: [costs.set_bytes(1e6, i) for i in range(2)]),
        ("CPU time of layer class 0", lambda: [costs.set_cpu(Curve(1, 1), 0, i) for i in range(2)]),
        ("time of layer class 0 on device 0", lambda: [costs.set_gpu(0, Curve(1, 0), i) for i in range(2)]),
        ("rate of the link to device 0", lambda: costs.set_link(0, 1, 1)),
        ("cost per step of device 0", lambda: costs.set_step(0, 1)),
        ("cost per step of the CPU", lambda: costs.set_step(CPU, 1)),
        ("shared DRAM ceiling", lambda: costs.set_dram(math.inf)),
    ]
    for message, mend in steps:
        with pytest.raises(CoreError, match=message) as caught:
            costs.check()
        assert caught.value.code == core_abi.MISSING_COST
        mend()
    costs.check()


def test_costs_from_calibration() -> None:
    data = {
        "layer_class": [0, 1],
        "classes": [
            {
                "expert_bytes": 100,
                "cpu": {"fixed_us": 1, "per_token_us": 2},
                "cpu_first_us": 0,
                "gpu": [{"points": [[1, 3], [5, 7]]}],
            },
            {
                "expert_bytes": 200,
                "cpu": {"fixed_us": 5, "per_token_us": 0},
                "cpu_first_us": 1,
                "gpu": [{"fixed_us": 1, "per_token_us": 0}],
            },
        ],
        "cpu_step_us": 0.5,
        "dram_bytes_per_us": None,
        "devices": [{"latency_us": 1, "bytes_per_us": 50, "step_us": 2}],
    }
    costs = Costs.from_calibration(data)
    cpu = Scheduler("cpu-only")
    assert cpu.plan(costs, [WorkItem(0, 3)], layer=0).makespan_us == 0.5 + 1 + 2 * 3
    assert cpu.plan(costs, [WorkItem(0, 3)], layer=1).makespan_us == 0.5 + 5 + 1
    assert cpu.plan(costs, [WorkItem(0, 3, device=0)], layer=0).makespan_us == 2 + 5
    assert Scheduler("gpu-only").plan(costs, [WorkItem(0, 1)], layer=0).makespan_us == 1 + 100 / 50 + 3
    del data["cpu_step_us"]
    with pytest.raises(CoreError, match="lacks 'cpu_step_us'"):
        Costs.from_calibration(data)
    with pytest.raises(CoreUsageError, match="malformed"):
        Costs.from_calibration({**data, "cpu_step_us": "fast"})


def test_slot_allocation() -> None:
    assert allocate_slots("even", 4, 8, 18) == [5, 5, 4, 4]
    assert allocate_slots("even", 4, 8, 100) == [8, 8, 8, 8]
    assert allocate_slots("shallow:n_full=2", 4, 8, 22) == [8, 8, 3, 3]
    assert allocate_slots("shallow:n_full=2", 4, 8, 10) == [8, 2, 0, 0]
    assert allocate_slots("proportional", 4, 8, 12, [1, 2, 0, 3]) == [2, 4, 0, 6]
    assert allocate_slots("proportional", 4, 8, 20, [1, 1, 0, 10]) == [6, 6, 0, 8]  # capped at the experts
    assert allocate_slots("proportional", 3, 8, 20, [0, 0, 0]) == [7, 7, 6]
    assert sum(allocate_slots("proportional", 4, 8, 31, [0.1, 5, 0, 1])) == 31
    with pytest.raises(CoreUsageError, match="needs a demand"):
        allocate_slots("proportional", 4, 8, 12)
    with pytest.raises(CoreUsageError, match="demand of layer 1"):
        allocate_slots("proportional", 2, 8, 12, [1, math.nan])
    with pytest.raises(CoreUsageError, match="-1 slots in all"):
        allocate_slots("even", 4, 8, -1)


def test_a_missing_library_is_a_plugin_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(core_abi.LIBRARY_VARIABLE, "/nonexistent/libhybrimoe-core.so")
    with pytest.raises(PluginError, match="does not exist") as caught:
        policies(Kind.EVICTION)
    assert caught.value.exit_code == 5
