"""The observers of this user's processes: which there are, and what they answer (docs/observability.md)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrimoe.errors import HybrimoeError, from_os_error

__all__ = ["Observer", "ObserverGoneError", "TraceStream", "WatchedProcess", "processes", "runtime_dir"]

_MAX_LINE_BYTES = 64 << 20
_PIECE_BYTES = 1 << 18
_MOST_PIECES = 64  # of one read
_MAX_PASS_BYTES = 1 << 30
_NAME = re.compile(r"(\d+)(-\d)?\.sock")


class ObserverGoneError(HybrimoeError):
    """The process that was watched has ended, or does not serve any more."""


def runtime_dir() -> Path:
    """The folder of this user's sockets, which need not exist. Raises PluginError when the plug-in is missing."""
    from hybrimoe.native.plugin import plugin_library

    return plugin_library().runtime_folder()


@dataclass(frozen=True)
class WatchedProcess:
    """A process that can be watched."""

    pid: int
    path: Path


def processes() -> list[WatchedProcess]:
    """This user's processes with an observer, oldest first. Sockets that dead ones left behind are removed."""
    found: list[tuple[float, WatchedProcess]] = []
    for path in runtime_dir().glob("*.sock"):
        name = _NAME.fullmatch(path.name)
        if name is None:
            continue
        with contextlib.suppress(OSError):
            status = path.stat()
            if status.st_uid != os.getuid():
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(2)
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink(missing_ok=True)
                    continue
            found.append((status.st_mtime, WatchedProcess(int(name[1]), path)))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


class Observer:
    """A connection to the observer behind a socket. One thread at a time.

    Raises HybrimoeError when it cannot be reached; requests raise ObserverGoneError when the process has ended.
    """

    def __init__(self, path: Path, timeout_s: float = 30.0) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise from_os_error(error, f"reach '{path}'", "hybrimoe top --list") from error
        self._received = bytearray()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: str) -> dict[str, Any]:
        """The answer to one line. Raises HybrimoeError for one that the observer does not know."""
        try:
            self._socket.sendall(request.encode() + b"\n")
            line = self._line()
        except TimeoutError:
            raise HybrimoeError(f"'{self.path}' does not answer", "hybrimoe top --list") from None
        except OSError:
            line = b""
        if not line:
            raise ObserverGoneError("the process has ended", "hybrimoe top --list")
        answer = json.loads(line)
        if "error" in answer:
            raise HybrimoeError(f"'{self.path}' refuses: {answer['error']}", "is it another version's?")
        return dict(answer)

    def read(self, after: int = 0) -> dict[str, Any]:
        """A raw snapshot with the events after a number."""
        return self.ask(f"snapshot after={after}")

    def stream(self) -> TraceStream:
        """The passes that the process computes from now on. Nothing else can be asked then."""
        return TraceStream(self.ask("trace"), self._socket, self._received)

    def _line(self) -> bytes:
        """The next line without its end; empty when there is none. Raises OSError."""
        begin = 0
        while (end := self._received.find(b"\n", begin)) < 0:
            begin = len(self._received)
            piece = self._socket.recv(_PIECE_BYTES)
            if not piece or begin > _MAX_LINE_BYTES:
                return b""
            self._received += piece
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line


@dataclass
class TraceStream:
    """Recorded passes as they come.

    Attributes:
        head: the snapshot of the instance that records, with its state and trace.
        has_ended: the process has, or its instance; what came before may still be read.
    """

    head: dict[str, Any]
    connection: socket.socket
    received: bytearray
    has_ended: bool = False

    @property
    def instance(self) -> dict[str, Any]:
        return dict(self.head["instances"][0])

    def read(self) -> bytes:
        """All whole passes (hybrimoe_trace_pass and its arrays) that have come since the last call. Does not wait."""
        # A socket with a timeout would wait for it, whatever the flags say; a busy process sends without end.
        self.connection.setblocking(False)
        for _ in range(_MOST_PIECES):
            try:
                piece = self.connection.recv(_PIECE_BYTES)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            self.received += piece
            if not piece:
                self.has_ended = True
                break
        end = 0
        while len(self.received) - end >= 8:
            n_bytes = int.from_bytes(self.received[end : end + 8], "little")
            if not 8 <= n_bytes <= _MAX_PASS_BYTES:
                self.has_ended = True
                break
            if end + n_bytes > len(self.received):
                break
            end += n_bytes
        whole = bytes(self.received[:end])
        del self.received[:end]
        return whole
