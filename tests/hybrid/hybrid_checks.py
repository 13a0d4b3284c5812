"""Settings under which the work goes to an accelerator, and what the counters must say then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sides import Difference, Reply, Side, compare

# A test's calibration: the CPU is so slow that every plan that may use the accelerator does.
FORCED = {"cpu_us": 1000, "gpu_us": 1, "copy_us": 10}
# Prompts of these lengths, each followed by single tokens. The first pass of a context only learns the layers.
PREFILL = [3, 7, 33]

# Every key: the worker process keeps what a request does not name.
_SETTINGS: dict[str, Any] = {
    "cpu_kernels": "ggml",
    "devices": ["CPU"],
    "expert_cache": 1,
    "fit_margin_bytes": 0,
    "cache_policy": "mrs",
    "schedule": "two-threshold",
    "prefetch": "none",
    "admission": "always",
    "guard": False,
    "live_costs": False,
    "reproducible": False,
    "costs": FORCED,
    "max_batch_tokens": 512,
    "route_trace": "",
    "throttle_link_bytes_per_s": 0,
    "state_path": "",
    "log_to_stderr": False,
    "pin_experts": False,
    "faults": {},
}


def settings_of(**changes: Any) -> dict[str, Any]:
    """Settings of the plug-in (hybrimoe_configure): a CPU as accelerator and all work forced onto it, but `changes`."""
    unknown = changes.keys() - _SETTINGS.keys()
    assert not unknown, unknown
    return {**_SETTINGS, **changes}


def total(reply: Reply, counter: str) -> Any:
    """A counter's sum over layers."""
    return sum(layer[counter] for layer in reply.layers.values())


def events(reply: Reply, part: str) -> list[str]:
    """The dispatch's events that contain `part`."""
    return [line for line in reply.facts["events"] if part in line]


def ask_both(
    plain: Side, hybrid: Side, path: Path, settings: dict[str, Any], **options: Any
) -> tuple[Reply, Difference]:
    """The plug-in's reply to a `logits` scenario under `settings`, and how it differs from plain llama.cpp's."""
    options = {"prefill": PREFILL, "decode": 4, **options}
    got = hybrid.ask("logits", path, settings=settings, **options)
    return got, compare(plain.ask("logits", path, **options), got)


def check_used(reply: Reply, *, evictions: bool = True) -> None:
    """Experts were computed on an accelerator, in every layer; copied to it, and driven out again."""
    assert reply.facts["state"]["phase"] == "ready", reply.facts["events"]
    assert total(reply, "n_blocks") > 0 and total(reply, "n_blocks_delegated") == 0
    for counts in reply.layers.values():
        assert counts["n_experts_gpu"] > 0, counts
        assert counts["n_hits"] + counts["n_misses"] > 0
        assert counts["n_late"] <= counts["n_misses"]
    assert sum(device["copied_bytes"] for device in reply.facts["state"]["devices"]) > 0
    if evictions:
        assert total(reply, "n_evictions") > 0
        assert total(reply, "n_copies") > 0
        assert total(reply, "h2d_bytes") > 0
