"""A distribution's own programs with the test device (native/tests/device) as their GPU: another release of ggml's
interface than the pin's, and a GPU that stands before the CPU, as in programs with CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from .conftest import EXPERTS, Host, greedy

pytestmark = pytest.mark.hosts

PROMPTS = ("The quick brown fox", "Once upon a time there was a river. " * 12)
COMMON = ("-c", "512", "-t", "2", "--no-repack", "-np", "1", "-fa", "off", "-v")
SETTINGS = {"devices": ["TEST0"], "expert_cache": 4, "guard": False, "schedule": "gpu-only", "live_costs": False}


@pytest.fixture
def with_device(distribution: Host, device_module: Path, tmp_path: Path) -> Host:
    """The distribution's programs in a folder of modules with the device, under the name of one that they look for."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for module in distribution.folder.iterdir():
        (folder / module.name).symlink_to(module.resolve())
    (folder / "libggml-cuda.so").symlink_to(device_module)
    return replace(distribution, folder=folder)


@pytest.mark.parametrize("mode", ["lazy", "random"])
@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
def test_answers_are_the_cpu_s(
    distribution: Host, with_device: Host, tiny_model: Callable[..., Path], tmp_path: Path, arch: str, mode: str
) -> None:
    model, settings = tiny_model(arch, "Q8_0"), {"HYBRIMOE_CPU": "ggml", "HYBRIMOE_TEST_DEVICE_MODE": mode}
    environment = distribution.environment(plugin=False)
    with distribution.server(model, *COMMON, environment=environment, log=tmp_path / "cpu") as port:
        on_cpu = greedy(port, PROMPTS)
    for plugin, more in ((False, ()), (True, ("-ot", EXPERTS))):
        environment = with_device.environment(plugin, SETTINGS, **settings)
        log, trace = tmp_path / f"log {plugin}", tmp_path / f"trace {plugin}"
        environment["HYBRIMOE_TEST_DEVICE_TRACE"] = str(trace)
        with with_device.server(model, *COMMON, "-ngl", "99", *more, environment=environment, log=log) as port:
            assert greedy(port, PROMPTS) == on_cpu
        assert trace.read_text().count('"kind": "graph"') > 24 * len(PROMPTS)
        assert ("HybriMoE model buffer size" in log.read_text(errors="replace")) == plugin
