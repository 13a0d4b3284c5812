"""Closed loops: files of machine changes, the virtual machine by hand, and what the decisions must come to."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closed_loop_matrix import MACHINE, TRACES, Cell, cells, read_trace
from core.conftest import real_trace_path

from hybrimoe.errors import UsageError
from hybrimoe.native.core import CPU, Costs
from hybrimoe.native.core_replay import Trace
from hybrimoe.native.core_runtime import MachinePhase, Runtime
from hybrimoe.simulate.closed_loop import (
    WINDOW,
    ClosedLoop,
    Disturbance,
    Factors,
    MachineChanges,
    Phase,
    read_changes,
    run_closed_loop,
)
from hybrimoe.simulate.replay import Loaded
from hybrimoe.trace.format import ModelIdentity

PHASES: dict[str, Any] = {"profile": MACHINE, "phases": [{"from_token": 0}]}
STILL = Disturbance(noise=0.0)
# One expert: 100 us on the CPU, 10 on the card, 50 to copy; a layer's first expert and each step cost something.
COSTS = {
    "layer_class": [0, 0],
    "classes": [
        {
            "expert_bytes": 1e6,
            "cpu": {"fixed_us": 20.0, "per_token_us": 80.0},
            "cpu_first_us": 3.0,
            "gpu": [{"fixed_us": 10.0, "per_token_us": 0.0}],
        }
    ],
    "cpu_step_us": 4.0,
    "dram_bytes_per_us": 1e9,
    "devices": [{"latency_us": 0.0, "bytes_per_us": 20000.0, "step_us": 5.0}],
}


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def routing(n_tokens: int, n_layers: int, experts: tuple[int, ...], n_expert: int) -> tuple[Trace, ModelIdentity]:
    """The same experts in every layer of every token."""
    ids = np.tile(np.array(experts, dtype=np.int32), (n_tokens, n_layers, 1))
    sizes = (1_000_000,) * n_layers
    return Trace(ids, n_expert), ModelIdentity("hand", n_layers, n_expert, len(experts), expert_bytes=sizes)


# The file.


def test_a_file_says_what_it_says(tmp_path: Path) -> None:
    data = {
        "profile": MACHINE,
        "believed": {"link": 10},
        "phases": [
            {"from_token": 0},
            {"from_token": 200, "cpu": 20, "noise": 0, "waits": {"every_layers": 2}},
            {"from_token": 260, "outliers": {"share": 0.5}},
        ],
        "noise": 0.1,
        "outliers": {"share": 0.01, "factor": 20},
        "waits": {"us": 3000},
        "seed": 7,
        "live": False,
        "guard": False,
    }
    usual = Disturbance(0.1, 0.01, 20.0, 0, 3000.0)
    assert read_changes(write(tmp_path / "a.json", data)) == MachineChanges(
        MACHINE,
        (
            Phase(0, Factors(), usual),
            # What a phase does not say is as at the top.
            Phase(200, Factors(cpu=20.0), replace(usual, noise=0.0, waits_every_layers=2)),
            Phase(260, Factors(), replace(usual, outlier_share=0.5)),
        ),
        Factors(link=10.0),
        7,
        False,
        False,
    )
    least = read_changes(write(tmp_path / "b.json", PHASES))
    assert least == MachineChanges(MACHINE, (Phase(0),)) and least.default_n_tokens == 512


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text(encoding="utf-8")
    example = page.partition("```json\n")[2].partition("```")[0]
    changes = read_changes(write(tmp_path / "a.json", example))
    assert changes.believed.link == 3 and len(changes.phases) == 5
    assert changes.phases[3].disturbance == Disturbance(0.04, waits_every_layers=4, waits_us=3000.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "nests too deeply"),
        ([], "the file must be an object"),
        ({"phases": [{"from_token": 0}]}, "'profile' must be"),
        ({**PHASES, "profile": 3}, "'profile' must be"),
        ({**PHASES, "machine": "a"}, "there is no 'machine' in the file; known are profile, believed, phases"),
        ({"profile": MACHINE}, "'phases' must be a list"),
        ({**PHASES, "phases": []}, "'phases' must be a list"),
        ({**PHASES, "phases": [3]}, "phases[0] must be an object"),
        ({**PHASES, "phases": [{}]}, "'phases[0].from_token' must be a token's number"),
        ({**PHASES, "phases": [{"from_token": True}]}, "'phases[0].from_token' must be"),
        ({**PHASES, "phases": [{"from_token": 1}]}, "the first phase must begin with token 0"),
        ({**PHASES, "phases": [{"from_token": 0}, {"from_token": 0}]}, "'phases[1].from_token' is not after"),
        ({**PHASES, "phases": [{"from_token": 0}, {"from_token": 10**30}]}, "'phases[1].from_token' must be"),
        ({**PHASES, "phases": [{"from_token": 0, "gup": 2}]}, "there is no 'gup' in phases[0]"),
        ({**PHASES, "phases": [{"from_token": 0, "gpu": 0}]}, "'phases[0].gpu' must be a number in"),
        ({**PHASES, "phases": [{"from_token": 0, "waits": {"us": -1}}]}, "'phases[0].waits.us' must be"),
        ({**PHASES, "believed": {"dram": "fast"}}, "'believed.dram' must be a number in"),
        ({**PHASES, "believed": [1]}, "believed must be an object"),
        ('{"profile": "a", "phases": [{"from_token": 0}], "noise": NaN}', "'noise' must be a number in"),
        ({**PHASES, "noise": 1}, "'noise' must be a number in"),
        ({**PHASES, "outliers": {"share": 1}}, "'outliers.share' must be"),
        ({**PHASES, "outliers": {"factor": 0}}, "'outliers.factor' must be"),
        ({**PHASES, "outliers": {"rate": 0.1}}, "there is no 'rate' in outliers"),
        ({**PHASES, "waits": {"every_layers": 1.5}}, "'waits.every_layers' must be"),
        ({**PHASES, "seed": -1}, "'seed' must be"),
        ({**PHASES, "live": 1}, "'live' must be true or false"),
        ({**PHASES, "guard": "on"}, "'guard' must be true or false"),
    ],
    ids=lambda value: None if isinstance(value, str) else "file",
)
def test_bad_files_are_refused_by_key(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_changes(write(tmp_path / "changes.json", data))
    assert message in caught.value.message and "changes.json" in caught.value.message
    assert "docs/simulate.md" in caught.value.hint


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("rtx1", "no such machine"),
        ("cpu-only-ddr5", "has no card"),
        ({}, "lacks 'layer_class'"),
        ({"layer_class": 3}, "is malformed"),
        ({**COSTS, "layer_class": [0]}, "is for 1 MoE layers"),
        ({**COSTS, "classes": []}, "layer"),
        ({**COSTS, "cpu_step_us": "x"}, "malformed"),
        ({**COSTS, "devices": []}, "is outside 0..-1"),
        ({key: COSTS[key] for key in COSTS if key != "cpu_step_us"}, "lacks 'cpu_step_us'"),
    ],
    ids=str,
)
def test_profiles_that_are_none(profile: Any, message: str) -> None:
    trace, model = routing(1, 2, (0, 1), 4)
    with pytest.raises(Exception, match=message) as caught:
        run_closed_loop(trace, model, MachineChanges(profile, (Phase(0),)), 2)
    assert hasattr(caught.value, "hint")


# The virtual machine, by hand.


def loop_of(costs: Costs, truth: Costs, trace: Trace, slots: Any, **options: Any) -> Any:
    """Rows of a loop in which nothing is learned and nothing is noise."""
    runtime = Runtime(costs, trace.n_expert, trace.top_k, slots, preload=True, **options)
    settings = {"live": False, "guard": False, "trials": False}
    return runtime.closed_loop(trace, [MachinePhase(0, truth)], trace.n_tokens, **settings)


def test_a_cpu_alone_takes_what_its_curve_says() -> None:
    """Three layers of four experts: 4 + 3 + 4 * 40 us each; under a ceiling, what reading them takes."""

    def costs(dram_bytes_per_us: float) -> Costs:
        made = Costs.simple(
            3, expert_bytes=1e6, cpu_us=40.0, gpu_us=1.0, copy_us=1.0, cpu_first_us=3.0, n_devices=0,
            dram_bytes_per_us=dram_bytes_per_us,
        )  # fmt: skip
        made.set_step(CPU, 4.0)
        return made

    trace, _ = routing(2, 3, (0, 1, 2, 3), 8)
    free = loop_of(costs(math.inf), costs(math.inf), trace, [])
    assert free["us"] == pytest.approx([3 * 167.0] * 2) and (free["n_gpu"] == 0).all()
    assert free["cpu_only_us"] == pytest.approx(free["us"])
    # 4 MB at 20,000 bytes per microsecond.
    bound = loop_of(costs(20000.0), costs(20000.0), trace, [])
    assert bound["us"] == pytest.approx([3 * 200.0] * 2)
    assert bound["cpu_only_us"] == pytest.approx(bound["us"])


@pytest.mark.parametrize(
    ("copy_us", "ceiling", "us"),
    [
        (100.0, math.inf, 101.0),
        # Both ask for 10,000 bytes per microsecond and get half of it.
        (100.0, 10000.0, 201.0),
        (100.0, 15000.0, 100.0 / 0.75 + 1.0),
        # The copy asks for twice what the CPU does. At half speed it ends after 100 us, when the CPU has done 50 of its
        # 100 us; the rest goes at full speed.
        (50.0, 15000.0, 150.0),
    ],
)
def test_reads_and_copies_share_the_ceiling(copy_us: float, ceiling: float, us: float) -> None:
    """Two missing experts: one is computed by the CPU while the other is copied, then computed by the card in 1 us."""

    def costs(dram_bytes_per_us: float) -> Costs:
        return Costs.simple(
            1, expert_bytes=1e6, cpu_us=100.0, gpu_us=1.0, copy_us=copy_us, dram_bytes_per_us=dram_bytes_per_us
        )

    trace, _ = routing(1, 1, (2, 3), 4)
    believed = Costs.simple(1, expert_bytes=1e6, cpu_us=100.0, gpu_us=1.0, copy_us=100.0)
    rows = loop_of(believed, costs(ceiling), trace, 1)
    assert rows["n_gpu"][0] == 1 and rows["us"][0] == pytest.approx(us)


def test_plain_placement_by_hand() -> None:
    """Two slots in each of two layers hold one layer of four experts whole."""
    trace, model = routing(64, 2, (0, 3), 4)
    loop = run_closed_loop(trace, model, MachineChanges(COSTS, (Phase(0, disturbance=STILL),)), 2, n_tokens=64)
    card, cpu = 5.0 + 2 * 10.0, 4.0 + 3.0 + 2 * 100.0
    assert [w.plain_us_per_token for w in loop.windows] == pytest.approx([card + cpu] * 2)
    # A card that is slower than the CPU: all on the CPU is the better one.
    slow = MachineChanges(COSTS, (Phase(0, Factors(gpu=20.0), STILL),))
    loop = run_closed_loop(trace, model, slow, 2, n_tokens=64)
    assert [w.plain_us_per_token for w in loop.windows] == pytest.approx([2 * cpu] * 2)
    assert loop.windows[0].to_plain == pytest.approx(loop.windows[0].us_per_token / (2 * cpu))


def test_the_slower_part_ends_the_layer() -> None:
    """The CPU's two experts outlast the card's two."""
    trace, _ = routing(3, 1, (0, 1, 2, 3), 8)
    costs = Costs.simple(1, expert_bytes=1e6, cpu_us=100.0, gpu_us=30.0, copy_us=1e6)
    rows = loop_of(costs, costs, trace, 2)
    assert (rows["n_gpu"] == 2).all() and rows["us"] == pytest.approx([200.0] * 3)
    assert rows["whole_layers_us"] == pytest.approx([400.0] * 3)  # no layer fits whole


# What it comes to.


def right(**changes: Any) -> MachineChanges:
    return MachineChanges(MACHINE, (Phase(0, disturbance=changes.pop("disturbance", STILL)),), **changes)


@pytest.mark.parametrize("guard", [True, False])
def test_right_beliefs_are_the_oracle(demo: Loaded, guard: bool) -> None:
    changes = right(live=False, guard=guard)
    loop = run_closed_loop(demo.core, demo.trace.model, changes, 8, n_tokens=200, policy="mrs")
    assert [w.to_oracle for w in loop.windows] == [1.0] * 7
    assert all(w.us_per_token == w.oracle_us_per_token and w.trying == 0 and w.guard == "full" for w in loop.windows)
    assert {w.believed for w in loop.windows} == {Factors()}
    assert loop.worst_to_oracle_last_third == 1.0 and loop.n_tokens == 200
    assert loop.windows[-1].first_token == 6 * WINDOW


def test_the_same_seed_gives_the_same_rows(demo: Loaded) -> None:
    def run(seed: int) -> ClosedLoop:
        changes = right(disturbance=Disturbance(outlier_share=0.01), seed=seed, believed=Factors(link=3.0))
        return run_closed_loop(demo.core, demo.trace.model, changes, 8, n_tokens=128, policy="mrs")

    assert run(1) == run(1) and run(1).windows != run(2).windows


@pytest.mark.parametrize("name", ["cpu", "gpu", "link", "dram"])
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_wrong_beliefs_are_put_right(demo: Loaded, name: str, factor: float) -> None:
    changes = MachineChanges(MACHINE, (Phase(0),), Factors(**{name: factor}))
    loop = run_closed_loop(demo.core, demo.trace.model, changes, 8, n_tokens=256, policy="mrs")
    assert loop.worst_to_oracle_last_third <= 1.05
    if name != "dram":  # nothing may come near the ceiling, and then it stays what it was
        assert abs(math.log(getattr(loop.windows[-1].believed, name))) < 0.5 * math.log(10)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "waits",
            MachineChanges(
                MACHINE, (Phase(0), Phase(64, disturbance=Disturbance(waits_every_layers=1, waits_us=1e5)), Phase(84))
            ),
        ),
        ("cpu", MachineChanges(MACHINE, (Phase(0), Phase(64, Factors(cpu=200.0)), Phase(124)))),
    ],
)
def test_what_was_very_slow_is_not_given_up(demo: Loaded, name: str, changes: MachineChanges) -> None:
    """A trial seems to cost more than the credit that is usually kept."""
    loop = run_closed_loop(demo.core, demo.trace.model, changes, 8, n_tokens=6000, policy="mrs")
    assert loop.worst_to_oracle_last_third <= 1.05, name


# The bounds: tools/closed_loop_matrix.py has the scenarios.


def broken_bounds(found: list[Cell]) -> str:
    lines = [line for cell in found for line in cell.unknown_breaks]
    n_broken = sum(bool(cell.unknown_breaks) for cell in found)
    return "\n".join([f"{n_broken} of {len(found)} runs break a bound", *lines]) if lines else ""


def test_disturbances_are_got_over() -> None:
    broken = broken_bounds(list(cells(real_trace_path("deepseek-v2-lite"), n_devices=(1,), shares=(0.5,))))
    assert not broken, broken


@pytest.mark.slow
def test_disturbances_are_got_over_everywhere() -> None:
    broken = broken_bounds([cell for name in TRACES for cell in cells(real_trace_path(name))])
    assert not broken, broken


# The guard on a virtual card.


def virtual_card(name: str, demo: Loaded, changes: MachineChanges, share: float, n_tokens: int) -> ClosedLoop:
    trace, model = (demo.core, demo.trace.model) if name == "demo" else read_trace(real_trace_path(name))
    policy = "ema:alpha=0.1" if trace.weights is None else "mrs"
    return run_closed_loop(trace, model, changes, int(share * trace.n_expert), n_tokens=n_tokens, policy=policy)


@pytest.mark.parametrize("name", ["demo", *TRACES])
def test_the_guard_rests_where_all_experts_are_resident(demo: Loaded, name: str) -> None:
    loop = virtual_card(name, demo, MachineChanges(MACHINE, (Phase(0),)), 1.0, 2000)
    assert {w.guard for w in loop.windows} == {"full"}
    assert max(w.to_plain for w in loop.windows) <= 1.03


# Of Qwen3's experts half fit those that its short trace asks for, so that its link hardly matters.
@pytest.mark.parametrize(
    ("name", "share"),
    [*((name, share) for name in ("demo", "deepseek-v2-lite") for share in (0.25, 0.5, 0.75)), ("qwen3-30b-a3b", 0.25)],
)
def test_the_guard_gives_way_to_a_slow_link_and_comes_back(demo: Loaded, name: str, share: float) -> None:
    """Costs do not follow: the guard alone sees that copies take ten times what they are believed to take."""
    begin, end = 512, 1024
    phases = (Phase(0), Phase(begin, Factors(link=10.0)), Phase(end))
    loop = virtual_card(name, demo, MachineChanges(MACHINE, phases, live=False), share, end + 1024)

    def levels(first: int, last: int) -> list[str]:
        return [w.guard for w in loop.windows if first <= w.first_token < last]

    assert set(levels(0, begin)) == {"full"}
    assert levels(begin, begin + 64)[-1] != "full"
    assert "full" in levels(end, end + 512) and levels(end + 512, end + 1024)[-1] == "full"
