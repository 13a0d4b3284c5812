"""Experts on ggml's Vulkan backend, part of them cached: right answers, other rounding."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vulkan
TESTS = Path(__file__).resolve().parents[1]

# Forward passes in a process with the device: what a request's keys say, see llama_forward.Model.
FORWARD = """
import json, sys
sys.path[:0] = [sys.argv[1] + "/../tools", sys.argv[1] + "/hybrid", sys.argv[1] + "/parity"]
from dataclasses import asdict
import numpy as np
from hybrimoe.native.backend_modules import backend_module_paths
from hybrimoe.placement import Placement
from llama_forward import Context, Model
request = json.loads(sys.argv[2])
settings = request["settings"]
options = dict(plugin=settings is not None, repack=False, settings=settings, backends=backend_module_paths(),
               n_gpu_layers=request["n_gpu_layers"])
if settings is None:
    options["placement"] = Placement(cpu_moe=True)
with Model(request["model"], **options) as model:
    with Context(model, n_ctx=256, n_batch=64, op_offload=False) as context:
        tokens = model.tokenize(request["text"]) if request["text"] else [3 + 7 * i % 500 for i in range(20)]
        n, rows = request["n_prompt"] or len(tokens), []
        rows.append(context.forward(tokens[:n], 0)[-1])
        chosen = []
        for i in range(request["n_decode"]):
            chosen.append(int(rows[-1].argmax()) if request["text"] else tokens[n + i])
            rows.append(context.forward([chosen[-1]], n + i)[-1])
        facts = {}
        if model.plugin:
            layers = context.counters()
            facts = {"layers": [asdict(layer) for layer in layers], "state": model.plugin.state(context.instance),
                     "events": [line for _, line in model.plugin.events(context.instance)],
                     "residency": {str(l): on for l, on in model.plugin.residency(context.instance).items()}}
        text = ""
        if request["text"]:
            import ctypes, llama_cpp
            for token in chosen:
                piece = ctypes.create_string_buffer(64)
                size = llama_cpp.llama_token_to_piece(model.vocabulary, token, piece, 64, 0, False)
                text += piece.raw[:size].decode("utf-8", "replace")
print(json.dumps({"logits": np.stack(rows).tolist(), "chosen": chosen, "text": text, **facts}))
"""


def settings_of(**changes: Any) -> dict[str, Any]:
    return {
        "cpu_kernels": "ggml",
        "devices": ["Vulkan0"],
        "cache_policy": "lru",
        "prefetch": "none",
        "admission": "always",
        "guard": False,
        "live_costs": False,
        "costs": {"cpu_us": 1000, "gpu_us": 1, "copy_us": 10},
        "log_to_stderr": False,
        **changes,
    }


@pytest.fixture
def forward(vulkan_environment: dict[str, str]) -> Callable[..., Any]:
    """`forward(model, settings)`: logits and facts; settings None is plain llama.cpp with its experts on the CPU."""

    def run(model: Path, settings: dict[str, Any] | None, **options: Any) -> Any:
        request = {"n_gpu_layers": 0, "text": "", "n_prompt": 6, "n_decode": 4, **options}
        request |= {"model": str(model), "settings": settings}
        command = [sys.executable, "-c", FORWARD, str(TESTS), json.dumps(request)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=vulkan_environment)
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout)

    return run


def nmse(reference: Any, got: Any) -> float:
    import numpy as np

    a, b = np.array(reference["logits"]), np.array(got["logits"])
    assert a.shape == b.shape and np.isfinite(b).all()
    return float(((a - b) ** 2).sum() / (a**2).sum())


def total(reply: Any, counter: str) -> int:
    return sum(layer[counter] for layer in reply["layers"])


def check_used(reply: Any, *, evictions: bool = True) -> None:
    assert reply["state"]["phase"] == "ready", reply["events"]
    (device,) = reply["state"]["devices"]
    assert device["name"].startswith("Vulkan") and device["copied_bytes"] > 0 and device["cache_bytes"] > 0
    assert total(reply, "n_experts_gpu") > 0 and total(reply, "n_blocks_delegated") == 0
    if evictions:
        assert total(reply, "n_evictions") > 0 and total(reply, "h2d_bytes") > 0


@pytest.mark.parametrize(
    ("arch", "kind", "expert_type", "n_slots"),
    [
        ("mixtral", "Q8_0", None, 3),
        pytest.param("qwen3moe", "Q4_K", None, 6, marks=pytest.mark.slow),  # software drivers compile shaders slowly
        ("deepseek2-merged", "Q4_0", None, 4),
        pytest.param("gpt-oss", "Q8_0", "MXFP4", 5, marks=pytest.mark.slow),
        ("nogate", "F32", None, 8),
    ],
)
def test_experts_on_the_device(
    forward: Callable[..., Any],
    tiny_model: Callable[..., Path],
    arch: str,
    kind: str,
    expert_type: str | None,
    n_slots: int,
) -> None:
    """Everything else on the CPU, so the experts' rounding is all that differs."""
    model = tiny_model(arch, kind, expert_type)
    reference = forward(model, None)
    got = forward(model, settings_of(expert_cache=n_slots))
    check_used(got, evictions=n_slots < 8)
    assert 0 < nmse(reference, got) <= 5e-4


def test_dense_layers_there_too(forward: Callable[..., Any], tiny_model: Callable[..., Path]) -> None:
    """Attention and head on the same device as the cached experts: as stock with the same dense layers on it."""
    model = tiny_model("mixtral", "Q8_0")
    reference = forward(model, None, n_gpu_layers=99)
    got = forward(model, settings_of(expert_cache=3), n_gpu_layers=99)
    check_used(got)
    assert nmse(reference, got) <= 5e-4


def test_failing_and_slow_copies(forward: Callable[..., Any], tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("mixtral", "Q8_0")
    reference = forward(model, None)
    faults = {"fail_copy_every": 4, "delay_copy_us": 500}
    got = forward(model, settings_of(expert_cache=3, faults=faults))
    check_used(got)
    assert got["state"]["stats"]["n_failed"] > 0
    assert nmse(reference, got) <= 5e-4


def test_no_memory(forward: Callable[..., Any], tiny_model: Callable[..., Path]) -> None:
    """No work memory at all, slots for one layer only, no slots to stream a prompt's experts through."""
    model = tiny_model("mixtral", "Q8_0")
    reference = forward(model, None)
    for n in (1, 3, 4):
        got = forward(model, settings_of(expert_cache=3, faults={"fail_alloc_from": n}))
        assert nmse(reference, got) <= 5e-4
        assert [line for line in got["events"] if "memory" in line]


@pytest.mark.slow
def test_demo_model_answers(forward: Callable[..., Any], demo_model: Path) -> None:
    """A quarter of the demo model's experts cached: it still knows the capital of France."""
    text = "The capital of France is"
    got = forward(
        demo_model, settings_of(expert_cache=4, cpu_kernels="auto"), text=text, n_prompt=0, n_decode=8, n_gpu_layers=99
    )
    check_used(got)
    assert "Paris" in got["text"]
    assert all(sum(device == 0 for device in experts) <= 4 for experts in got["residency"].values())
