"""Fixtures of tests that need a GPU backend of ggml: skipped where its module or a driver for it is missing.

HYBRIMOE_VULKAN_MODULE names the module; otherwise the one that tools/build_ggml_backend.py has built is taken.
HYBRIMOE_REQUIRE_VULKAN=1 turns the skips into failures, for machines that are set up for these tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[2] / "tools" / "build_ggml_backend.py"
# Software drivers are of type CPU, which ggml passes over unless a device is named.
VULKAN_ENVIRONMENT = {"GGML_VK_VISIBLE_DEVICES": os.environ.get("GGML_VK_VISIBLE_DEVICES", "0")}


def absent(reason: str) -> None:
    if os.environ.get("HYBRIMOE_REQUIRE_VULKAN", "0") not in ("", "0"):
        pytest.fail(f"HYBRIMOE_REQUIRE_VULKAN is set, but {reason}")
    pytest.skip(reason)


def find_module() -> Path:
    given = os.environ.get("HYBRIMOE_VULKAN_MODULE")
    if given:
        if not Path(given).is_file():
            pytest.fail(f"HYBRIMOE_VULKAN_MODULE names no file: {given}")
        return Path(given)
    command = [sys.executable, str(BUILD), "vulkan", "--no-build"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if result.returncode != 0:
        absent(result.stderr.splitlines()[0].removeprefix("error: ") if result.stderr else "no Vulkan module")
    return Path(result.stdout.strip())


@pytest.fixture(scope="session")
def vulkan_module() -> Path:
    """The path of ggml's Vulkan module; a device was seen through it in a process with `VULKAN_ENVIRONMENT`."""
    module = find_module()
    script = (
        "import sys\n"
        "from hybrimoe.errors import HybrimoeError\n"
        "from hybrimoe.native.backend_modules import load_backend_modules\n"
        "try:\n"
        "    print(*load_backend_modules([sys.argv[1]]))\n"
        "except HybrimoeError as error:\n"
        "    sys.exit(str(error))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(module)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **VULKAN_ENVIRONMENT},
    )
    if result.returncode != 0:
        absent(f"{module.name} cannot be used: {result.stderr.strip().splitlines()[-1]}")
    if not result.stdout.split():
        absent("no Vulkan device was found (Debian's software device: mesa-vulkan-drivers)")
    return module


@pytest.fixture(scope="session")
def vulkan_environment(vulkan_module: Path) -> dict[str, str]:
    """The environment of a process that shall use the Vulkan device as if llama.cpp had been built with it."""
    return {**os.environ, **VULKAN_ENVIRONMENT, "HYBRIMOE_BACKENDS": str(vulkan_module)}
