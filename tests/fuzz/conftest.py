"""The corpus, made once a session."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from core.conftest import core_library  # noqa: F401

from fuzz.targets import Seeds, Target, make_seeds, make_targets


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    return make_seeds(tmp_path_factory.mktemp("fuzz-seeds"))


@pytest.fixture(scope="session")
def targets(seeds: Seeds) -> dict[str, Target]:
    return make_targets(seeds)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for inputs, in memory where there is such a file system: thousands of files make a disk the test."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="hybrimoe-fuzz-", dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder)
