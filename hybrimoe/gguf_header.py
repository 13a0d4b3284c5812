"""The header of one GGUF file: metadata and tensor table, without touching the weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. This reader exists beside the `gguf` package because
it must stand files that are damaged or hostile (every count is checked against the bytes that are left before anything
is allocated), must read a header whose weights are missing, and skips the vocabulary, so that a large model's header
takes milliseconds.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hybrimoe.errors import ModelError, from_os_error
from hybrimoe.files import open_regular

__all__ = ["GGML_TYPES", "ArraySummary", "GgmlType", "GgufHeader", "TensorInfo", "Value", "read_header"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME less the final zero
# Bounds that no real file comes near (the largest vocabularies have 0.3 million entries, templates 0.1 MB).
_MAX_STRING_BYTES = 64 << 20
_MAX_STRING_ARRAY = 1 << 24
_MAX_KEYS = 1 << 16  # and tensors
# What is kept of a header is bounded whatever the file's size: a hostile one must not fill the memory. Numbers are kept
# for what llama.cpp has per layer; a key is at most what the format allows.
_MAX_KEPT_ARRAY = 1 << 12
_MAX_KEY_BYTES = (1 << 16) - 1
_KEPT_BYTES = 8 << 20
_BYTES_PER_NUMBER = 40
_MIN_KV_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8
_CHUNK_BYTES = 1 << 18

DOWNLOAD_HINT = "download or build the file again"


@dataclass(frozen=True)
class GgmlType:
    """A tensor type of ggml: `block_elems` weights are stored in `block_bytes` bytes."""

    name: str
    block_elems: int
    block_bytes: int


# ggml/include/ggml.h (enum) and ggml/src/ggml-common.h (block sizes) of the pinned llama.cpp.
GGML_TYPES: Mapping[int, GgmlType] = {
    number: GgmlType(name, block_elems, block_bytes)
    for number, name, block_elems, block_bytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
        (42, "Q2_0", 64, 18),
    )
}
_REMOVED_TYPES = {4, 5, 31, 32, 33, 36, 37, 38}

# GGUF value types -> struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class ArraySummary:
    """Stands for what was skipped: a vocabulary, more numbers than per-layer data could have, or a text too long."""

    n_items: int
    of_strings: bool


Value = int | float | bool | str | tuple[int | float | bool, ...] | ArraySummary


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry. `shape` is in ggml's order (fastest first); `offset` counts from the start of `path`."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    n_bytes: int
    offset: int
    path: Path

    @property
    def n_elements(self) -> int:
        n = 1
        for extent in self.shape:
            n *= extent
        return n


@dataclass(frozen=True)
class GgufHeader:
    """The parsed header of one file."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_bytes: int


