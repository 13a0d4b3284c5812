"""Blocks of a trace file: named arrays and a few values, compressed, each with its own checksum.

A file is a head (magic, version, JSON) and blocks. A block is a fixed frame (magic, sizes, checksums), a JSON
description of its arrays, and the arrays' bytes. Whatever was written whole can be read, however the file ends.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from hybrimoe.errors import DoesNotFitError
from hybrimoe.json_text import parse_json
from hybrimoe.trace.errors import TraceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "MAGIC", "MINOR_VERSION", "VERSION", "Block", "check_memory", "pack_block", "pack_head", "read_blocks", "read_head",
]  # fmt: skip

# A byte above 127 and both kinds of line end reveal a transfer as text (as PNG does it).
MAGIC = b"\x93HMTRACE\r\n\x1a\n"
VERSION = 1
# Of additions that older readers skip.
MINOR_VERSION = 1
_HEAD = struct.Struct("<III")  # version, bytes of JSON, CRC of the JSON
_BLOCK_MAGIC = b"HMBK"
_FRAME = struct.Struct("<4sIQI")  # magic, bytes of JSON, bytes of arrays, CRC of both
_FRAME_CRC = struct.Struct("<I")  # CRC of the frame: a wrong size is told from an early end
_LEVEL = 6
# No sane head or description is larger; a corrupt size must not ask for gigabytes.
_MAX_JSON_BYTES = 1 << 26
# From this size on a block is unpacked only where that much memory is free: zeros pack a thousandfold.
_ASK_BYTES = 1 << 26


@dataclass(frozen=True)
class Block:
    """One block: its kind, values, arrays, and where it began."""

    kind: str
    values: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]
    position: int


def pack_head(head: Mapping[str, Any]) -> bytes:
    """Bytes of the head."""
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    return MAGIC + _HEAD.pack(VERSION, len(text), zlib.crc32(text)) + text


def pack_block(
    kind: str, values: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]], level: int = _LEVEL
) -> bytes:
    """Bytes of a block. Arrays of more than one byte per item are stored byte plane by byte plane, which packs far
    better, then deflated."""
    import numpy as np

    described, payload = [], []
    for name, array in arrays.items():
        data = np.ascontiguousarray(array)
        little = data.astype(data.dtype.newbyteorder("<"), copy=False)
        planes = little.reshape(-1).view(np.uint8).reshape(-1, little.itemsize).T
        packed = zlib.compress(np.ascontiguousarray(planes).tobytes(), level)
        described.append([name, little.dtype.str, list(data.shape), len(packed)])
        payload.append(packed)
    text = json.dumps({"kind": kind, **values, "arrays": described}, ensure_ascii=False, separators=(",", ":")).encode()
    body = b"".join((text, *payload))
    frame = _FRAME.pack(_BLOCK_MAGIC, len(text), len(body) - len(text), zlib.crc32(body))
    return frame + _FRAME_CRC.pack(zlib.crc32(frame)) + body


def read_head(file: IO[bytes], name: str) -> dict[str, Any]:
    """Reads and checks the head. Raises TraceError for what is no trace, corrupt, or of a later version."""
    magic = file.read(len(MAGIC))
    if not magic:
        raise TraceError(f"the trace '{name}' is empty", "hybrimoe trace record, or hybrimoe trace import")
    if magic != MAGIC:
        raise TraceError(f"'{name}' is no hybrimoe trace", "other formats: hybrimoe trace import FILE -o NEW.trace")
    fixed = file.read(_HEAD.size)
    if len(fixed) < _HEAD.size:
        raise TraceError(f"the trace '{name}' is cut short in its head", "record or import it again")
    version, n_bytes, crc = _HEAD.unpack(fixed)
    if version != VERSION:
        raise TraceError(
            f"the trace '{name}' has format version {version}, this program reads version {VERSION}",
            "update hybrimoe" if version > VERSION else "record or import it again",
        )
    text = file.read(n_bytes) if n_bytes <= _MAX_JSON_BYTES else b""
    if len(text) < min(n_bytes, _MAX_JSON_BYTES):
        raise TraceError(f"the trace '{name}' is cut short in its head", "record or import it again")
    if zlib.crc32(text) != crc:
        raise TraceError(f"the trace '{name}' is corrupt: wrong checksum of its head", "record or import it again")
    try:
        head = parse_json(text)
    except ValueError:
        head = None
    if not isinstance(head, dict):
        raise TraceError(f"the trace '{name}' is corrupt: its head is no object", "record or import it again")
    return head


def read_blocks(file: IO[bytes], name: str, wanted: Container[str] | None = None) -> Iterator[Block | None]:
    """Blocks in order; a last None says that the file ends in the middle of one.

    Args:
        wanted: names of the arrays to unpack; None: all. The checksum covers all of them anyway.

    Raises:
        TraceError: a block is corrupt; its number and position are named.
    """
    number = 0
    while True:
        position = file.tell()
        frame = file.read(_FRAME.size + _FRAME_CRC.size)
        if not frame:
            return
        if len(frame) < _FRAME.size + _FRAME_CRC.size:
            yield None
            return
        where = f"block {number} at byte {position}"
        if zlib.crc32(frame[: _FRAME.size]) != _FRAME_CRC.unpack(frame[_FRAME.size :])[0]:
            raise _corrupt(name, where, "wrong checksum of its frame")
        magic, n_text, n_payload, crc = _FRAME.unpack(frame[: _FRAME.size])
        if magic != _BLOCK_MAGIC or n_text > _MAX_JSON_BYTES:
            raise _corrupt(name, where, "no block begins here")
        body = file.read(n_text + n_payload)
        if len(body) < n_text + n_payload:
            yield None
            return
        if zlib.crc32(body) != crc:
            raise _corrupt(name, where, "wrong checksum")
        yield _unpack(body, n_text, name, where, position, wanted)
        number += 1


def _corrupt(name: str, where: str, what: str) -> TraceError:
    return TraceError(f"the trace '{name}' is corrupt in {where}: {what}", "record or import it again")


def _unpack(body: bytes, n_text: int, name: str, where: str, position: int, wanted: Container[str] | None) -> Block:
    import numpy as np

    try:
        values = parse_json(body[:n_text])
        if not isinstance(values, dict):
            raise ValueError("it has no description")
        kind, described = values.pop("kind"), values.pop("arrays")
        found, at = {}, n_text
        for key, code, shape, n_packed in described:
            dtype = _dtype(code)
            if not all(type(n) is int and n >= 0 for n in (n_packed, *shape)):
                raise ValueError(f"its array '{key}' has impossible sizes")
            if wanted is None or key in wanted:
                found[str(key)] = dtype, tuple(shape), body[at : at + n_packed]
            at += n_packed
        check_memory(sum(math.prod(shape) * dtype.itemsize for dtype, shape, _ in found.values()), name)
        arrays = {}
        for key, (dtype, shape, packed) in found.items():
            data = np.frombuffer(_inflate(packed, math.prod(shape) * dtype.itemsize), dtype=np.uint8)
            planes = data.reshape(dtype.itemsize, -1).T
            arrays[key] = np.ascontiguousarray(planes).reshape(-1).view(dtype).reshape(shape)
    except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
        raise _corrupt(name, where, str(error)) from error
    return Block(str(kind), values, arrays, position)


def _dtype(code: Any) -> np.dtype[Any]:
    """The type of an array; only plain numbers are. Raises ValueError."""
    import numpy as np

    try:
        dtype = np.dtype(code) if isinstance(code, str) else None
    except (TypeError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind not in "iuf" or dtype.itemsize not in (1, 2, 4, 8):
        raise ValueError(f"{code!r} is no type of numbers")
    return dtype


def _inflate(packed: bytes, n_bytes: int) -> bytes:
    """Exactly `n_bytes`: what claims to be small must not fill the memory. Raises ValueError, zlib.error."""
    inflate = zlib.decompressobj()
    data = inflate.decompress(packed, n_bytes + 1)
    if len(data) != n_bytes or not inflate.eof:
        raise ValueError(f"an array unpacks to another size than {n_bytes} bytes")
    return data


def check_memory(n_bytes: int, name: str) -> None:
    """Raises DoesNotFitError where unpacking `n_bytes` would need more memory than is free."""
    if n_bytes < _ASK_BYTES:
        return
    import psutil

    free = int(psutil.virtual_memory().available)
    # Packed planes, their transposition and the result are there at the same time.
    if 3 * n_bytes > free:
        raise DoesNotFitError(
            f"a block of the trace '{name}' needs {3 * n_bytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free",
            "record shorter prompts, or leave scores out",
        )
