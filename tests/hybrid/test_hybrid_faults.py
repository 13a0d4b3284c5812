"""What goes wrong on purpose: slow, failing and stuck copies, and memory that runs out. The answer goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hybrid_checks import PREFILL, ask_both, check_used, events, settings_of, total
from sides import Side

N_SLOTS = 3
N_LAYERS = 2  # of the tiny models with experts in every layer


@pytest.fixture
def check(plain: Side, hybrid: Side, tiny_model: Callable[..., Path]) -> Callable[..., Any]:
    """`check(faults, **changes)`: the logits equal plain llama.cpp's; the plug-in's reply."""

    def run(faults: dict[str, int], decode: int = 12, prefill: Sequence[int] = PREFILL, **changes: Any) -> Any:
        settings = settings_of(**{"expert_cache": N_SLOTS, "faults": faults, **changes})
        model = tiny_model("qwen3moe", "Q4_0")
        got, difference = ask_both(plain, hybrid, model, settings, prefill=list(prefill), decode=decode)
        assert difference.is_equal, difference
        return got

    return run


@pytest.mark.parametrize("n_slots", [1, 3, 8])
@pytest.mark.parametrize("devices", [["CPU"], ["CPU", "CPU"]])
def test_slow_copies(check: Callable[..., Any], n_slots: int, devices: list[str]) -> None:
    """Copies are still under way when their experts are wanted again, and slots are wanted that they fill."""
    got = check({"delay_copy_us": 1500}, expert_cache=n_slots, devices=devices, prefetch="path")
    check_used(got)
    assert got.facts["state"]["stats"]["n_failed"] == 0
    assert not [device for device in got.facts["state"]["devices"] if device["suspended"]]


def test_late_copies(check: Callable[..., Any]) -> None:
    """Idle-time copies that come late: the step waits for them, or the CPU computes their experts."""
    # A copy costs less than the CPU's expert, so all misses are demanded; more, so some are admitted for later.
    got = check({"delay_copy_us": 1500}, expert_cache=6, costs={"cpu_us": 100, "gpu_us": 1, "copy_us": 150}, decode=40)
    check_used(got)
    assert got.facts["state"]["stats"]["n_admitted"] > 0
    assert total(got, "n_late") > 0


@pytest.mark.parametrize("every", [1, 2, 7])
def test_failing_copies(check: Callable[..., Any], every: int) -> None:
    """The CPU computes what could not be copied; a failed expert is not resident."""
    got = check({"fail_copy_every": every})
    stats = got.facts["state"]["stats"]
    assert stats["n_failed"] > 0
    resident = [at for experts in got.facts["residency"].values() for at in experts if at >= 0]
    if every == 1:
        assert not resident and total(got, "n_hits") == 0
        assert got.facts["state"]["devices"][0]["copied_bytes"] == 0
    else:
        check_used(got)
        assert resident and total(got, "n_hits") > 0
    assert len(events(got, "cop")) <= 3, "one warning, not one for each copy"
    assert events(got, "failed"), "copies that fail are said to"


def test_failing_copies_of_prefill(check: Callable[..., Any]) -> None:
    """With more experts than slots, prefill streams through scratch slots."""
    got = check({"fail_copy_every": 5}, expert_cache=1, decode=1)
    stats = got.facts["state"]["stats"]
    assert stats["n_streamed"] > 0 and stats["n_failed"] > 0


@pytest.mark.parametrize("at", [1, 9])
def test_stuck_copy(check: Callable[..., Any], at: int) -> None:
    """A copy that does not end: the dispatch loses patience, its experts run on the CPU, and it recovers.

    `at` counts from the first copy after the caches are filled.
    """
    faults = {"stick_copy": N_SLOTS * N_LAYERS + at, "stick_us": 400_000, "copy_patience_us": 150_000}
    got = check(faults, prefill=[3], decode=1000)
    (stuck,) = events(got, "did not end")
    (again,) = events(got, "copies again")
    assert got.facts["events"].index(stuck) < got.facts["events"].index(again)
    assert "its experts run on the CPU" in stuck
    check_used(got)
    assert not got.facts["state"]["devices"][0]["suspended"]


def test_memory_that_others_take(check: Callable[..., Any]) -> None:
    """The cache shrinks while others use the device's memory, grows when it is free again, and says why."""
    whole = check({}, expert_cache=16, decode=3)
    wanted = whole.facts["state"]["devices"][0]["cache_bytes"]
    # At the second and the third look (one in 64 passes) nothing is free: each gives back what the margin lacks.
    faults = {"free_bytes": 1 << 30, "scarce_from": 2, "scarce_until": 4, "scarce_bytes": 0}
    options = {"expert_cache": "auto", "fit_margin_bytes": int(wanted / 4), "prefill": [3]}
    small = check(faults, decode=64 * 3 + 10, **options)
    (device,) = small.facts["state"]["devices"]
    assert device["n_slots"] == [8, 8]
    assert device["cache_bytes"] == wanted / 2
    check_used(small)
    large = check(faults, decode=64 * 5 + 10, **options)
    (device,) = large.facts["state"]["devices"]
    assert device["n_slots"] == [11, 11]  # 70 % of 16
    changes = [line.split("expert cache ")[1] for line in events(large, "GiB are kept")]
    assert [change.split(" % ->")[0] for change in changes] == ["100", "75", "50", "60"]
    check_used(large)


def memory_warnings(reply: Any) -> list[str]:
    return [line for line in reply.facts["events"] if "memory" in line]


def test_out_of_memory_at_every_allocation(check: Callable[..., Any]) -> None:
    """From the n-th allocation on the device gives nothing: at the start, for slots, for scratch, for a prompt's work
    memory. Fewer experts or none are cached, and said so; not again and again."""
    n_gpu = []
    for n in range(1, 40):
        got = check({"fail_alloc_from": n}, decode=3)
        n_gpu.append(total(got, "n_experts_gpu"))
        warnings = memory_warnings(got)
        if not warnings:
            break
        assert len(set(warnings)) == len(warnings) <= 3, warnings  # slots, scratch slots, a prompt's work memory
    assert n >= 6, "decode's work memory, two layers' slots, scratch slots and a prompt's work memory at least"
    assert n_gpu[:2] == [0, 0]  # no work memory; no slots
    assert all(0 < some <= n_gpu[-1] for some in n_gpu[2:])
    assert n_gpu[4] < n_gpu[-1]  # prompts on the CPU, single tokens not
    check_used(got)


@pytest.mark.parametrize("n", range(1, 9))
def test_memory_that_is_missing_once(check: Callable[..., Any], n: int) -> None:
    got = check({"fail_alloc_from": n, "fail_alloc_until": n}, decode=3)
    assert 1 <= len(memory_warnings(got)) <= 2
    if n > 1:  # without decode's work memory the device is left out
        check_used(got)


def test_two_accelerators_one_without_memory(check: Callable[..., Any]) -> None:
    """The faults count for each device alone: both lose their second layer's slots."""
    got = check({"fail_alloc_from": 3}, decode=3, devices=["CPU", "CPU"], expert_cache=4)
    devices = got.facts["state"]["devices"]
    assert [device["n_slots"] for device in devices] == [[2, 0]] * 2
    first, second = got.facts["residency"].values()
    assert {0, 1} <= set(first) and set(second) == {-1}
