"""The kernels of lesser CPUs, end to end: what runs on a machine with AVX2 only, or without any vector unit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]

# What the CPU has is what all other tests run.
SETS = ("scalar", "avx2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("avxvnni", "avx512")))


def answer(
    model: Path, home: Path, emulator: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """What the program says with these environment variables, on the CPU that `emulator` puts in this one's place."""
    names = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CONFIG", "STATE", "DATA", "CACHE")}
    command = [sys.executable, "-m", "hybrimoe.cli.main", "run", str(model), "hello there", "-n", "16", "-c", "128"]
    return subprocess.run(
        [*emulator, *command, "-t", "2", "--temp", "0", "--device", "none", "--no-conversation"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **names, "OMP_WAIT_POLICY": "passive", **variables},
    )


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The answer with ggml's own kernels."""
    done = answer(tiny_model("mixtral", "F32"), tmp_path_factory.mktemp("ggml"), HYBRIMOE_CPU="ggml")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kernels", SETS)
def test_a_model_answers_with_the_kernels_of(
    kernels: str, expected: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Float weights: the sums differ in their last bits only, the greedy answer does not."""
    model = tiny_model("mixtral", "F32")
    ours = answer(model, tmp_path, HYBRIMOE_CPU=kernels)
    if ours.returncode and "this CPU has" in ours.stderr:
        pytest.skip(f"this CPU has no {kernels}")
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == expected


@pytest.fixture(scope="module")
def llama_cpp_without_avx(one_builds: Callable[[str], FileLock]) -> Path:
    """The folder of llama.cpp's libraries for CPUs without AVX; built once (minutes)."""
    command = [sys.executable, str(ROOT / "tools" / "build_llama_cpp.py"), "--without-avx"]
    with one_builds("llama.cpp"):
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0, "tools/build_llama_cpp.py failed, see above"
    return Path(result.stdout.strip())


# Nehalem has no AVX, Sandy Bridge has the first, Haswell AVX2: an instruction that a CPU lacks ends the program.
@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["Nehalem", "SandyBridge", "Haswell"])
def test_a_model_answers_on_an_emulated(
    cpu: str, emulator: str, llama_cpp_without_avx: Path, expected: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The installed plug-in chooses what that CPU has, with a llama.cpp that needs no more."""
    libraries = str(llama_cpp_without_avx)
    ours = answer(tiny_model("mixtral", "F32"), tmp_path, (emulator, "-cpu", cpu), LLAMA_CPP_LIB_PATH=libraries)
    assert ours.returncode == 0, ours.stderr[-3000:]
    assert ours.stdout == expected


@pytest.mark.slow
def test_a_llama_cpp_for_another_cpu_is_explained(
    emulator: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The installed one is compiled for the CPU at hand. What children find in it is tested in tests/test_proof.py."""
    done = answer(tiny_model("mixtral", "F32"), tmp_path, (emulator, "-cpu", "Nehalem"))
    if done.returncode == 0:
        pytest.skip("the installed llama.cpp needs no AVX")
    assert (done.returncode, done.stdout) == (5, ""), done.stderr[-3000:]
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert error == "error: llama.cpp was compiled for another CPU: it uses an instruction that this one lacks"
    assert hint.startswith("hint: pip install --force-reinstall ")
