"""Every policy of the core in the real dispatch: other experts on the accelerator, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hybrid_checks import ask_both, check_used, settings_of, total
from sides import Side

from hybrimoe.native.core import Kind, policies

EVICTION = [p.name for p in policies(Kind.EVICTION) if not p.oracle]
PREFETCH = [p.name for p in policies(Kind.PREFETCH)]
SCHEDULE = [p.name for p in policies(Kind.SCHEDULER)]
ADMISSION = [p.name for p in policies(Kind.ADMISSION)]
MODEL = ("qwen3moe", "Q4_0")  # 16 experts, top-4
DECODE = 12


@pytest.fixture
def check(plain: Side, hybrid: Side, tiny_model: Callable[..., Path]) -> Callable[..., Any]:
    """`check(**changes)`: the logits under these settings equal plain llama.cpp's; the plug-in's reply."""

    def run(model: tuple[str, str] = MODEL, **changes: Any) -> Any:
        settings = settings_of(**{"expert_cache": 5, **changes})
        got, difference = ask_both(plain, hybrid, tiny_model(*model), settings, decode=DECODE)
        assert difference.is_equal, difference
        return got

    return run


@pytest.mark.parametrize("name", EVICTION)
def test_eviction(check: Callable[..., Any], name: str) -> None:
    got = check(cache_policy=name)
    if name == "static":  # never lets go of what it has; misses go through scratch slots or to the CPU
        assert total(got, "n_evictions") == 0 and total(got, "n_hits") > 0
    else:
        check_used(got)


@pytest.mark.parametrize("name", SCHEDULE)
def test_schedule(check: Callable[..., Any], name: str) -> None:
    got = check(schedule=name)
    stats = got.facts["state"]["stats"]
    if name == "static":  # every layer on the CPU unless its parameter says otherwise
        assert total(got, "n_experts_gpu") == 0
    elif name == "cpu-only":  # misses are: nothing waits for a copy
        n_hits, n_late = total(got, "n_hits"), total(got, "n_late")  # late ones may be waited for
        assert 0 < n_hits <= total(got, "n_experts_gpu") <= n_hits + n_late
        assert stats["n_demanded"] == stats["n_streamed"] == 0
    else:
        check_used(got)
        assert stats["n_demanded"] + stats["n_streamed"] > 0


def test_parameters_of_policies(check: Callable[..., Any]) -> None:
    """One layer of two stays on the CPU."""
    got = check(schedule="static:n_cpu_layers=1", cache_policy="mrs:alpha=0.5")
    first, *others = (layer["n_experts_gpu"] for layer in got.layers.values())
    assert first == 0 and all(n > 0 for n in others)


@pytest.mark.parametrize("name", ADMISSION)
def test_admission(check: Callable[..., Any], name: str) -> None:
    # A copy pays when an expert's expected uses save more than it costs: here they do.
    got = check(admission=name, costs={"cpu_us": 1000, "gpu_us": 1, "copy_us": 10})
    check_used(got)


def test_admission_that_does_not_pay(check: Callable[..., Any]) -> None:
    """Copies that cost more than the CPU: what the cache holds from the start stays, and is used."""
    got = check(admission="pays", costs={"cpu_us": 10, "gpu_us": 1, "copy_us": 100000})
    assert total(got, "n_evictions") == 0 and total(got, "n_copies") == 0
    assert total(got, "n_hits") > 0 and total(got, "n_experts_gpu") > 0


@pytest.mark.parametrize("name", PREFETCH)
def test_prefetch(check: Callable[..., Any], name: str) -> None:
    """With ggml's kernels there is no look-ahead; those that learn from what was routed go on without it."""
    check_used(check(prefetch=name))


@pytest.mark.parametrize("name", PREFETCH)
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_prefetch_with_own_kernels(
    plain: Side, hybrid: Side, tiny_model: Callable[..., Path], name: str, kind: str
) -> None:
    """Our kernels round otherwise than ggml's, which the accelerator here uses: in F32 only sums are in another order,
    and 8-bit weights cost what the parity tests allow llama.cpp's own repacked kernels."""
    settings = settings_of(
        cpu_kernels="auto", prefetch=name, expert_cache=5, costs={"cpu_us": 1000, "gpu_us": 1, "copy_us": 300}
    )
    got, difference = ask_both(plain, hybrid, tiny_model("qwen3moe", kind), settings, decode=DECODE)
    assert difference.nmse <= (1e-6 if kind == "F32" else 2e-3), difference
    check_used(got)
    n_prefetched = total(got, "n_prefetched")
    assert n_prefetched == got.facts["state"]["stats"]["n_prefetched"]
    if name == "none":
        assert n_prefetched == 0
        assert all(one["n_wanted"] == 0 for one in got.facts["state"]["look_ahead"])
    elif name in ("next-layer", "impact", "fate"):
        assert n_prefetched > 0
        near = got.facts["state"]["look_ahead"][0]
        assert near["distance"] == 1 and 0 < near["n_right"] <= near["n_wanted"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cache_policy": "belady"}, "knows the future"),
        ({"cache_policy": "nonsense"}, "nonsense"),
        ({"schedule": "two-threshold:nonsense=1"}, "nonsense"),
        ({"prefetch": "impact:"}, ""),
        ({"admission": "pays:stay"}, "parameter=number"),
    ],
)
def test_unusable_policies(
    plain: Side, hybrid: Side, tiny_model: Callable[..., Path], changes: dict[str, str], reason: str
) -> None:
    """The answer goes on, and one event says why no accelerator takes part."""
    got, difference = ask_both(plain, hybrid, tiny_model(*MODEL), settings_of(**changes))
    assert difference.is_equal
    if not reason:
        check_used(got)
        return
    assert total(got, "n_experts_gpu") == 0
    (event,) = got.facts["events"]
    assert reason in event and "all experts on the CPU" in event
