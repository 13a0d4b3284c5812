"""Runs a server until a signal ends it: binds, loads, answers, finishes what is being answered, closes the engine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from hybrimoe.errors import EXIT_INTERRUPTED, EXIT_OK, HybrimoeError, from_os_error
from hybrimoe.server.app import Service, make_app
from hybrimoe.server.gate import Gate, Limits, is_loopback
from hybrimoe.server.protocol import QuietServer, make_server

__all__ = ["ServerOptions", "bind", "serve", "shown_url"]

_BACKLOG = 256
# After the last answer: for clients to take what was sent.
_LINGER_S = 3.0


@dataclass(frozen=True)
class ServerOptions:
    """How a server listens. `grace_s`: how long answers may go on after the first signal."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)
    header_s: float = 15.0
    grace_s: float = 8.0


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any. Raises HybrimoeError when it is in use or not allowed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise HybrimoeError(f"cannot listen on '{host}': {error.strerror}", "--host 127.0.0.1") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise HybrimoeError(
                f"port {port} is in use", "take another with --port, or any free one with --port 0"
            ) from None
        raise from_os_error(error, f"listen on {host}:{port}", "--host 127.0.0.1 --port 8080") from error
    return bound


def shown_url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(service: Service, options: ServerOptions, bound: socket.socket, note: Callable[[str], None]) -> int:
    """Serves on `bound` until a signal. Returns the exit code; raises what loading the engine raised.

    The first SIGINT or SIGTERM lets answers end within the grace period, the second cuts them.
    """
    local_only = options.api_key is None and is_loopback(options.host)
    gate = Gate(make_app(service), options.limits, options.api_key, local_only=local_only)
    return asyncio.run(_Run(service, options, make_server(gate, header_s=options.header_s), note).until_stopped(bound))


class _Run:
    def __init__(
        self, service: Service, options: ServerOptions, server: QuietServer, note: Callable[[str], None]
    ) -> None:
        self._worker = service.worker
        self._options = options
        self._server = server
        self._note = note
        self._signals: list[int] = []
        self._ended = asyncio.Event()

    async def until_stopped(self, bound: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        # Said only now: whoever reads it may send signals.
        self._note(f"listening on {shown_url(bound)}, loading the model")
        worker = self._worker

        def on_end() -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._ended.set)

        worker.on_end = on_end
        worker.start()
        serving = asyncio.ensure_future(self._server.serve([bound]))
        await self._ended.wait()
        # The engine is closed. Answers that are under way in connections have a moment to leave.
        self._server.should_exit = True
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(asyncio.shield(serving), _LINGER_S)
        self._server.force_exit = True
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        serving.cancel()
        with contextlib.suppress(BaseException):
            await serving
        worker.join()
        if worker.failure is not None and not self._signals:
            raise worker.failure
        if signal.SIGINT in self._signals:
            return EXIT_INTERRUPTED
        return EXIT_OK

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        if len(self._signals) == 1:
            busy = self._worker.is_busy or self._worker.n_waiting
            more = f": answers have {self._options.grace_s:g} s to end, a second Ctrl-C cuts them"
            self._note("stopping" + (more if busy else ""))
            self._worker.stop(self._options.grace_s)
        else:
            self._worker.cut()
            if len(self._signals) > 2:
                os._exit(EXIT_INTERRUPTED)  # llama.cpp does not come back
