"""The corpus, made once a session."""

from __future__ import annotations

import pytest
from core.conftest import core_library  # noqa: F401

from fuzz.targets import Seeds, Target, make_seeds, make_targets


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    return make_seeds(tmp_path_factory.mktemp("fuzz-seeds"))


@pytest.fixture(scope="session")
def targets(seeds: Seeds) -> dict[str, Target]:
    return make_targets(seeds)
