"""The native tests (ctest) as one test of the suite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_native_tests_pass() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "test_native.py")], capture_output=True, text=True, timeout=1200
    )
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
