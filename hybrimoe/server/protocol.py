"""uvicorn with a limit on how long a connection may take to say what it wants, and with our signals."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["QuietServer", "make_server"]

_HEADER_S = 15.0
_KEEP_ALIVE_S = 30
_MAX_CONNECTIONS = 512
_MAX_HEADER_BYTES = 64 << 10


class _TimedProtocol(H11Protocol):
    """Closes connections whose request line and headers do not arrive in time, however slowly they drip."""

    header_s = _HEADER_S
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.header_s, self._give_up)

    def data_received(self, data: bytes) -> None:
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._timer = self.loop.call_later(self.header_s, self._give_up)  # the next request of this connection
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()

    def on_response_complete(self) -> None:
        self._stop_timer()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.abort()


class QuietServer(uvicorn.Server):
    """Leaves signals to the program, which has to close the engine before it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def make_server(app: Any, *, header_s: float = _HEADER_S) -> QuietServer:
    """A server for `app` that prints nothing; give it bound sockets."""
    protocol = type("TimedProtocol", (_TimedProtocol,), {"header_s": header_s})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        limit_concurrency=_MAX_CONNECTIONS,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        # The worker ends answers; connections that are left then have a moment to take them.
        timeout_graceful_shutdown=None,
    )
    return QuietServer(config)
