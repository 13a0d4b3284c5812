"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hybrimoe.errors import from_os_error
from hybrimoe.files import open_target

__all__ = ["replaceable", "replacing", "save"]


def replaceable(path: Path) -> bool:
    """Whether a file may be renamed over `path`: it is a regular file or none. A device or pipe must be written to."""
    return path.is_file() or not path.exists()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder, with the same suffix, that becomes `path` when all went well.

    Raises HybrimoeError for what the system refuses.
    """
    direct = not replaceable(path)
    temporary = path if direct else path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        if not direct:
            temporary.replace(path)
    except OSError as error:
        raise from_os_error(error, f"write '{path}'") from error
    finally:
        if not direct:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def save(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all. Raises HybrimoeError."""
    with replacing(path) as temporary, open_target(temporary) as file:
        file.write(data)
