"""What this program keeps about a user is that user's alone: files 0600, in folders 0700, whatever the umask."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def check(path: Path, top: Path) -> None:
    """The file, and every folder that was made for it below `top`."""
    assert mode(path) == 0o600, f"{path}: {mode(path):o}"
    for folder in path.parents:
        if folder == top:
            return
        assert mode(folder) == 0o700, f"{folder}: {mode(folder):o}"
    raise AssertionError(f"{path} is not below {top}")


def test_calibration(tmp_path: Path) -> None:
    from hybrimoe.calibration import Calibration

    path = tmp_path / "data" / "hybrimoe" / "calibration.json"
    Calibration({"format": 1}).save(path)
    check(path, tmp_path)


def test_history(tmp_path: Path) -> None:
    from hybrimoe.cli.terminal import _history

    path = tmp_path / "state" / "hybrimoe" / "chat_history"
    history = _history(path)
    history.store_string("a question")
    check(path, tmp_path)


def test_proof(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    from hybrimoe.gguf_model import inspect
    from hybrimoe.proof import prove

    folder = tmp_path / "state" / "hybrimoe" / "proofs"
    assert prove(inspect(tiny_model("mixtral", "Q4_0")), folder)
    (proof,) = folder.iterdir()
    check(proof, tmp_path)


def test_state(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Written by the plug-in when an engine is closed."""
    from hybrimoe.engine import Engine, EngineOptions
    from hybrimoe.expert_options import CacheSize, ExpertOptions

    folder = tmp_path / "state" / "hybrimoe"
    experts = ExpertOptions(CacheSize(n_slots=4), devices=("CPU",), state_dir=folder)
    with Engine(tiny_model("mixtral", "Q4_0"), EngineOptions(n_ctx=64, n_threads=1, experts=experts)) as engine:
        list(engine.answer(engine.text_prompt("hello"), n_predict=4))
    (state,) = folder.iterdir()
    check(state, tmp_path)


def test_socket() -> None:
    program = """
import sys
from hybrimoe.native.plugin import plugin_library
plugin_library().configure(observe=True)
plugin_library().set_host_facts({})
print(plugin_library().snapshot("events")["socket"], flush=True)
sys.stdin.read()
"""
    import tempfile

    with tempfile.TemporaryDirectory() as short:  # a socket's path holds 103 bytes
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(Path(short) / "run")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, text=True, **pipes)
        try:
            assert process.stdout is not None
            check(Path(process.stdout.readline().strip()), Path(short))
        finally:
            process.communicate(timeout=60)
