"""Opening what users name: a pipe without a writer, a device or a terminal must not hold the program up."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import IO, BinaryIO

__all__ = ["check_replaceable", "open_regular", "open_target", "read_bytes", "read_text"]

# Names of descriptors that this process was given open: `<(...)` of a shell, a redirected stdin.
_DESCRIPTORS = re.compile(r"/dev/stdin|(?:/dev|/proc/self)/fd/([0-9]{1,9})")
_MOST_STREAM_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 20
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


class _NoFileError(OSError):
    """Not what errno's own words would say."""


def _refuse(path: Path, mode: int) -> OSError:
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")
    if stat.S_ISDIR(mode):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return _NoFileError(errno.EINVAL, f"it is {kind}, not a file", str(path))


def _given_descriptor(path: Path) -> int | None:
    """The descriptor of this process that `path` names, or None."""
    match = _DESCRIPTORS.fullmatch(os.fspath(path))
    return None if match is None else int(match[1] or 0)


def open_regular(path: Path | str) -> BinaryIO:
    """Opens a regular file for reading, at once.

    Raises:
        OSError: as `open`; also for a pipe, a device or a socket, in words that say which.
        ValueError: a NUL in the name.
    """
    path = Path(path)
    # Before opening, because that alone makes some devices act; after it, because names can change hands.
    if not stat.S_ISREG(mode := path.stat().st_mode):
        raise _refuse(path, mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refuse(path, mode)
    return os.fdopen(descriptor, "rb")


def _open_stream(path: Path) -> BinaryIO:
    """As `open_regular`; also what this process was given open, whose reading may wait, and the null device."""
    mode = path.stat().st_mode
    given = _given_descriptor(path)
    if given is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        # Opening a pipe by that name would wait for a writer that may have come and gone.
        return os.fdopen(os.dup(given), "rb")
    if stat.S_ISCHR(mode) and os.path.realpath(path) == os.devnull:
        return path.open("rb")
    return open_regular(path)


def read_bytes(path: Path | str) -> bytes:
    """The content of a file, or of a stream that this process was given open (`/dev/stdin`, a shell's `<(...)`).

    Raises as `open_regular`.
    """
    with _open_stream(Path(path)) as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file.read()
        parts: list[bytes] = []
        n_left = _MOST_STREAM_BYTES
        while chunk := file.read(_CHUNK_BYTES):
            n_left -= len(chunk)
            if n_left < 0:
                raise _NoFileError(errno.EFBIG, f"more than {_MOST_STREAM_BYTES >> 20} MiB came", str(path))
            parts.append(chunk)
        return b"".join(parts)


def read_text(path: Path | str, encoding: str = "utf-8") -> str:
    """The text of a file or stream, with line breaks as `\\n`. Raises as `open_regular`, and UnicodeDecodeError."""
    return read_bytes(path).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def open_target(path: Path) -> IO[bytes]:
    """Opens `path` for writing from its start, at once. Raises OSError; for a pipe that nobody reads, too."""
    try:
        is_pipe = stat.S_ISFIFO(path.stat().st_mode)
    except FileNotFoundError:
        is_pipe = False
    if not is_pipe:
        return path.open("wb")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise _NoFileError(errno.ENXIO, "nobody reads from this pipe", str(path)) from None
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "wb")


def check_replaceable(path: Path) -> None:
    """Raises OSError where renaming a file over `path` would remove a device, a pipe or a socket."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise _refuse(path, mode)
