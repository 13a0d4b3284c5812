"""Fixtures of the comparisons with plain llama.cpp."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sides import Side

BUILD = Path(__file__).resolve().parents[2] / "tools" / "build_llama_cpp.py"


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """Plain llama.cpp: a process that never loads the plug-in."""
    side = Side("plain", tmp_path_factory.mktemp("plain"))
    yield side
    side.close()


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """The same llama.cpp with routers and experts in the plug-in, which runs them through ggml's own kernels."""
    side = Side("plugin", tmp_path_factory.mktemp("plugin"), cpu="ggml")
    yield side
    side.close()


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """The plug-in with its own CPU kernels, which round differently from ggml's."""
    side = Side("plugin", tmp_path_factory.mktemp("own"), cpu="auto")
    yield side
    side.close()


@pytest.fixture(scope="session")
def llama_cpp_bin() -> Path:
    """The folder of plain llama.cpp's own programs; built once (minutes) unless HYBRIMOE_LLAMA_CPP_BIN names them."""
    result = subprocess.run([sys.executable, str(BUILD)], stdout=subprocess.PIPE, text=True)
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
