"""`--reproducible`: what runs where is fixed at set-up, so that two runs give the same bits whatever the timings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hybrid_checks import settings_of, total
from sides import Side, compare

from hybrimoe.cli.main import main
from hybrimoe.errors import UsageError
from hybrimoe.expert_options import ExpertOptions

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


@pytest.mark.parametrize(
    "flags", [["--cache-policy", "lru"], ["--schedule", "cpu-only"], ["--prefetch", "path"], ["--guard", "on"]]
)
def test_flags_that_it_leaves_nothing_to_decide(capfd: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert main(["run", "--reproducible", *flags, "--print-config"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: --reproducible and {flags[0]} exclude each other") and len(lines) == 2


def test_options_that_it_leaves_nothing_to_decide() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        ExpertOptions(reproducible=True, prefetch="path")._check_reproducible()
    ExpertOptions(reproducible=True)._check_reproducible()
