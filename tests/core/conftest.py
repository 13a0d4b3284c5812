"""The policy core for these tests: the library that HYBRIMOE_CORE_LIB names, the installed one, or one built here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybrimoe.native import core_abi
from hybrimoe.native.core_replay import Trace

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
TRACES = ("deepseek-v2-lite", "qwen3-30b-a3b", "gemma4-26b-a4b", "gpt-oss-120b")


def _tool(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _build_core() -> Path:
    """Builds the core alone (a few seconds with ccache, half a minute without)."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None:
        pytest.fail("no policy core: install hybrimoe, or cmake to build it, or set HYBRIMOE_CORE_LIB")
    build = ROOT / "build" / "core"
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(build), "-DHYBRIMOE_BACKEND=OFF", *generator],
        [cmake, "--build", str(build), "--target", "hybrimoe_core_shared", "-j", "2"],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)}\n{done.stdout[-4000:]}")
    return build / "native" / "core" / "libhybrimoe-core.so"


@pytest.fixture(scope="session", autouse=True)
def core_library() -> Path:
    """Path of the library under test."""
    if not core_abi.library_path().is_file():
        os.environ[core_abi.LIBRARY_VARIABLE] = str(_build_core())
    core_abi.library()
    return core_abi.library_path()


def read_trace(path: Path, n_prompts: int | None = None) -> Trace:
    """A trace in the layout of the shared traces' README."""
    with np.load(path) as z:
        offsets = z["prompt_offsets"]
        weights = z["weights"] if "weights" in z.files else None
        trace = Trace(z["experts"], int(z["n_expert"]), weights=weights, prompt_offsets=offsets)
    return trace if n_prompts is None else trace.head(n_prompts)


def real_trace_path(name: str) -> Path:
    """The file of a real model's trace, or a skip that says why."""
    folder = os.environ.get("HYBRIMOE_TRACES")
    if not folder:
        pytest.skip("HYBRIMOE_TRACES is not set: no traces of real models here")
    path = Path(folder) / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"HYBRIMOE_TRACES has no {path.name}")
    return path


def real_trace(name: str, n_prompts: int | None = None) -> Trace:
    """A trace of a real model, or a skip that says why."""
    return read_trace(real_trace_path(name), n_prompts)


@pytest.fixture(scope="session")
def deepseek_40() -> Trace:
    """First 40 prompts of the DeepSeek trace: 744,120 queries."""
    return real_trace("deepseek-v2-lite", 40)


@pytest.fixture(scope="session")
def synthetic() -> Trace:
    """The committed synthetic trace, with router scores."""
    with np.load(GOLDEN / "synthetic.npz") as z:
        scores = z["scores"].astype(np.float32) / 65535
        return Trace(z["experts"], int(z["n_expert"]), scores=scores, prompt_offsets=z["prompt_offsets"])