class _Reader:
    """Reads forward through the header and refuses every length that the file cannot hold."""

    def __init__(self, file: BinaryIO, path: Path, file_bytes: int) -> None:
        self._file = file
        self._path = path
        self._buffer = b""
        self._at = 0  # within the buffer
        self._base = 0  # file offset of the buffer's start
        self.file_bytes = file_bytes
        self._to_keep = _KEPT_BYTES

    @property
    def offset(self) -> int:
        return self._base + self._at

    @property
    def n_left(self) -> int:
        return self.file_bytes - self.offset

    def fail(self, what: str, hint: str = DOWNLOAD_HINT) -> ModelError:
        return ModelError(f"'{self._path.name}' {what}", hint)

    def truncated(self, reading: str) -> ModelError:
        return self.fail(f"is truncated: the file ends at {self.file_bytes} bytes, within {reading}")

    def take(self, n_bytes: int, reading: str) -> memoryview:
        if n_bytes > self.n_left:
            raise self.truncated(reading)
        end = self._at + n_bytes
        if end > len(self._buffer):
            rest = self._buffer[self._at :]
            self._base += self._at
            self._at, end = 0, n_bytes
            self._buffer = rest + self._file.read(max(_CHUNK_BYTES, n_bytes - len(rest)))
            if end > len(self._buffer):  # the file shrank after its size was taken
                raise self.truncated(reading)
        view = memoryview(self._buffer)[self._at : end]
        self._at = end
        return view

    def skip(self, n_bytes: int, reading: str) -> None:
        if n_bytes > self.n_left:
            raise self.truncated(reading)
        if self._at + n_bytes <= len(self._buffer):
            self._at += n_bytes
            return
        target = self.offset + n_bytes
        self._file.seek(target)
        self._buffer, self._at, self._base = b"", 0, target

    def u32(self, reading: str) -> int:
        return int.from_bytes(self.take(4, reading), "little")

    def u64(self, reading: str) -> int:
        return int.from_bytes(self.take(8, reading), "little")

    def _keeps(self, n_bytes: int) -> bool:
        """Whether that much more of the header may be kept."""
        if n_bytes > self._to_keep:
            return False
        self._to_keep -= n_bytes
        return True

    def key(self, number: int) -> str:
        reading = f"metadata key {number}"
        key = self._short_string(reading, _MAX_KEY_BYTES)
        if not self._keeps(len(key)):
            raise self.fail("is damaged: its metadata keys are too long")
        return key

    def tensor_name(self, number: int) -> str:
        return self._short_string(f"the name of tensor {number}", _MAX_NAME_BYTES)

    def _short_string(self, reading: str, most: int) -> str:
        n_bytes = self._string_bytes(reading)
        if n_bytes > most:
            raise self.fail(f"is damaged: {reading} is longer than {most} bytes")
        return str(self.take(n_bytes, reading), "utf-8", errors="replace")

    def _string_bytes(self, reading: str) -> int:
        n_bytes = self.u64(reading)
        if n_bytes > self.n_left:
            raise self.fail(f"is damaged or truncated: {reading} would be {n_bytes} bytes long, {self.n_left} are left")
        if n_bytes > _MAX_STRING_BYTES:
            raise self.fail(f"is damaged: {reading} would be {n_bytes} bytes long")
        return n_bytes

    def _string(self, reading: str) -> str | ArraySummary:
        n_bytes = self._string_bytes(reading)
        if not self._keeps(n_bytes):
            self.skip(n_bytes, reading)
            return ArraySummary(n_bytes, of_strings=False)
        return str(self.take(n_bytes, reading), "utf-8", errors="replace")

    def value(self, key: str) -> Value:
        reading = f"the value of '{key}'"
        kind = self.u32(reading)
        if kind == _STRING:
            return self._string(reading)
        if kind == _ARRAY:
            return self._array(key, reading)
        if kind not in _SCALARS:
            raise self.fail(f"is damaged: '{key}' has the unknown value type {kind}")
        return self._numbers(_SCALARS[kind], 1, reading)[0]

    def _numbers(self, form: str, n: int, reading: str) -> tuple[int | float | bool, ...]:
        n_bytes = n * struct.calcsize("<" + form)
        return struct.unpack(f"<{n}{form}", self.take(n_bytes, reading))

    def _array(self, key: str, reading: str) -> tuple[int | float | bool, ...] | ArraySummary:
        kind = self.u32(reading)
        n = self.u64(reading)
        if kind != _STRING and kind not in _SCALARS:
            raise self.fail(f"is damaged: '{key}' is an array of the unknown value type {kind}")
        item_bytes = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])
        if n * item_bytes > self.n_left:
            raise self.fail(f"is damaged or truncated: '{key}' would have {n} entries, {self.n_left} bytes are left")
        if kind != _STRING:
            if n <= _MAX_KEPT_ARRAY and self._keeps(n * _BYTES_PER_NUMBER):
                return self._numbers(_SCALARS[kind], n, reading)
            self.skip(n * item_bytes, reading)
            return ArraySummary(n, of_strings=False)
        if n > _MAX_STRING_ARRAY:
            raise self.fail(f"is damaged: '{key}' would have {n} entries")
        for _ in range(n):
            self.skip(self.u64(reading), reading)
        return ArraySummary(n, of_strings=True)


def read_header(path: Path | str) -> GgufHeader:
    """Parses the header of one GGUF file (version 2 or 3, little-endian).

    Raises `ModelError` when the file is missing, no regular file, empty, no GGUF, of an unsupported version, truncated
    within the header or inconsistent, and `HybrimoeError` when the system refuses to read it. Whether the tensors' data
    is there is not looked at: compare `TensorInfo.offset + n_bytes` with `file_bytes`.
    """
    path = Path(path)
    try:
        # Checked before opening: opening a FIFO would wait for a writer.
        status = path.stat()
        _check_kind(path, status.st_mode)
        with open_regular(path) as file:
            return _parse(_Reader(file, path, os.fstat(file.fileno()).st_size), path)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"no such file: '{path}'", "hybrimoe models list") from None
    except ValueError as error:  # a NUL in the name
        raise ModelError(f"not a usable file name: {str(path)!r} ({error})", "hybrimoe models list") from None
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        inside = sorted(p.name for p in path.glob("*.gguf"))[:1]
        hint = f"give the file, such as '{path / inside[0]}'" if inside else "give the path of a .gguf file"
        raise ModelError(f"'{path}' is a directory, not a GGUF file", hint)
    if not stat.S_ISREG(mode):
        raise ModelError(f"'{path}' is not a regular file", "give the path of a .gguf file")


