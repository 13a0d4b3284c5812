"""The policy core and traces for these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from core.conftest import core_library  # noqa: F401

from hybrimoe.simulate.replay import Loaded
from hybrimoe.trace.format import read

FIXTURE = Path(__file__).parents[1] / "trace" / "demo.trace"


@pytest.fixture(scope="session")
def demo() -> Loaded:
    """Recorded from the demo model."""
    return Loaded(read(FIXTURE))
