"""The policy core, as for tests/core, and headers of well-known models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hybrimoe.dry_load import Buffers, LoadShape, dry_load
from hybrimoe.gguf_model import GgufModel
from hybrimoe.native import core_abi
from hybrimoe.planning import memory


@pytest.fixture(scope="session", autouse=True)
def core_library() -> Path:
    """Path of the policy core; a skip where it is not built."""
    if not core_abi.library_path().is_file():
        pytest.skip("no policy core: install hybrimoe, or set HYBRIMOE_CORE_LIB")
    return core_abi.library_path()


@pytest.fixture(scope="session")
def header(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`header("qwen3-30b-a3b")` is a file with that model's header and no weights."""
    from make_header_model import PRESETS, write_header

    folder = tmp_path_factory.mktemp("headers")

    def make(name: str) -> Path:
        path = folder / f"{name}.gguf"
        return path if path.exists() else write_header(path, PRESETS[name])

    return make


@pytest.fixture(scope="session", autouse=True)
def asked_once() -> Iterator[None]:
    """llama.cpp is asked once per model and setting."""
    asked: dict[object, Buffers] = {}

    def once(model: GgufModel, shape: LoadShape) -> Buffers:
        key = (model.path, shape)
        if key not in asked:
            asked[key] = dry_load(model, shape)
        return asked[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "dry_load", once)
        yield
