"""Fixtures of the profile's tests: one profile of a tiny model with a stand-in accelerator, shared by all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from profile_checks import STAND_IN, Made, make, run_in

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def profile(tmp_path: Path) -> Run:
    """`profile(arguments...)` runs `hybrimoe profile` in an empty folder, as a user without settings."""
    return lambda *arguments: run_in(tmp_path, *arguments)


@pytest.fixture(scope="session")
def shared(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A profile with a second CPU backend as accelerator."""
    folder = tmp_path_factory.mktemp("shared")
    return make(folder, tiny_model("qwen3moe", "Q4_0"), "--no-stock", *STAND_IN)


@pytest.fixture(scope="session")
def alone(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A profile of the CPU alone, with plain llama.cpp beside."""
    return make(tmp_path_factory.mktemp("alone"), tiny_model("qwen3moe", "Q4_0"))
