"""The kernels of lesser CPUs, end to end: what runs on a machine with AVX2 only, or without any vector unit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# What the CPU has is what all other tests run.
SETS = ("scalar", "avx2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("avxvnni", "avx512")))


def answer(model: Path, home: Path, kernels: str) -> subprocess.CompletedProcess[str]:
    names = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CONFIG", "STATE", "DATA", "CACHE")}
    command = [sys.executable, "-m", "hybrimoe.cli.main", "run", str(model), "hello there", "-n", "16", "-c", "128"]
    return subprocess.run(
        [*command, "-t", "2", "--temp", "0", "--device", "none", "--no-conversation"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **names, "OMP_WAIT_POLICY": "passive", "HYBRIMOE_CPU": kernels},
    )


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The answer with ggml's own kernels."""
    done = answer(tiny_model("mixtral", "F32"), tmp_path_factory.mktemp("ggml"), "ggml")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kernels", SETS)
def test_a_model_answers_with_the_kernels_of(
    kernels: str, expected: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Float weights: the sums differ in their last bits only, the greedy answer does not."""
    model = tiny_model("mixtral", "F32")
    ours = answer(model, tmp_path, kernels)
    if ours.returncode and "this CPU has" in ours.stderr:
        pytest.skip(f"this CPU has no {kernels}")
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == expected
