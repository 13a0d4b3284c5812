"""Fixtures for tests of the command line: in this process for arguments, in processes of their own for streams."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from core.conftest import real_trace_path

COMMAND = [sys.executable, "-m", "hybrimoe.cli.main"]


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    def assert_two_lines(self, code: int) -> None:
        """An error as users see it: 'error: ...' and 'hint: ...' on stderr, nothing on stdout, no traceback."""
        lines = self.err.strip().splitlines()
        assert self.code == code, self
        assert self.out == "" and "Traceback" not in self.err
        assert len(lines) in (1, 2) and lines[0].startswith("error: ")
        assert len(lines) == 1 or lines[1].startswith("hint: ")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without config file, history and models; LLAMA_ARG_* and the like are unset."""
    for name in ("CONFIG", "STATE", "DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("HYBRIMOE_MODELS", str(tmp_path / "models"))
    for name in list(os.environ):
        if name.startswith("LLAMA_ARG_") or name == "HYBRIMOE_REPRODUCIBLE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    # Spinning OpenMP threads starve each other when tests share the machine.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return tmp_path


@pytest.fixture
def call(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`call("run", "-n", "4")` runs the program in this process."""
    from hybrimoe.cli.main import main

    def run(*arguments: str) -> Outcome:
        code = main(arguments)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def spawn(home: Path) -> Callable[..., Outcome]:
    """`spawn("run", ..., stdin=b"")` runs the program in a process of its own, without a terminal."""

    def run(*arguments: str, stdin: bytes = b"", deadline_s: float = 120, **environment: str) -> Outcome:
        environment = {**os.environ, **environment}
        command = [*COMMAND, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=deadline_s, env=environment)
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> str:
    """A tiny model's path, as an argument."""
    return str(tiny_model("mixtral"))


@pytest.fixture
def dense_header(tmp_path: Path) -> Path:
    """A sound GGUF file without experts."""
    from gguf import GGUFWriter

    path = tmp_path / "dense.gguf"
    writer: Any = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    import numpy as np

    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


DEMO_TRACE = Path(__file__).parents[1] / "trace" / "demo.trace"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A copy of the demo model's recording."""
    return Path(shutil.copy(DEMO_TRACE, tmp_path / "demo.trace"))


@pytest.fixture
def deepseek(call: Callable[..., Outcome], tmp_path: Path) -> Path:
    """DeepSeek's trace, imported without the bytes of an expert; a skip where there is none."""
    output = tmp_path / "ds.trace"
    source = real_trace_path("deepseek-v2-lite")
    assert call("trace", "import", str(source), "-o", str(output)).code == 0
    return output
