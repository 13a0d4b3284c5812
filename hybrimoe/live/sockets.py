"""Snapshots over a unix socket: a chat offers them to `hybrimoe top` of the same user, and nobody else.

The socket is PID.sock, of mode 0600, in a folder of mode 0700. Whoever connects gets one snapshot a period as a line of
JSON, the first one at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrimoe.errors import HybrimoeError, from_os_error
from hybrimoe.private_files import make_private_folder

__all__ = ["LiveProcess", "LiveSocket", "processes", "read_snapshots", "runtime_dir"]

_PERIOD_S = 1.0
_MAX_CLIENTS = 8
_MAX_LINE_BYTES = 16 << 20
# sizeof(sockaddr_un.sun_path) is 108 on Linux, with the final zero.
_MAX_PATH_BYTES = 107


def runtime_dir() -> Path:
    """The folder of this user's sockets: in XDG_RUNTIME_DIR, or else in the user's state folder. It need not exist."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given:
        folder = Path(given) / "hybrimoe"
    else:
        import platformdirs

        folder = Path(platformdirs.user_state_dir("hybrimoe", appauthor=False)) / "live"
    if len(os.fsencode(folder / "4194304.sock")) > _MAX_PATH_BYTES:
        folder = Path(tempfile.gettempdir()) / f"hybrimoe-{os.getuid()}"
    return folder


def _private_folder() -> Path:
    """The folder, made where it is missing. Raises HybrimoeError when others could get at it."""
    folder = runtime_dir()
    try:
        make_private_folder(folder)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and status.st_mode & 0o077:
            folder.chmod(0o700)
            status = folder.lstat()
    except OSError as error:
        raise from_os_error(error, f"make '{folder}'") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise HybrimoeError(f"'{folder}' is not a private folder of yours", "remove it")
    return folder


class LiveSocket:
    """Offers `snapshot` until `close`. Threads of its own answer; raises HybrimoeError when there can be no socket."""

    def __init__(self, snapshot: Callable[[], dict[str, Any]], *, period_s: float = _PERIOD_S) -> None:
        self._snapshot = snapshot
        self._period_s = period_s
        self._closed = threading.Event()
        self._slots = threading.BoundedSemaphore(_MAX_CLIENTS)
        self.path = _private_folder() / f"{os.getpid()}.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.path.unlink(missing_ok=True)  # of a process that had our number and was killed
            self._socket.bind(str(self.path))
            self.path.chmod(0o600)
            self._socket.listen(_MAX_CLIENTS)
        except OSError as error:
            self._socket.close()
            raise from_os_error(error, f"make the socket '{self.path}'") from error
        threading.Thread(target=self._accept, name="hybrimoe-live", daemon=True).start()

    def close(self) -> None:
        """Ends all connections and removes the socket. Further calls do nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> LiveSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            if not self._slots.acquire(blocking=False):
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), name="hybrimoe-live-client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                client.settimeout(10 * self._period_s)
                while not self._closed.is_set():
                    client.sendall(json.dumps(self._snapshot()).encode() + b"\n")
                    self._closed.wait(self._period_s)
        except OSError:
            pass  # they have left
        finally:
            self._slots.release()


@dataclass(frozen=True)
class LiveProcess:
    """A process that can be watched."""

    pid: int
    path: Path


def processes() -> list[LiveProcess]:
    """This user's processes that offer snapshots, oldest first. Sockets that dead ones left behind are removed."""
    found: list[tuple[float, LiveProcess]] = []
    for path in runtime_dir().glob("*.sock"):
        if not path.stem.isdigit():
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
            found.append((status.st_mtime, LiveProcess(int(path.stem), path)))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def read_snapshots(path: Path, timeout_s: float = 30.0) -> Iterator[dict[str, Any]]:
    """Snapshots of the process behind a socket, until it ends. Raises HybrimoeError when it cannot be reached."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
        except OSError as error:
            raise from_os_error(error, f"reach '{path}'", "hybrimoe top") from error
        with connection.makefile("rb") as lines:
            while True:
                try:
                    line = lines.readline(_MAX_LINE_BYTES)
                except OSError as error:
                    raise from_os_error(error, f"read from '{path}'") from error
                if not line.endswith(b"\n"):
                    return
                yield json.loads(line)
