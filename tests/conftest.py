"""Fixtures shared by all tests: models. Small random ones are written once and kept in pytest's cache folder."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
# The makers of test models are scripts that import each other by name.
sys.path.insert(0, str(TOOLS))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell in the background ignores Ctrl-C, and so would what the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two models at once have more threads than there are processors: OpenMP's must not spin while they wait.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def one_builds(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str], FileLock]:
    """`with one_builds(name):` one worker of this run at a time, for what is built once and kept for all."""
    folder = tmp_path_factory.getbasetemp()
    # Each worker's folder is below the run's.
    folder = folder if worker_id == "master" else folder.parent
    return lambda name: FileLock(folder / f"{name}.lock")


@pytest.fixture(scope="session")
def tiny_models_dir(request: pytest.FixtureRequest) -> Path:
    """Where random tiny models are kept between runs; another folder once their makers change."""
    sources = [TOOLS / "moe_shapes.py", TOOLS / "make_tiny_models.py", ROOT / "hybrimoe" / "models" / "quantise.py"]
    version = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    if request.config.pluginmanager.hasplugin("cacheprovider"):
        return Path(request.config.cache.mkdir(f"tiny-models-{version}"))  # type: ignore[union-attr]
    return Path(request.getfixturevalue("tmp_path_factory").mktemp("tiny-models"))


@pytest.fixture(scope="session")
def tiny_model(tiny_models_dir: Path) -> Callable[..., Path]:
    """`tiny_model(arch, type="F32", expert_type=None)` is the path of a random tiny model of that kind.

    `arch` is a name that `tools/make_tiny_models.py --list` shows.
    """
    from make_tiny_models import write_tiny_model

    def make(arch: str, type: str = "F32", expert_type: str | None = None) -> Path:
        suffix = f"-{expert_type}" if expert_type else ""
        path = tiny_models_dir / f"tiny-{arch}-{type}{suffix}.gguf"
        return path if path.exists() else write_tiny_model(path, arch, type, expert_type=expert_type)

    return make


@pytest.fixture(scope="session")
def demo_model(one_builds: Callable[[str], FileLock]) -> Path:
    """The full demo model, built on first use and kept in the model store (where `make chat` puts it as well)."""
    from hybrimoe.models import store

    with one_builds("demo"):
        return store.build_demo()


@pytest.fixture(scope="session")
def device_module() -> Path:
    """The test device as a backend module (native/tests/device/test_device.h); compiled in seconds after a change."""
    from test_native import build_test_device

    try:
        return build_test_device()
    except subprocess.CalledProcessError as error:
        pytest.fail(f"the test device does not compile:\n{error.stdout[-4000:]}")


@dataclass(frozen=True)
class LongPrompt:
    """`text` has more than 3,000 of the model's tokens: several micro-batches, even of llama.cpp's default size."""

    model: str
    text: str
    n_ctx: int
    sharing: tuple[str, ...]


@pytest.fixture(scope="session", params=["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def long_prompt(request: pytest.FixtureRequest, tiny_models_dir: Path) -> LongPrompt:
    """A model, a long prompt for it, and flags that share its experts with a stand-in.

    The demo model has the default policies. The tiny one computes an expert faster than it would plan where: it needs
    ones that use the accelerator whatever was measured.
    """
    stand_in, sentence = ("--device", "CPU", "--expert-cache", "6"), "The sun is a star: its light takes its time. "
    if request.param == "demo":
        return LongPrompt(str(request.getfixturevalue("demo_model")), sentence * 250, 4096, stand_in)
    from make_tiny_models import write_tiny_model
    from moe_shapes import ARCHITECTURES

    path = tiny_models_dir / "tiny-qwen3moe-Q4_0-long.gguf"
    if not path.exists():
        write_tiny_model(path, "qwen3moe", "Q4_0", shape=replace(ARCHITECTURES["qwen3moe"].tiny, n_ctx=8192))
    return LongPrompt(str(path), sentence * 140, 8192, (*stand_in, "--guard", "off", "--schedule", "gpu-only"))


@pytest.fixture(scope="session")
def llama_cpp_bin(one_builds: Callable[[str], FileLock]) -> Path:
    """The folder of plain llama.cpp's own programs; built once (minutes) unless HYBRIMOE_LLAMA_CPP_BIN names them."""
    with one_builds("llama.cpp"):
        result = subprocess.run([sys.executable, str(TOOLS / "build_llama_cpp.py")], stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0, "tools/build_llama_cpp.py failed, see above"
    return Path(result.stdout.strip())


@pytest.fixture(scope="session")
def architecture_models(llama_cpp_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny models, one for each architecture, that llama.cpp's own tests use (900 MB)."""
    folder = tmp_path_factory.mktemp("architectures")
    command = [str(llama_cpp_bin / "test-llama-archs"), "-s", "1", "-o", str(folder)]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder
