"""Fixtures of the comparisons with plain llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sides import Side


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """Plain llama.cpp: a process that never loads the plug-in."""
    side = Side("plain", tmp_path_factory.mktemp("plain"))
    yield side
    side.close()


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """The same llama.cpp with routers and experts in the plug-in, which runs them through ggml's own kernels."""
    side = Side("plugin", tmp_path_factory.mktemp("plugin"), cpu="ggml")
    yield side
    side.close()


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """The plug-in with its own CPU kernels, which round differently from ggml's."""
    side = Side("plugin", tmp_path_factory.mktemp("own"), cpu="auto")
    yield side
    side.close()
