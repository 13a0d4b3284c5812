"""Several accelerators, of unequal size, and the ways to size their caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hybrid_checks import ask_both, check_used, events, settings_of, total
from sides import Reply, Side

MODELS = [("deepseek2-merged", "Q4_0", None), ("gpt-oss", "Q8_0", "MXFP4"), ("qwen3moe", "Q4_K", None)]


def held(reply: Reply) -> set[int]:
    """The accelerators that hold experts, -1 for none."""
    return {device for experts in reply.facts["residency"].values() for device in experts}


@pytest.mark.parametrize(("arch", "kind", "expert_type"), MODELS)
@pytest.mark.parametrize("n_slots", [2, 5])
def test_two_accelerators(
    plain: Side,
    hybrid: Side,
    tiny_model: Callable[..., Path],
    arch: str,
    kind: str,
    expert_type: str | None,
    n_slots: int,
) -> None:
    """Experts of one layer lie on both; each computes its own."""
    path = tiny_model(arch, kind, expert_type)
    settings = settings_of(devices=["CPU", "CPU"], expert_cache=n_slots)
    got, difference = ask_both(plain, hybrid, path, settings, decode=8)
    assert difference.is_equal, difference
    check_used(got)
    devices = got.facts["state"]["devices"]
    assert len(devices) == 2 and all(device["copied_bytes"] > 0 for device in devices)
    # "slots per layer, all devices together": rounded up for each.
    assert [device["n_slots"][0] for device in devices] == [(n_slots + 1) // 2] * 2
    assert {0, 1} <= held(got)


def test_unequal_accelerators(plain: Side, hybrid: Side, tiny_model: Callable[..., Path]) -> None:
    """All experts are taken by the first as far as it has slots; the second gets what is left."""
    path = tiny_model("mixtral", "Q4_0")  # 8 experts
    settings = settings_of(devices=["CPU", "CPU", "CPU"], expert_cache=7)
    got, difference = ask_both(plain, hybrid, path, settings)
    assert difference.is_equal, difference
    check_used(got, evictions=False)
    assert [device["n_slots"][0] for device in got.facts["state"]["devices"]] == [3, 3, 2]
    assert held(got) == {0, 1, 2}


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_two_accelerators_with_own_kernels(
    plain: Side, hybrid: Side, tiny_model: Callable[..., Path], kind: str
) -> None:
    path = tiny_model("gpt-oss", kind)
    settings = settings_of(cpu_kernels="auto", devices=["CPU", "CPU"], expert_cache=4, prefetch="impact")
    got, difference = ask_both(plain, hybrid, path, settings, decode=8)
    assert difference.nmse <= (1e-6 if kind == "F32" else 2e-3), difference
    check_used(got)


@pytest.mark.parametrize(
    ("size", "n_slots"), [({"fraction": 0.25}, 4), ({"fraction": 1.0}, 16), ({"fraction": 0.01}, 0), (0, 0)]
)
def test_sizes(plain: Side, hybrid: Side, tiny_model: Callable[..., Path], size: Any, n_slots: int) -> None:
    path = tiny_model("qwen3moe", "Q4_0")
    got, difference = ask_both(plain, hybrid, path, settings_of(expert_cache=size))
    assert difference.is_equal
    if n_slots == 0:
        assert total(got, "n_experts_gpu") == 0 and got.facts["state"]["devices"] == []
        assert len(got.facts["events"]) == (0 if size == 0 else 1)  # nothing to say where none were wanted
    else:
        check_used(got, evictions=n_slots < 16)
        assert got.facts["state"]["devices"][0]["n_slots"] == [n_slots] * 2


def test_size_in_bytes(plain: Side, hybrid: Side, tiny_model: Callable[..., Path]) -> None:
    """As many slots as fit, one more in the first layers; never more bytes than allowed."""
    path = tiny_model("qwen3moe", "Q4_0")
    whole, _ = ask_both(plain, hybrid, path, settings_of(expert_cache=16))
    expert_bytes = whole.facts["state"]["devices"][0]["cache_bytes"] / 32
    budget = int(5.5 * expert_bytes * 2) + 1
    got, difference = ask_both(plain, hybrid, path, settings_of(expert_cache={"bytes": budget}))
    assert difference.is_equal
    check_used(got)
    (device,) = got.facts["state"]["devices"]
    assert device["n_slots"] == [6, 5]
    assert device["cache_bytes"] <= budget


def test_automatic_size(plain: Side, hybrid: Side, tiny_model: Callable[..., Path]) -> None:
    """What the device reports as free, less the margin and work memory."""
    path = tiny_model("qwen3moe", "Q4_0")
    n_slots = []
    for free, margin in ((1 << 30, 0), (1 << 30, 1 << 30), (0, 0)):
        settings = settings_of(expert_cache="auto", fit_margin_bytes=margin, faults={"free_bytes": free})
        got, difference = ask_both(plain, hybrid, path, settings)
        assert difference.is_equal
        n_slots.append([device["n_slots"] for device in got.facts["state"]["devices"]])
        if free == margin or free == 0:
            assert events(got, "no memory on the accelerator is free for experts")
            assert got.facts["state"]["given_up"] == "no memory on the accelerator is free for experts"
        else:
            assert got.facts["state"]["given_up"] is None
    assert n_slots == [[[16, 16]], [], []]


def test_unknown_device(plain: Side, hybrid: Side, tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("mixtral", "Q4_0")
    got, difference = ask_both(plain, hybrid, path, settings_of(devices=["CUDA7"]))
    assert difference.is_equal
    assert total(got, "n_experts_gpu") == 0
    assert events(got, 'ggml has no device "CUDA7"')
    assert 'ggml has no device "CUDA7"' in got.facts["state"]["given_up"]
