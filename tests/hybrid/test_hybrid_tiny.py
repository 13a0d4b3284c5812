"""A second CPU backend as accelerator, tiny models: the logits stay those of plain llama.cpp, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hybrid_checks import ask_both, check_used, settings_of, total
from sides import Side

from hybrimoe.gguf_model import inspect

# Separate and merged gate_up, biases, expert scales, no gate, one expert a token, weights before the experts.
KINDS = [
    ("mixtral", "Q4_0", None),
    ("qwen3moe", "Q4_K", None),
    ("deepseek2-merged", "Q8_0", None),
    ("gpt-oss", "Q8_0", "MXFP4"),
    ("nogate", "F32", None),
    ("llama4", "Q4_0", None),
    ("top1", "Q4_0", None),
    ("nemotron-h", "F32", None),
]


def slot_counts(path: Path) -> dict[str, int]:
    """Slots per layer: one, as many as a token needs, half of the experts, all."""
    model = inspect(path).require_moe()
    top_k = max(layer.n_experts_used for layer in model.moe_layers)
    n_experts = max(layer.n_experts for layer in model.moe_layers)
    return {"one": 1, "top-k": top_k, "half": n_experts // 2, "all": n_experts}


@pytest.mark.parametrize("slots", ["one", "top-k", "half", "all"])
@pytest.mark.parametrize(("arch", "kind", "expert_type"), KINDS)
def test_slots(
    plain: Side,
    hybrid: Side,
    tiny_model: Callable[..., Path],
    arch: str,
    kind: str,
    expert_type: str | None,
    slots: str,
) -> None:
    path = tiny_model(arch, kind, expert_type)
    n_slots = slot_counts(path)[slots]
    got, difference = ask_both(plain, hybrid, path, settings_of(expert_cache=n_slots))
    assert difference.is_equal, difference
    check_used(got, evictions=slots != "all")
    (device,) = got.facts["state"]["devices"]
    assert all(n <= n_slots for n in device["n_slots"]) and max(device["n_slots"]) == n_slots
    for experts in got.facts["residency"].values():  # copies under way do not count
        assert sum(at == 0 for at in experts) <= n_slots and set(experts) <= {-1, 0}
    if slots == "all":
        assert all(set(experts) == {0} for experts in got.facts["residency"].values())
        assert total(got, "n_misses") == 0 and total(got, "n_copies") == 0
