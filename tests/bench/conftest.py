"""Fixtures of bench's tests: the program, and llama.cpp's own script that reads results."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "native" / "cmake"))

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`bench(arguments...)` runs `hybrimoe bench` in an empty folder, as a user without settings."""
    for name in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hybrimoe.cli.main", "bench", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)

    return run


@pytest.fixture(scope="session")
def compare_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's scripts/compare-llama-bench.py of the pinned release; skips where the sdist cannot be had."""
    pytest.importorskip("git")
    pytest.importorskip("tabulate")
    from fetch_ggml_headers import get_sdist, read_release

    folder = tmp_path_factory.mktemp("sdist")
    try:
        sdist = get_sdist(*read_release(), folder)
    except SystemExit:
        pytest.skip("the sdist of llama-cpp-python cannot be fetched")
    with tarfile.open(sdist) as archive:
        for member in archive:
            if member.name.endswith("/scripts/compare-llama-bench.py"):
                file = archive.extractfile(member)
                assert file is not None
                path = folder / "compare-llama-bench.py"
                path.write_bytes(file.read())
                return path
    pytest.fail("the sdist has no compare-llama-bench.py")
