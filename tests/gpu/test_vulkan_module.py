"""ggml's Vulkan backend as a module in a llama-cpp-python built for the CPU: stock llama.cpp runs on it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vulkan
TOOLS = Path(__file__).resolve().parents[2] / "tools"

DEVICES = """
import json, sys
from hybrimoe.native.backend_modules import backend_module_paths, device_names, load_backend_modules
before = device_names()
new = load_backend_modules(backend_module_paths())
again = load_backend_modules(backend_module_paths())
import llama_cpp
base = sorted({line.split()[-1] for line in open("/proc/self/maps") if "libggml-base" in line})
print(json.dumps({"before": before, "new": new, "again": again, "all": device_names(), "libggml-base": base,
                  "offload": llama_cpp.llama_supports_gpu_offload()}))
"""

FORWARD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from hybrimoe.native.backend_modules import backend_module_paths
from hybrimoe.placement import Placement
from llama_forward import Context, Model
on_gpu = sys.argv[3] == "vulkan"
tokens = [3 + 7 * i % 500 for i in range(8)]
with Model(sys.argv[2], plugin=False, repack=False, backends=backend_module_paths() if on_gpu else (),
           n_gpu_layers=99 if on_gpu else 0, placement=Placement(cpu_moe=True)) as model:
    with Context(model, n_ctx=256, n_batch=16) as context:
        rows = [context.forward(tokens[:6], 0), *(context.forward([t], 6 + i) for i, t in enumerate(tokens[6:]))]
print(json.dumps(np.concatenate(rows).tolist()))
"""


def run(script: str, environment: dict[str, str], *arguments: object) -> Any:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def test_module_brings_its_device_and_no_second_ggml(vulkan_environment: dict[str, str]) -> None:
    facts = run(DEVICES, vulkan_environment)
    assert facts["new"] and facts["new"][0].startswith("Vulkan")
    assert facts["all"] == facts["before"] + facts["new"]
    assert facts["again"] == []
    assert len(facts["libggml-base"]) == 1
    assert facts["offload"]


def test_stock_runs_dense_layers_on_it(vulkan_environment: dict[str, str], tiny_model: Callable[..., Path]) -> None:
    """Experts stay on the CPU; attention and head run on the device."""
    import numpy as np

    model = tiny_model("mixtral", "Q8_0")
    reference = np.array(run(FORWARD, vulkan_environment, TOOLS, model, "cpu"))
    logits = np.array(run(FORWARD, vulkan_environment, TOOLS, model, "vulkan"))
    assert logits.shape == reference.shape
    nmse = ((logits - reference) ** 2).sum() / (reference**2).sum()
    assert 0 < nmse <= 5e-4
