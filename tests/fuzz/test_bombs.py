"""Small files that ask for much memory, made on purpose: each is refused, or read in twice its size and a little."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from fuzz import corpus, gguf_file, trace_file
from fuzz.limits import Memory, time_limit
from fuzz.targets import Seeds
from hybrimoe.errors import HybrimoeError, ModelError, UsageError
from hybrimoe.gguf_header import read_header
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.format import read
from hybrimoe.trace.importers import ImportOptions, import_files

MIB = 1 << 20


def header_of_many(kind: int, n_items: int, item: bytes, n_entries: int) -> bytes:
    raw = struct.pack("<IQ", kind, n_items) + item * n_items
    entries = [gguf_file.Entry(b"k%d" % i, gguf_file.ARRAY, raw) for i in range(n_entries)]
    architecture = gguf_file.Entry(b"general.architecture", gguf_file.STRING, struct.pack("<Q", 5) + b"llama")
    return gguf_file.GgufFile(entries=[architecture, *entries]).header()


@pytest.mark.parametrize(
    "header",
    [
        header_of_many(0, 4000, b"\7", 2000),  # arrays of bytes: a Python number takes more than one
        header_of_many(4, 4000, b"\7\0\1\0", 500),
        gguf_file.GgufFile(
            entries=[
                gguf_file.Entry(
                    b"k%d" % i, gguf_file.STRING, struct.pack("<Q", MIB) + (b"a" * (MIB - 4) + b"\xf0\x9f\x98\x80")
                )
                for i in range(12)
            ]
        ).header(),  # one wide character makes four bytes of each
    ],
    ids=["bytes", "integers", "texts"],
)
def test_header(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(header)
    read_header(tmp_path / "a.gguf")
    with Memory() as memory, time_limit(60):
        read_header(path)
    assert memory.peak_bytes <= 2 * len(header) + 32 * MIB


def test_header_of_too_many_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    entries = [gguf_file.Entry(b"%d" % i, 0, b"\1") for i in range(70_000)]
    path.write_bytes(gguf_file.GgufFile(entries=entries).header())
    with pytest.raises(ModelError, match="more than any model has"):
        read_header(path)


def test_trace_that_unpacks_to_more_than_it_says(seeds: Seeds, tmp_path: Path) -> None:
    parts = trace_file.parse(seeds.traces[0].read_bytes())
    parts.blocks[0].arrays[0][3] = zlib.compress(bytes(256 * MIB), 9)
    path = tmp_path / "a.trace"
    path.write_bytes(parts.to_bytes())
    with Memory() as memory, pytest.raises(TraceError, match="another size"):
        read(path)
    assert memory.peak_bytes <= 64 * MIB


def test_trace_that_says_how_much(seeds: Seeds, tmp_path: Path) -> None:
    """More than any machine's memory: said before it is taken."""
    parts = trace_file.parse(seeds.traces[0].read_bytes())
    parts.blocks[0].arrays[0][2] = [1 << 40, 2, 2]
    path = tmp_path / "a.trace"
    path.write_bytes(parts.to_bytes())
    with pytest.raises(HybrimoeError, match="GiB of memory") as caught:
        read(path)
    assert caught.value.exit_code == 4


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("experts.npy", head.getvalue())
    with pytest.raises(TraceError, match="another size than its head says"):
        import_files([path], ImportOptions())


def test_csv_of_many_layers(tmp_path: Path) -> None:
    """A row a layer, ever lower: every row begins a token, and every token would have every layer."""
    path = tmp_path / "a.csv"
    path.write_text("layer,expert\n" + "".join(f"{layer},1\n" for layer in range(20_000, 0, -1)))
    with Memory() as memory, pytest.raises(TraceError, match="no model has so many"):
        import_files([path], ImportOptions(top_k=1))
    assert memory.peak_bytes <= 32 * MIB


def test_nested_documents(tmp_path: Path) -> None:
    from hybrimoe.config import Sources, resolve
    from hybrimoe.machine.files import read_machine

    path = tmp_path / "a.json"
    path.write_text("[" * 200_000)
    with pytest.raises(UsageError, match="no JSON"):
        read_machine(path)
    path.write_text(json.dumps({**corpus.machine(), "cpu": {**corpus.machine()["cpu"], "cores": 1e999}}))
    with pytest.raises(UsageError, match="malformed"):
        read_machine(path)
    path.write_text("x = " + "[" * 20_000 + "]" * 20_000)
    with pytest.raises(UsageError):
        resolve([], {}, Sources(environment={}, file=path))
