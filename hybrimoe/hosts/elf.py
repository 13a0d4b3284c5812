"""What an ELF file says of itself: for which machine it is, and which libraries the loader brings for it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hybrimoe.files import open_regular

__all__ = ["MAGIC", "Elf", "read_elf"]

MAGIC = b"\x7fELF"
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 1, 5, 15, 29
# More than any real program has: a damaged file must not keep us reading.
_MOST_HEADERS, _MOST_DYNAMIC_BYTES, _MOST_NAME_BYTES = 4096, 1 << 20, 4096
_MACHINES = {3: "i386", 8: "MIPS", 21: "PowerPC64", 40: "ARM", 62: "x86-64", 183: "AArch64", 243: "RISC-V",
             258: "LoongArch"}  # fmt: skip


@dataclass(frozen=True)
class Elf:
    """`machine` is ELF's number for the instruction set, `bits` 32 or 64. Without a dynamic section both lists of names
    are empty: nothing is loaded beside the file. `library_paths` are its own folders to look in, `$ORIGIN` included."""

    machine: int
    bits: int
    little_endian: bool
    needed: tuple[str, ...] = ()
    library_paths: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """What users call the machine, for example 'x86-64'."""
        return f"{_MACHINES.get(self.machine, f'machine {self.machine}')}{', 32 bit' if self.bits == 32 else ''}"

    def same_machine(self, other: Elf) -> bool:
        mine = (self.machine, self.bits, self.little_endian)
        return mine == (other.machine, other.bits, other.little_endian)


def read_elf(path: Path) -> Elf | None:
    """The file's header and dynamic section; None for a file of another kind or a damaged one. Raises OSError."""
    with open_regular(path) as file:
        try:
            return _read(file)
        except (struct.error, ValueError, OverflowError):
            return None


def _read(file: BinaryIO) -> Elf | None:
    ident = file.read(16)
    if len(ident) < 16 or ident[:4] != MAGIC or ident[4] not in (1, 2) or ident[5] not in (1, 2):
        return None
    bits, order = (32, 64)[ident[4] - 1], "<>"[ident[5] - 1]
    word = "IQ"[ident[4] - 1]

    def unpack(layout: str, offset: int) -> tuple[int, ...]:
        file.seek(offset)
        return struct.unpack(order + layout, file.read(struct.calcsize(order + layout)))

    (machine,) = unpack("H", 18)
    (headers_at,) = unpack(word, 28 if bits == 32 else 32)
    header_bytes, n_headers = unpack("HH", 42 if bits == 32 else 54)
    segments = []
    for i in range(min(n_headers, _MOST_HEADERS)):
        at = headers_at + i * header_bytes
        if bits == 32:
            kind, offset, address, _, n_bytes = unpack("IIIII", at)
        else:
            kind, _, offset, address, _, n_bytes = unpack("IIQQQQ", at)
        segments.append((kind, offset, address, n_bytes))
    dynamic = next((s for s in segments if s[0] == _PT_DYNAMIC), None)
    if dynamic is None:
        return Elf(machine, bits, order == "<")
    entries = []
    entry_bytes = struct.calcsize(order + word * 2)
    for i in range(min(dynamic[3], _MOST_DYNAMIC_BYTES) // entry_bytes):
        tag, value = unpack(word * 2, dynamic[1] + i * entry_bytes)
        if tag == 0:
            break
        entries.append((tag, value))
    strings = next((value for tag, value in entries if tag == _DT_STRTAB), 0)
    strings_at = next(
        (offset + strings - address for kind, offset, address, n in segments
         if kind == _PT_LOAD and address <= strings < address + n), None,
    )  # fmt: skip
    if strings_at is None:
        return None

    def text(at: int) -> str:
        file.seek(strings_at + at)
        return file.read(_MOST_NAME_BYTES).partition(b"\0")[0].decode("utf-8", "surrogateescape")

    needed = tuple(text(value) for tag, value in entries if tag == _DT_NEEDED)
    paths = [text(value) for tag, value in entries if tag in (_DT_RPATH, _DT_RUNPATH)]
    folders = tuple(folder for path in paths for folder in path.split(":") if folder)
    return Elf(machine, bits, order == "<", needed, folders)
