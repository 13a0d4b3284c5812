"""A GGUF file in pieces that can be damaged one by one, and put together again with every lie intact."""

from __future__ import annotations

import copy
import random
import struct
from dataclasses import dataclass, field, replace
from typing import Any

from fuzz.mutators import INTEGERS, mutate_bytes

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
_U64 = (1 << 64) - 1
_ALIGNMENT = 32


@dataclass
class Entry:
    """A key with the raw bytes of its value; `scalar` is the number where the value is one."""

    key: bytes
    kind: int
    raw: bytes
    key_length: int | None = None  # what the file says, if not the truth


@dataclass
class Tensor:
    name: bytes
    dims: list[int]
    kind: int
    offset: int
    n_dims: int | None = None


@dataclass
class GgufFile:
    """`n_data_bytes` zeros follow the header: what is fuzzed here is the header, and what it says about the rest."""

    version: int = 3
    entries: list[Entry] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    n_data_bytes: int = 0
    n_entries: int | None = None
    n_tensors: int | None = None
    magic: bytes = b"GGUF"

    def header(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_entries = len(self.entries) if self.n_entries is None else self.n_entries
        parts = [self.magic, struct.pack("<IQQ", self.version & 0xFFFFFFFF, n_tensors & _U64, n_entries & _U64)]
        for entry in self.entries:
            length = len(entry.key) if entry.key_length is None else entry.key_length
            parts += [
                struct.pack("<Q", length & _U64),
                entry.key,
                struct.pack("<I", entry.kind & 0xFFFFFFFF),
                entry.raw,
            ]
        for tensor in self.tensors:
            n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
            parts += [struct.pack("<Q", len(tensor.name)), tensor.name, struct.pack("<I", n_dims & 0xFFFFFFFF)]
            parts += [struct.pack("<Q", extent & _U64) for extent in tensor.dims]
            parts.append(struct.pack("<IQ", tensor.kind & 0xFFFFFFFF, tensor.offset & _U64))
        return b"".join(parts)

    def copy(self) -> GgufFile:
        """A copy whose entries and tensors can be changed; deepcopy would take most of the time."""
        entries = [copy.copy(entry) for entry in self.entries]
        tensors = [replace(tensor, dims=list(tensor.dims)) for tensor in self.tensors]
        return replace(self, entries=entries, tensors=tensors)

    def find(self, ending: bytes) -> Entry | None:
        return next((entry for entry in self.entries if entry.key.endswith(ending)), None)


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def unpack(self, form: str) -> Any:
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def take(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]


def parse(data: bytes) -> GgufFile:
    """Takes a sound file apart."""
    cursor = _Cursor(data)
    file = GgufFile(magic=cursor.take(4), version=cursor.unpack("I"))
    n_tensors, n_entries = cursor.unpack("QQ")
    for _ in range(n_entries):
        key = cursor.take(cursor.unpack("Q"))
        kind = cursor.unpack("I")
        start = cursor.at
        _skip_value(cursor, kind)
        file.entries.append(Entry(key, kind, data[start : cursor.at]))
    for _ in range(n_tensors):
        name = cursor.take(cursor.unpack("Q"))
        dims = [cursor.unpack("Q") for _ in range(cursor.unpack("I"))]
        file.tensors.append(Tensor(name, dims, *cursor.unpack("IQ")))
    padded = -(-cursor.at // _ALIGNMENT) * _ALIGNMENT
    file.n_data_bytes = len(data) - padded + (padded - cursor.at)
    return file


def _skip_value(cursor: _Cursor, kind: int) -> None:
    if kind == STRING:
        cursor.take(cursor.unpack("Q"))
    elif kind == ARRAY:
        item, n = cursor.unpack("I"), cursor.unpack("Q")
        if item == STRING:
            for _ in range(n):
                cursor.take(cursor.unpack("Q"))
        else:
            cursor.take(n * struct.calcsize("<" + SCALARS[item]))
    else:
        cursor.take(struct.calcsize("<" + SCALARS[kind]))


# Keys that the reader and llama.cpp compute with.
_COUNTS = (
    b".expert_count", b".expert_used_count", b".expert_group_count", b".expert_group_used_count",
    b".expert_shared_count", b".block_count", b".embedding_length", b".context_length", b".attention.head_count",
    b".attention.head_count_kv", b".attention.key_length", b".attention.sliding_window", b".nextn_predict_layers",
    b".leading_dense_block_count", b".feed_forward_length", b".expert_feed_forward_length", b".vocab_size",
    b".rope.dimension_count", b"general.alignment", b"general.file_type", b"split.count", b"split.no",
    b"split.tensors.count",
)  # fmt: skip


def _integer(rng: random.Random) -> int:
    return rng.choice(INTEGERS) if rng.random() < 0.7 else rng.randrange(0, 4096)


def _value(rng: random.Random) -> tuple[int, bytes]:
    """A value of any type, sound in itself or not."""
    kind = rng.choice([*SCALARS, STRING, ARRAY, 13, 255, 1 << 31])
    if kind in SCALARS:
        size = struct.calcsize("<" + SCALARS[kind])
        return kind, (_integer(rng) & _U64).to_bytes(8, "little")[:size]
    if kind == STRING:
        text = rng.choice([b"", b"x" * 300, b"\xff\xfe", b"\0", "\U0001f600".encode(), b"{{ messages }}"])
        length = len(text) if rng.random() < 0.6 else _integer(rng)
        return kind, struct.pack("<Q", length & _U64) + text
    if kind == ARRAY:
        item = rng.choice([*SCALARS, STRING, ARRAY, 77])
        n = rng.choice([0, 1, 3, 512, 70_000, *INTEGERS])
        return kind, struct.pack("<IQ", item, n & _U64) + rng.randbytes(rng.choice([0, 8, 600]))
    return kind, rng.randbytes(8)


def mutate(rng: random.Random, seed: GgufFile) -> GgufFile:
    """A copy with one to four faults."""
    file = seed.copy()
    for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
        rng.choice(_FAULTS)(rng, file)
    return file


def _wrong_count(rng: random.Random, file: GgufFile) -> None:
    found = [e for e in file.entries if e.key.endswith(_COUNTS)]
    if found and rng.random() < 0.8:
        entry = rng.choice(found)
        if entry.kind in SCALARS and rng.random() < 0.8:
            size = struct.calcsize("<" + SCALARS[entry.kind])
            entry.raw = (_integer(rng) & _U64).to_bytes(8, "little")[:size]
        else:
            entry.kind, entry.raw = _value(rng)
    else:
        architecture = file.find(b"general.architecture")
        prefix = architecture.raw[8:] if architecture is not None else b"llama"
        ending = rng.choice(_COUNTS)
        key = ending if ending[:1] != b"." else prefix + ending
        file.entries.append(Entry(key, rng.choice([4, 10, 5]), (_integer(rng) & _U64).to_bytes(8, "little")))


def _any_value(rng: random.Random, file: GgufFile) -> None:
    if file.entries:
        entry = rng.choice(file.entries)
        entry.kind, entry.raw = _value(rng)


def _keys(rng: random.Random, file: GgufFile) -> None:
    if not file.entries:
        return
    at = rng.randrange(len(file.entries))
    what = rng.randrange(5)
    if what == 0:
        file.entries.insert(at, copy.copy(file.entries[at]))  # twice
    elif what == 1:
        del file.entries[at]
    elif what == 2:
        file.entries[at].key_length = _integer(rng)
    elif what == 3:
        file.entries[at].key = rng.choice([b"", b"\xff" * 8, b"k" * 70_000, b"\x1b[31m", b"general.architecture"])
    else:
        rng.shuffle(file.entries)


def _shape(rng: random.Random, file: GgufFile) -> None:
    if not file.tensors:
        return
    tensor = rng.choice(file.tensors)
    what = rng.randrange(4)
    if what == 0:
        tensor.n_dims = rng.choice([0, 1, 2, 3, 5, 1 << 31])
    elif what == 1:
        tensor.dims = [_integer(rng) for _ in range(rng.randrange(6))]
    elif tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = _integer(rng) if what == 2 else rng.randrange(0, 17)


def _place(rng: random.Random, file: GgufFile) -> None:
    if not file.tensors:
        return
    tensor = rng.choice(file.tensors)
    what = rng.randrange(4)
    if what == 0:
        tensor.offset = _integer(rng)
    elif what == 1:
        tensor.offset += rng.choice([-32, -1, 1, 32, 1 << 40])
    elif what == 2:
        tensor.kind = rng.choice([*range(45), 255, 1 << 31])
    else:
        rng.shuffle(file.tensors)


def _names(rng: random.Random, file: GgufFile) -> None:
    if not file.tensors:
        return
    tensor = rng.choice(file.tensors)
    what = rng.randrange(4)
    if what == 0:
        tensor.name = rng.choice(file.tensors).name  # twice
    elif what == 1:
        tensor.name = rng.choice(
            [
                b"",
                b"x" * 64,
                b"x" * 5000,
                b"\xff\xfe",
                b"blk.999999.ffn_up_exps.weight",
                b"blk.-1.x",
                b"blk.0.ffn_up.0.weight",
            ]
        )
    elif what == 2:
        file.tensors.remove(tensor)
    else:
        tensor.name = tensor.name.replace(b"blk.0", b"blk.511").replace(
            b"_exps", rng.choice([b"", b"_chexps", b"_shexp"])
        )


def _numbers(rng: random.Random, file: GgufFile) -> None:
    what = rng.randrange(4)
    if what == 0:
        file.n_tensors = _integer(rng)
    elif what == 1:
        file.n_entries = _integer(rng)
    elif what == 2:
        file.version = rng.choice([0, 1, 2, 4, 0x03000000, 0xFFFFFFFF])
    else:
        file.magic = rng.choice([b"GGML", b"tjgg", b"\0\0\0\0", b"<htm", b"vers"])


def _size(rng: random.Random, file: GgufFile) -> None:
    file.n_data_bytes = rng.choice(
        [0, 1, file.n_data_bytes // 2, max(0, file.n_data_bytes - 1), file.n_data_bytes + 33]
    )


_FAULTS = (_wrong_count, _wrong_count, _wrong_count, _any_value, _keys, _shape, _shape, _place, _names, _numbers, _size)


def mutate_to_bytes(rng: random.Random, seed: GgufFile) -> tuple[bytes, int]:
    """(header, bytes of data after it): half with faults in the structure, half with noise, some with both."""
    file = mutate(rng, seed) if rng.random() < 0.75 else seed
    header = file.header()
    if file is seed or rng.random() < 0.1:
        header = mutate_bytes(rng, header)
    return header, file.n_data_bytes
