"""A trace file in pieces: what is changed gets right checksums again, so that the reader's own checks are reached."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

from fuzz.mutators import INTEGERS, mutate_bytes, mutate_json
from hybrimoe.trace.blocks import MAGIC

_HEAD = struct.Struct("<III")
_FRAME = struct.Struct("<4sIQI")


@dataclass
class Piece:
    """One block: its description without `arrays`, and the arrays as [name, dtype, shape, bytes as stored]."""

    values: dict[str, Any]
    arrays: list[list[Any]]


@dataclass
class TraceFileParts:
    head: Any
    blocks: list[Piece] = field(default_factory=list)
    version: int = 1

    def to_bytes(self) -> bytes:
        text = json.dumps(self.head).encode("utf-8", "replace")
        parts = [MAGIC, _HEAD.pack(self.version & 0xFFFFFFFF, len(text), zlib.crc32(text)), text]
        for block in self.blocks:
            described = [[*entry[:3], len(entry[3])] if len(entry) == 4 else entry for entry in block.arrays]
            values = {**block.values, "arrays": described} if isinstance(block.values, dict) else block.values
            description = json.dumps(values).encode("utf-8", "replace")
            payload = b"".join(entry[3] for entry in block.arrays if len(entry) == 4)
            frame = _FRAME.pack(b"HMBK", len(description), len(payload), zlib.crc32(description + payload))
            parts += [frame, struct.pack("<I", zlib.crc32(frame)), description, payload]
        return b"".join(parts)


def parse(data: bytes) -> TraceFileParts:
    """Takes a sound file apart."""
    at = len(MAGIC)
    version, n_text, _ = _HEAD.unpack_from(data, at)
    at += _HEAD.size
    file = TraceFileParts(json.loads(data[at : at + n_text]), version=version)
    at += n_text
    while at < len(data):
        _, n_text, n_payload, _ = _FRAME.unpack_from(data, at)
        at += _FRAME.size + 4
        values = json.loads(data[at : at + n_text])
        at += n_text
        arrays, end = [], at + n_payload
        for name, code, shape, n_bytes in values.pop("arrays"):
            arrays.append([name, code, shape, data[at : at + n_bytes]])
            at += n_bytes
        at = end
        file.blocks.append(Piece(values, arrays))
    return file


def mutate(rng: random.Random, seed: TraceFileParts) -> bytes:
    """One to three faults in the structure, or noise over the whole file (which checksums mostly catch)."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, seed.to_bytes())
    file = copy.deepcopy(seed)
    for _ in range(rng.choice([1, 1, 2, 3])):
        _FAULTS[rng.randrange(len(_FAULTS))](rng, file)
    data = file.to_bytes()
    return data[: rng.randrange(len(data))] if rng.random() < 0.05 else data


def _head(rng: random.Random, file: TraceFileParts) -> None:
    file.head = mutate_json(rng, file.head)


def _model(rng: random.Random, file: TraceFileParts) -> None:
    if isinstance(file.head, dict) and "model" in file.head:
        file.head["model"] = mutate_json(rng, file.head["model"])


def _values(rng: random.Random, file: TraceFileParts) -> None:
    if file.blocks:
        block = rng.choice(file.blocks)
        block.values = mutate_json(rng, block.values)


def _description(rng: random.Random, file: TraceFileParts) -> None:
    block = rng.choice(file.blocks) if file.blocks else None
    if not block or not block.arrays:
        return
    entry = rng.choice(block.arrays)
    if len(entry) != 4:
        return
    what = rng.randrange(4)
    if what == 0:
        entry[0] = rng.choice(["experts", "prompt", "weights", "scores", "is_decode", "ids", "type", "x", "", None, 7])
    elif what == 1:
        entry[1] = rng.choice(
            [
                "u1",
                "<u2",
                "<i4",
                "<i8",
                "<f4",
                "<f2",
                "<f8",
                "|O",
                "|S3",
                "|V7",
                "<U4",
                "<M8[s]",
                "<c16",
                "|b1",
                ">i4",
                "",
                "zz",
                None,
                3,
            ]
        )
    elif what == 2:
        entry[2] = mutate_json(rng, entry[2])
    else:
        entry[2] = [rng.choice(INTEGERS) for _ in range(rng.randrange(5))]


# Every byte becomes one of four.
_FEW_VALUES = bytes((0, 127, 128, 255)[value % 4] for value in range(256))


def _content(rng: random.Random, file: TraceFileParts) -> None:
    """Other numbers in an array, or another amount of them."""
    block = rng.choice(file.blocks) if file.blocks else None
    if not block or not block.arrays:
        return
    entry = rng.choice(block.arrays)
    if len(entry) != 4:
        return
    what = rng.randrange(5)
    if what == 0:
        entry[3] = mutate_bytes(rng, entry[3])
        return
    try:
        raw = bytearray(zlib.decompress(entry[3]))
    except zlib.error:
        return
    if what == 1:
        raw = bytearray(mutate_bytes(rng, bytes(raw)))
    elif what == 2:
        for _ in range(rng.randrange(1, 5)):
            if raw:
                raw[rng.randrange(len(raw))] = rng.choice([0, 1, 2, 7, 8, 127, 128, 254, 255])
    elif what == 3:
        raw += bytes(rng.choice([1, 8, 4096, 1 << 22]))
    else:
        raw = bytearray(rng.randbytes(len(raw)).translate(_FEW_VALUES))
    entry[3] = zlib.compress(bytes(raw))


def _blocks(rng: random.Random, file: TraceFileParts) -> None:
    if not file.blocks:
        return
    at = rng.randrange(len(file.blocks))
    what = rng.randrange(4)
    if what == 0:
        file.blocks.insert(rng.randrange(len(file.blocks) + 1), copy.deepcopy(file.blocks[at]))
    elif what == 1:
        del file.blocks[at]
    elif what == 2 and file.blocks[at].arrays:
        del file.blocks[at].arrays[rng.randrange(len(file.blocks[at].arrays))]
    elif file.blocks[at].arrays:
        file.blocks[at].arrays.append(copy.deepcopy(rng.choice(file.blocks[at].arrays)))


_FAULTS = (_head, _model, _values, _description, _description, _content, _content, _content, _blocks, _blocks)