def _parse(reader: _Reader, path: Path) -> GgufHeader:
    _check_magic(reader)
    version = reader.u32("the header")
    if version & 0xFFFF == 0:
        raise reader.fail("is a big-endian GGUF file, which this machine cannot run", "get the little-endian file")
    if version not in _VERSIONS:
        raise reader.fail(
            f"has GGUF version {version}, supported are 2 and 3", "convert the model again, or update hybrimoe"
        )
    n_tensors, n_kv = reader.u64("the header"), reader.u64("the header")
    if n_kv * _MIN_KV_BYTES > reader.n_left:
        raise reader.fail(f"is damaged or truncated: {n_kv} metadata entries do not fit in {reader.file_bytes} bytes")
    if n_tensors * _MIN_TENSOR_BYTES > reader.n_left:
        raise reader.fail(f"is damaged or truncated: {n_tensors} tensors do not fit in {reader.file_bytes} bytes")

    if max(n_kv, n_tensors) > _MAX_KEYS:
        raise reader.fail(f"is damaged: {n_kv} metadata entries and {n_tensors} tensors are more than any model has")

    metadata: dict[str, Value] = {}
    for i in range(n_kv):
        key = reader.key(i)
        if not key or key in metadata:
            raise reader.fail(f"is damaged: metadata key {i} is {'a duplicate' if key else 'empty'}")
        metadata[key] = reader.value(key)

    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise reader.fail(f"is damaged: general.alignment is {alignment!r}, not a power of two")

    entries = [_tensor_entry(reader, i) for i in range(n_tensors)]
    data_offset = (reader.offset + alignment - 1) // alignment * alignment
    return GgufHeader(
        path=path,
        version=version,
        metadata=metadata,
        tensors=_place(reader, path, entries, data_offset, alignment),
        data_offset=data_offset,
        file_bytes=reader.file_bytes,
    )


def _check_magic(reader: _Reader) -> None:
    if reader.file_bytes == 0:
        raise reader.fail("is empty (0 bytes)")
    start = bytes(reader.take(min(reader.file_bytes, 24), "the header"))
    if start[:4] != _MAGIC:
        if start.startswith(b"version https://git-lfs"):
            raise reader.fail("is a Git LFS pointer, not the model itself", "git lfs pull")
        if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
            raise reader.fail("is a web page, not a GGUF file", "download the file itself, not the page that shows it")
        if start[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
            raise reader.fail("is in the old GGML format", "convert the model to GGUF")
        raise reader.fail(
            f"is not a GGUF file: it starts with {start[:4]!r}, not b'GGUF'", "give the path of a .gguf file"
        )
    if reader.file_bytes < 24:
        raise reader.truncated("the header")
    reader._at = 4


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    n_bytes: int


def _tensor_entry(reader: _Reader, i: int) -> _Entry:
    name = reader.tensor_name(i)
    reading = f"the entry of tensor '{name}'"
    n_dims = reader.u32(reading)
    if n_dims > _MAX_DIMS:
        raise reader.fail(f"is damaged: tensor '{name}' has {n_dims} dimensions, the most is {_MAX_DIMS}")
    shape = struct.unpack(f"<{n_dims}q", reader.take(8 * n_dims, reading))
    number, offset = reader.u32(reading), reader.u64(reading)
    if number not in GGML_TYPES:
        removed = " (support for it was removed from llama.cpp)" if number in _REMOVED_TYPES else ""
        raise reader.fail(
            f"uses the unknown quantisation type {number}{removed} in tensor '{name}'",
            "get the model in another quantisation such as Q4_K_M, or update hybrimoe",
        )
    ggml_type = GGML_TYPES[number]
    n_elements = 1
    for extent in shape:
        if extent < 0:
            raise reader.fail(f"is damaged: tensor '{name}' has the shape {shape}")
        n_elements *= extent
    if n_elements >= 1 << 63:
        raise reader.fail(f"is damaged: tensor '{name}' has the shape {shape}, too large to exist")
    if (shape[0] if shape else 1) % ggml_type.block_elems:
        raise reader.fail(
            f"is damaged: tensor '{name}' has rows of {shape[0] if shape else 1} weights, "
            f"{ggml_type.name} needs a multiple of {ggml_type.block_elems}"
        )
    return _Entry(name, shape, ggml_type, offset, n_elements // ggml_type.block_elems * ggml_type.block_bytes)


def _place(
    reader: _Reader, path: Path, entries: list[_Entry], data_offset: int, alignment: int
) -> tuple[TensorInfo, ...]:
    # llama.cpp requires the tensors back to back in the table's order; so does this reader, which rules out overlaps.
    tensors: list[TensorInfo] = []
    names: set[str] = set()
    expected = 0
    for entry in entries:
        if entry.name in names:
            raise reader.fail(f"is damaged: tensor '{entry.name}' appears twice")
        names.add(entry.name)
        if entry.offset != expected:
            raise reader.fail(f"is damaged: tensor '{entry.name}' has the offset {entry.offset}, expected {expected}")
        expected += (entry.n_bytes + alignment - 1) // alignment * alignment
        tensors.append(
            TensorInfo(entry.name, entry.shape, entry.type.name, entry.n_bytes, data_offset + entry.offset, path)
        )
    return tuple(tensors)
