"""`--reproducible`: what runs where is fixed at set-up, so that two runs give the same bits whatever the timings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hybrid_checks import settings_of, total
from sides import Side, compare

DISTURBANCES: dict[str, dict[str, Any]] = {
    "slow copies": {"faults": {"delay_copy_us": 2000}},
    "a slow link": {"throttle_link_bytes_per_s": 1_000_000},
    "other costs": {"costs": {"cpu_us": 1, "gpu_us": 1000, "copy_us": 1}},
    "live costs and guard": {"live_costs": True, "guard": True, "prefetch": "path"},
}


@pytest.mark.parametrize("kernels", ["ggml", "auto"])
@pytest.mark.parametrize("name", DISTURBANCES)
def test_same_bits_whatever_disturbs(hybrid: Side, tiny_model: Callable[..., Path], kernels: str, name: str) -> None:
    path = tiny_model("qwen3moe", "Q4_0")
    options = {"prefill": [5, 40], "decode": 100}
    base = {"cpu_kernels": kernels, "expert_cache": {"fraction": 0.5}, "reproducible": True}
    first = hybrid.ask("logits", path, settings=settings_of(**base), **options)
    second = hybrid.ask("logits", path, settings=settings_of(**base, **DISTURBANCES[name]), **options)
    assert compare(first, second).is_equal
    assert first.facts["residency"] == second.facts["residency"]
    for got in (first, second):
        state = got.facts["state"]
        assert state["reproducible"] == {"on": True, "holds": True}
        assert total(got, "n_copies") == total(got, "n_evictions") == 0
        on_device = {layer: {at >= 0 for at in where} for layer, where in got.facts["residency"].items()}
        assert sorted(map(sorted, on_device.values())) == [[False], [True]]  # one of the two layers, whole
        assert any(counts["n_experts_gpu"] > 0 for counts in got.layers.values())


def test_equals_plain_llama_cpp(plain: Side, hybrid: Side, tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("qwen3moe", "Q4_0")
    options = {"prefill": [3, 33], "decode": 12}
    got = hybrid.ask("logits", path, settings=settings_of(expert_cache={"fraction": 0.5}, reproducible=True), **options)
    assert compare(plain.ask("logits", path, **options), got).is_equal


def test_what_earlier_runs_kept_is_neither_read_nor_changed(
    hybrid: Side, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    path, state = tiny_model("qwen3moe", "Q4_0"), tmp_path / "state.json"
    options = {"prefill": [5], "decode": 12}
    hybrid.ask(
        "logits", path, settings=settings_of(expert_cache=5, cache_policy="lru", state_path=str(state)), **options
    )
    kept = state.read_bytes()
    fixed = {"expert_cache": {"fraction": 0.5}, "reproducible": True}
    without = hybrid.ask("logits", path, settings=settings_of(**fixed), **options)
    for text in (kept, b"no state"):
        state.write_bytes(text)
        before = state.stat()
        got = hybrid.ask("logits", path, settings=settings_of(**fixed, state_path=str(state)), **options)
        assert compare(without, got).is_equal and got.facts["residency"] == without.facts["residency"]
        assert not [line for line in got.facts["events"] if "cold" in line or "state" in line]
        after = state.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns) and state.read_bytes() == text
    state.unlink()
    hybrid.ask("logits", path, settings=settings_of(**fixed, state_path=str(state)), **options)
    assert list(tmp_path.iterdir()) == []
