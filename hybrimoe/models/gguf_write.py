"""Writing a GGUF file so that it is there whole or not at all.

The file grows under a temporary name in its own folder and is renamed once complete; an error or Ctrl-C removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from hybrimoe.errors import HybrimoeError, from_os_error
from hybrimoe.models.quantise import row_bytes, type_of

__all__ = ["GgufOutput", "copy_metadata"]

_ALIGNMENT = 32
_PART_NAME = re.compile(r"\.(.+)\.(\d+)\.part")


class GgufOutput:
    """A context manager: add metadata to `.metadata` (a `gguf.GGUFWriter`), `declare` every tensor, then `write` each
    one in the same order. Leaving the block without an exception puts the file in its place.

    Raises `HybrimoeError` (exit code 1, with a hint) when the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path | str, architecture: str) -> None:
        import gguf

        self.path = Path(path)
        self.metadata: Any = gguf.GGUFWriter(None, architecture)
        self._part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._declared: list[tuple[str, int]] = []
        self._n_written = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> GgufOutput:
        return self

    def declare(self, name: str, shape: tuple[int, ...], type_name: str) -> int:
        """Announces a tensor; `shape` in ggml's order (fastest first). Returns its bytes."""
        import gguf
        import numpy as np

        n_rows = 1
        for extent in shape[1:]:
            n_rows *= extent
        n_bytes = n_rows * row_bytes(shape[0], type_name)
        kind = gguf.GGMLQuantizationType(type_of(type_name)[0])
        self.metadata.add_tensor_info(name, tuple(reversed(shape)), np.dtype(np.float32), n_bytes, raw_dtype=kind)
        self._declared.append((name, n_bytes))
        return n_bytes

    @property
    def n_bytes(self) -> int:
        """Bytes of all declared tensors, padding included."""
        return sum(_padded(n_bytes) for _, n_bytes in self._declared)

    def write(self, name: str, chunks: Iterable[Any]) -> None:
        """Writes the next declared tensor from buffers (bytes or arrays), which together are exactly its bytes."""
        file = self._file or self._begin()
        expected_name, n_expected = self._declared[self._n_written]
        if name != expected_name:
            raise ValueError(f"expected tensor '{expected_name}', got '{name}'")
        n_bytes = 0
        try:
            for chunk in chunks:
                n_bytes += memoryview(chunk).nbytes
                file.write(chunk)
            if n_bytes != n_expected:
                raise ValueError(f"tensor '{name}' has {n_bytes} bytes, declared were {n_expected}")
            file.write(b"\0" * (_padded(n_bytes) - n_bytes))
        except OSError as error:
            raise from_os_error(error, f"write '{self.path}'") from error
        self._n_written += 1

    def _begin(self) -> BinaryIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            free = shutil.disk_usage(self.path.parent).free
            if free < self.n_bytes:
                raise HybrimoeError(
                    f"cannot write '{self.path}': it needs {self.n_bytes / 2**20:.0f} MiB, {free / 2**20:.0f} are free",
                    "free some disk space, or choose another folder",
                )
            self.metadata.write_header_to_file(self._part)
            self.metadata.write_kv_data_to_file()
            self.metadata.write_ti_data_to_file()
            file: BinaryIO = self.metadata.fout[0]
            file.write(b"\0" * (_padded(file.tell()) - file.tell()))
        except OSError as error:
            raise from_os_error(error, f"write '{self.path}'") from error
        self._file = file
        return file

    def _remove_abandoned(self) -> None:
        # A killed process cannot clean up after itself.
        for part in self.path.parent.glob(".*.part"):
            match = _PART_NAME.fullmatch(part.name)
            if match and match[1] == self.path.name and not Path(f"/proc/{match[2]}").exists():
                part.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._close()
            with contextlib.suppress(OSError):  # no such file: it was renamed, or never begun
                self._part.unlink()

    def _finish(self) -> None:
        file = self._file or self._begin()
        if self._n_written != len(self._declared):
            raise ValueError(f"tensor '{self._declared[self._n_written][0]}' was declared but not written")
        try:
            file.flush()
            os.fsync(file.fileno())
            self._close()
            self._part.replace(self.path)
        except OSError as error:
            raise from_os_error(error, f"write '{self.path}'") from error

    def _close(self) -> None:
        for file in self.metadata.fout or ():
            try:
                file.close()
            except OSError:
                # The buffer of a full disk cannot be flushed; the error that matters was raised by the write before.
                continue
        self.metadata.fout = None
        self._file = None


def _padded(n_bytes: int) -> int:
    return (n_bytes + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def copy_metadata(
    reader: Any, output: GgufOutput, skip: Iterable[str] = (), prefix: tuple[str, str] = ("", "")
) -> None:
    """Copies the metadata of a `gguf.GGUFReader`, without the keys in `skip` and those the container itself writes.

    `prefix` (old, new) renames keys that start with the old architecture's name.
    """
    import gguf

    skipped = {"general.architecture", "general.alignment", *skip}
    for key, field in reader.fields.items():
        if key in skipped or key.startswith(("GGUF.", "split.")):
            continue
        kind = field.types[0]
        old, new = prefix
        name = new + key[len(old) :] if old and key.startswith(old + ".") else key
        value = field.contents()
        if kind == gguf.GGUFValueType.ARRAY and not value:
            continue  # gguf's writer has no form for an empty array; readers treat it as absent
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        output.metadata.add_key_value(name, value, kind, sub_type=sub_type)
