"""Other x86-64 CPUs than the one at hand."""

from __future__ import annotations

import platform
import shutil

import pytest


@pytest.fixture(scope="session")
def emulator() -> str:
    """QEMU's user-mode emulator: `emulator -cpu NAME PROGRAM ...` runs a program with the instructions of that CPU."""
    path = shutil.which("qemu-x86_64")
    if path is None or platform.machine() != "x86_64":
        pytest.skip("qemu-x86_64 is not installed (Debian: qemu-user), or this is another processor")
    return path
