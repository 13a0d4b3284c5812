"""Fixtures for tests that load models through the plug-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def plugin() -> Any:
    """The loaded plug-in: HYBRIMOE_PLUGIN's, or the installed one. Loading it twice gives the same object."""
    from hybrimoe.native.plugin import load_plugin

    return load_plugin()


@pytest.fixture
def open_engine(plugin: Any, tiny_model: Callable[..., Path]) -> Iterator[Callable[..., Any]]:
    """`open_engine(arch="mixtral", type="F32", **options)`: a loaded engine, closed after the test."""
    from hybrimoe.engine import Engine, EngineOptions

    opened: list[Any] = []

    def make(arch: str = "mixtral", type: str = "F32", progress: Any = None, **options: Any) -> Any:
        options.setdefault("n_ctx", 256)
        options.setdefault("n_threads", 1)
        engine = Engine(tiny_model(arch, type), EngineOptions(**options), progress=progress)
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.close()
