"""Fixtures of the hybrid dispatch's tests: plain llama.cpp and the plug-in with accelerators, a process for each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The two sides and their worker are those of the parity tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))

from sides import Side


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """Plain llama.cpp: a process that never loads the plug-in."""
    side = Side("plain", tmp_path_factory.mktemp("plain"))
    yield side
    side.close()


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """The plug-in; each question brings its `settings` (see hybrid_checks.settings_of)."""
    side = Side("plugin", tmp_path_factory.mktemp("hybrid"))
    yield side
    side.close()
