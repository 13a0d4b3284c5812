"""Streams of models that write bytes which are no UTF-8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp.server.app", reason="the extra [server] is not installed")


def test_wrong_bytes_do_not_hold_a_stream_back(tiny_model: Callable[..., Path]) -> None:
    from hybrimoe.engine import EngineOptions
    from hybrimoe.server.engine import ServerEngine

    pieces = {1: b"\xe2", 2: b"\x82", 3: b"\xac", 4: b"a", 5: b"\xff"}
    with ServerEngine(tiny_model("mixtral"), EngineOptions(n_ctx=256)) as engine:
        engine._pieces.update(pieces)
        assert engine.detokenize([1, 2]) == b"\xe2\x82", "an unfinished character waits"
        assert engine.detokenize([1, 2, 3]) == "€".encode()
        assert engine.detokenize([1, 4]) == "\ufffda".encode()
        assert engine.detokenize([5]) == "\ufffd".encode()
        assert engine.detokenize([4, 5, 1]) == "a\ufffd".encode() + b"\xe2"
