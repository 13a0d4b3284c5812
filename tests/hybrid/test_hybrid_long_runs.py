"""Thousands of steps: the same numbers to the last one, and nothing that grows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hybrid_checks import check_used, settings_of
from sides import Side, compare

TinyModel = Callable[..., Path]

_MIB = 1 << 20
# What an allocator may keep beyond what it had after the first steps.
_SLACK_BYTES = 8 * _MIB
_EVICTING: dict[str, Any] = {"expert_cache": 2, "prefetch": "impact"}


def check_flat(usage: list[dict[str, int]]) -> None:
    settled, last = usage
    assert last["n_fds"] == settled["n_fds"] and last["n_threads"] == settled["n_threads"], usage
    assert last["rss"] <= settled["rss"] + _SLACK_BYTES, usage


@pytest.mark.parametrize("n_tokens", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_greedy_answers_do_not_drift(plain: Side, hybrid: Side, tiny_model: TinyModel, n_tokens: int) -> None:
    """Every token, and every bit of every step's logits, under constant eviction and prefetch."""
    path = tiny_model("qwen3moe", "Q4_0")
    got = hybrid.ask("long_greedy", path, n_tokens=n_tokens, settings=settings_of(**_EVICTING))
    reference = plain.ask("long_greedy", path, n_tokens=n_tokens)
    assert len(reference.arrays["tokens"]) == n_tokens
    assert np.array_equal(got.arrays["tokens"], reference.arrays["tokens"])
    assert np.array_equal(got.arrays["sums"], reference.arrays["sums"])
    check_used(got)


@pytest.mark.parametrize("n_steps", [2_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_nothing_grows(hybrid: Side, tiny_model: TinyModel, n_steps: int) -> None:
    """Memory, file descriptors and threads, with live costs, the guard, copies, evictions and a recording's ring."""
    settings = settings_of(**_EVICTING, live_costs=True, guard=True, cpu_kernels="auto")
    got = hybrid.ask("usage", tiny_model("qwen3moe", "Q4_0"), n_steps=n_steps, n_settle=1_000, settings=settings)
    check_flat(got.facts["usage"])
    assert sum(layer["n_copies"] for layer in got.layers.values()) > 0


def test_loaded_and_freed_fifty_times(plain: Side, hybrid: Side, tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3moe", "Q4_0")
    options = {"times": 50, "n_settle": 10}
    got = hybrid.ask("reload", path, settings=settings_of(**_EVICTING), **options)
    check_flat(got.facts["usage"])
    assert compare(plain.ask("reload", path, **options), got).is_equal


def test_two_engines_with_settings_of_their_own(plain: Side, hybrid: Side, tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3moe", "Q4_0")
    one, other = settings_of(expert_cache=1), settings_of(expert_cache=4, cache_policy="lru", schedule="gpu-only")
    got = hybrid.ask("two_engines", path, settings=one, engines=[one, other, settings_of(devices=[])])
    reference = plain.ask("two_engines", path, engines=[{}, {}, {}])
    assert compare(reference, got).is_equal
    first, second, third = got.facts["engines"]
    assert len({first["instance"], second["instance"], third["instance"]}) == 3
    slots = [engine["state"]["devices"][0]["n_slots"] for engine in (first, second)]
    assert set(slots[0]) == {1} and set(slots[1]) == {4}
    assert not third["state"]["devices"]
