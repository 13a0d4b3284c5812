"""The live page and figures for Prometheus of a process that has no server of its own, or another one's."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from hybrimoe.errors import EXIT_INTERRUPTED, EXIT_OK, HybrimoeError
from hybrimoe.live.snapshot import LiveSampler
from hybrimoe.live.sockets import Observer, ObserverGoneError
from hybrimoe.server.app import add_errors, add_live, add_page
from hybrimoe.server.errors import ApiError
from hybrimoe.server.gate import Gate, Limits
from hybrimoe.server.metrics import Metrics
from hybrimoe.server.protocol import make_server

__all__ = ["serve_companion"]

_HEADER_S = 15.0


class _Reconnecting:
    """Reads through one connection, which the observer may close when nobody asks for long. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._observer: Observer | None = None

    def read(self, after: int = 0) -> dict[str, Any]:
        with self._lock:
            if self._observer is not None:
                try:
                    return self._observer.read(after)
                except ObserverGoneError:
                    self._observer.close()
                    self._observer = None
            try:
                self._observer = Observer(self._path)
                return self._observer.read(after)
            except HybrimoeError:
                raise ApiError(503, "the process that was watched has ended") from None


def make_app(path: Path) -> FastAPI:
    """Page, snapshots and figures of the process behind a socket; 503 once it has ended."""
    app = FastAPI(title="hybrimoe", docs_url=None, redoc_url=None, openapi_url=None)
    source = _Reconnecting(path)

    add_errors(app, lambda error: None)
    add_live(app, _Companion(source.read), Metrics(source.read))
    add_page(app)
    return app


class _Companion(LiveSampler):
    """Snapshots that tell the page to hide its chat: there is nobody here to answer."""

    def snapshot(self) -> dict[str, Any]:
        return {**super().snapshot(), "companion": True}


def serve_companion(path: Path, bound: Any) -> int:
    """Serves until a signal. Returns the exit code."""
    gate = Gate(make_app(path), Limits(), None, local_only=True)
    return asyncio.run(_serve(make_server(gate, header_s=_HEADER_S), bound))


async def _serve(server: Any, bound: Any) -> int:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    signals: list[int] = []

    def on_signal(number: int) -> None:
        signals.append(number)
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    serving = asyncio.ensure_future(server.serve([bound]))
    await ended.wait()
    server.should_exit = server.force_exit = True
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    serving.cancel()
    with contextlib.suppress(BaseException):
        await serving
    return EXIT_INTERRUPTED if signal.SIGINT in signals else EXIT_OK
