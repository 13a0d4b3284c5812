"""The native tests (ctest) as one test of the suite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("part", ["others", pytest.param("accelerator", marks=pytest.mark.slow)])
def test_native_tests_pass(part: str) -> None:
    """The accelerator's compile most of the plug-in again; the quick suite drives the installed one in tests/hybrid."""
    command = [sys.executable, str(ROOT / "tools" / "test_native.py"), "--only", part]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]
    assert "100% tests passed" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["thread", "address"])
def test_copies_and_dispatch_with_sanitizers(sanitize: str) -> None:
    """Worker threads, the copy path and the whole dispatch, with a ggml compiled with the same sanitizer."""
    command = [sys.executable, str(ROOT / "tools" / "test_native.py"), "--sanitize", sanitize, "--only", "accelerator"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]
    assert "100% tests passed" in result.stdout


_DECODE = """
import os, sys
os.environ.pop("LD_PRELOAD")  # children run within limits that the sanitizer's memory map does not fit in
from pathlib import Path
from hybrimoe.engine import Engine, EngineOptions
from hybrimoe.expert_options import CacheSize, ExpertOptions
for devices, slots in (((), 0), (("CPU",), 2)):
    experts = ExpertOptions(devices=devices, cache=CacheSize(n_slots=slots), guard=False)
    with Engine(Path(sys.argv[1]), EngineOptions(n_ctx=256, n_threads=2, experts=experts)) as engine:
        for n in (1, 9, 40):
            engine.reset()
            engine.eval(list(range(1, n + 1)))
            for token in range(12):
                engine.eval([token + 1])
        assert engine.verification.ok, engine.verification
print("decoded")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "quant"), [("qwen3moe", "Q4_K"), ("gpt-oss", "MXFP4")])
def test_the_plugin_as_it_ships_with_address_sanitizer(
    tiny_model: Callable[..., Path], architecture: str, quant: str
) -> None:
    """With OpenMP's team and the installed llama_cpp: the path that the other sanitized programs leave out."""
    from test_native import build_target

    plugin = build_target("ggml-hybrimoe", "address") / "native" / "backend" / "libggml-hybrimoe.so"
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "HYBRIMOE_PLUGIN": str(plugin),
        "LD_PRELOAD": library.stdout.strip(),
        # Python itself keeps memory to the end.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, "-c", _DECODE, str(tiny_model(architecture, quant))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout) == (0, "decoded\n"), done.stderr[-8000:]
    assert "AddressSanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr[-8000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu", "sets"), [("Nehalem", "scalar"), ("SandyBridge", "scalar"), ("Haswell", "avx2 scalar")]
)
def test_kernels_on_an_emulated(cpu: str, sets: str, emulator: str) -> None:
    """Against the reference, on several threads, with the instruction sets that this CPU has."""
    from test_native import build_target

    program = build_target("test_kernels") / "native" / "tests" / "kernels" / "test_kernels"
    command = [emulator, "-cpu", cpu, str(program), "threads"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].endswith(f"checks, 0 failures, sets: {sets}")
