"""What stands before the application: size and time of requests, keys, host names. Pure ASGI."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from hybrimoe.server.errors import ApiError, error_response

__all__ = ["Gate", "Limits", "is_loopback"]

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]

# Pages and the health check tell nothing and are needed before there is a key.
_PUBLIC = ("/", "/health", "/v1/health", "/favicon.ico")
_DRAIN_BYTES, _DRAIN_S = 64 << 20, 5.0


@dataclass(frozen=True)
class Limits:
    """Bytes of a request's body, seconds it may take to arrive, seconds a client may leave an answer unread."""

    max_request_bytes: int = 8 << 20
    body_s: float = 30.0
    send_s: float = 60.0


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """Wraps an ASGI application.

    Args:
        api_key: what clients must send as bearer token; None: nothing.
        local_only: refuse requests for other host names than this machine's own. Without a key that keeps web pages
            from reaching the server through a name of theirs that resolves to 127.0.0.1.
    """

    def __init__(self, app: _App, limits: Limits, api_key: str | None, *, local_only: bool) -> None:
        self._app = app
        self._limits = limits
        self._key = None if api_key is None else api_key.encode()
        self._local_only = local_only

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = self._timed(send)
        try:
            headers = dict(scope["headers"])
            if self._local_only:
                _check_host(headers.get(b"host", b""))
            if scope["path"] not in _PUBLIC and not scope["path"].startswith("/static/"):
                self._check_key(headers)
            if scope["method"] == "POST":
                receive = await self._read_body(headers, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _timed(self, send: _Send) -> _Send:
        async def timed(message: _Message) -> None:
            await asyncio.wait_for(send(message), self._limits.send_s)

        return timed

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if self._key is None:
            return
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if not hmac.compare_digest(given, self._key):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _read_body(self, headers: dict[bytes, bytes], receive: _Receive) -> _Receive:
        """Reads the whole body; the application gets it in one piece. Raises ApiError."""
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            # Browsers send other types across sites without asking the server first.
            raise ApiError(415, "the request must have the content type application/json")
        length = headers.get(b"content-length", b"")
        limit = self._limits.max_request_bytes
        parts: list[bytes] = []
        n_bytes = int(length) if length.isdigit() else 0
        deadline = time.monotonic() + self._limits.body_s
        too_large = n_bytes > limit
        n_bytes, more = 0, True
        while more and not too_large:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                raise ApiError(408, f"the request took longer than {self._limits.body_s:.0f} s to arrive") from None
            except asyncio.TimeoutError:  # its own class before Python 3.11
                raise ApiError(408, f"the request took longer than {self._limits.body_s:.0f} s to arrive") from None
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client left")
            parts.append(message.get("body", b""))
            n_bytes += len(parts[-1])
            more = message.get("more_body", False)
            too_large = n_bytes > limit
        if too_large:
            parts.clear()
            await _drain(receive)
            raise ApiError(413, f"the request is larger than {limit} bytes", code="request_too_large")
        return _replay(b"".join(parts), receive)


async def _drain(receive: _Receive) -> None:
    """Reads on for a while: a connection that is closed with unread data loses the answer."""
    n_bytes, end = 0, time.monotonic() + _DRAIN_S
    while n_bytes < _DRAIN_BYTES:
        try:
            message = await asyncio.wait_for(receive(), end - time.monotonic())
        except (TimeoutError, asyncio.TimeoutError):
            return
        n_bytes += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def _replay(body: bytes, receive: _Receive) -> _Receive:
    pending: list[_Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> _Message:
        return pending.pop() if pending else await receive()

    return replayed


def _check_host(given: bytes) -> None:
    name = given.decode("latin-1")
    host = name.rpartition("]")[0].lstrip("[") if name.startswith("[") else name.partition(":")[0]
    if host and not is_loopback(host):
        raise ApiError(403, "without an API key this server answers to this machine's own names only")
