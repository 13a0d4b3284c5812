"""The policy core and traces for these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from core.conftest import core_library, deepseek_40, synthetic  # noqa: F401

from hybrimoe.trace.format import TraceFile, read

FIXTURE = Path(__file__).parent / "demo.trace"


@pytest.fixture(scope="session")
def demo() -> TraceFile:
    """Recorded from the demo model: two questions, all scores and look-ahead (see docs/trace-format.md)."""
    return read(FIXTURE)
