"""The trace file: what goes in comes out, and every kind of damage is named."""

from __future__ import annotations

import errno
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe.errors import UsageError
from hybrimoe.trace import blocks
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.events import EventType, Note, new_events
from hybrimoe.trace.format import ModelIdentity, read
from hybrimoe.trace.writer import TraceWriter

MODEL = ModelIdentity("toy", n_layers=3, n_expert=8, top_k=2, layers=(1, 2, 3), expert_bytes=(100, 100, 200))
# magic, then version, bytes of JSON and CRC of the JSON
HEAD_BYTES = len(blocks.MAGIC) + 12


def ids(n: int, seed: int = 0, model: ModelIdentity = MODEL) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((n, model.n_layers, model.n_expert)), axis=2)[:, :, : model.top_k]


def write(path: Path, n: int = 600, **arrays: Any) -> np.ndarray:
    """A file of blocks of 256 tokens; returns the ids."""
    experts = ids(n)
    with TraceWriter(path, MODEL, source={"tool": "test"}) as writer:
        for first in range(0, n, 100):
            part = slice(first, min(n, first + 100))
            given = {name: a[part] for name, a in arrays.items()}
            writer.append_tokens(experts[part], prompt=np.arange(n)[part] // 250, **given)
    return experts


def test_everything_comes_back(tmp_path: Path) -> None:
    n = 600
    rng = np.random.default_rng(1)
    arrays: dict[str, Any] = {
        "weights": rng.random((n, 3, 2)).astype(np.float32),
        "scores": rng.random((n, 3, 8)).astype(np.float16),
        "lookahead": rng.random((n, 3, 3, 8)).astype(np.float16),
        "is_decode": rng.integers(0, 2, n),
        "device": rng.integers(-1, 2, (n, 3, 2)),
        "time_us": rng.random((n, 3)).astype(np.float32),
        "bytes": rng.integers(0, 1 << 40, (n, 3)),
    }
    experts = write(tmp_path / "a.trace", n, **arrays)
    trace = read(tmp_path / "a.trace")
    assert trace.complete and trace.note == "" and trace.model == MODEL and trace.source == {"tool": "test"}
    np.testing.assert_array_equal(trace.experts, experts)
    assert trace.prompt_offsets.tolist() == [0, 250, 500, 600]
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(trace, name), array)
    assert trace.trace().prompt_offsets.tolist() == [0, 250, 500, 600]
    ids_only = read(tmp_path / "a.trace", want=())
    assert ids_only.scores is None and ids_only.is_decode is not None
    first = trace.head(1)
    assert first.n_tokens == 250 and first.scores is not None and len(first.scores) == 250


def test_layers_that_did_not_run(tmp_path: Path) -> None:
    experts = ids(4)
    experts[1:3, 2] = -1
    with TraceWriter(tmp_path / "a.trace", MODEL) as writer:
        writer.append_tokens(experts, prompt=np.zeros(4))
    np.testing.assert_array_equal(read(tmp_path / "a.trace").experts, experts)


@pytest.mark.parametrize("n_expert", [255, 256, 1024])
def test_many_experts(tmp_path: Path, n_expert: int) -> None:
    model = ModelIdentity("wide", n_layers=1, n_expert=n_expert, top_k=2)
    experts = np.array([[[0, n_expert - 1]], [[-1, -1]]])
    with TraceWriter(tmp_path / "a.trace", model) as writer:
        writer.append_tokens(experts, prompt=[0, 0])
    np.testing.assert_array_equal(read(tmp_path / "a.trace").experts, experts)


def test_a_half_written_file_is_readable_up_to_its_last_whole_block(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    experts = write(path)
    whole = path.read_bytes()
    read_tokens = set()
    for size in range(len(whole) - 1, 200, -97):
        path.write_bytes(whole[:size])
        try:
            trace = read(path)
        except TraceError as error:
            assert "no whole block" in error.message or "cut short in its head" in error.message
            continue
        assert not trace.complete and "last whole block" in trace.note
        np.testing.assert_array_equal(trace.experts, experts[: trace.n_tokens])
        read_tokens.add(trace.n_tokens)
    assert read_tokens == {300, 600}  # blocks of 300: the writer's calls of 100 gather to the first size above 255


def test_a_writer_that_is_never_closed(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "a.trace", MODEL)
    writer.append_tokens(ids(300), prompt=np.zeros(300))
    writer.append_tokens(ids(5), prompt=np.zeros(5))  # gathered, not written
    trace = read(tmp_path / "a.trace")
    assert trace.n_tokens == 300 and not trace.complete and "never closed" in trace.note


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_flipped_bit_is_noticed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("flip") / "a.trace"
    write(path, 100)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    with pytest.raises(TraceError) as caught:
        read(path)
    assert "a.trace" in caught.value.message and caught.value.exit_code == 3


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    write(path)
    whole = path.read_bytes()

    def error_of(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(TraceError) as caught:
            read(path)
        return caught.value.message

    assert error_of(b"") == "the trace 'a.trace' is empty"
    assert "is no hybrimoe trace" in error_of(b"PK\x03\x04" + whole[4:])
    assert "cut short in its head" in error_of(whole[: HEAD_BYTES + 3])
    newer = bytearray(whole)
    struct.pack_into("<I", newer, len(blocks.MAGIC), 7)
    assert "format version 7, this program reads version 1" in error_of(bytes(newer))
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 255
    message = error_of(bytes(middle))
    assert "corrupt in block " in message and " at byte " in message
    with pytest.raises(TraceError, match="no such trace"):
        read(tmp_path / "absent.trace")


def raw_file(path: Path, model: dict[str, Any], experts: np.ndarray) -> None:
    """A file that the writer would refuse to write."""
    arrays = {"experts": experts, "prompt": np.zeros(len(experts), np.int32)}
    body = blocks.pack_block("tokens", {"first": 0, "n": len(experts)}, arrays)
    path.write_bytes(blocks.pack_head({"model": model}) + body)


def test_ids_that_the_model_does_not_have(tmp_path: Path) -> None:
    experts = ids(40).astype(np.uint8)
    experts[17, 2, 1] = 8
    raw_file(tmp_path / "a.trace", {**MODEL.__dict__}, experts)
    with pytest.raises(TraceError, match=r"expert 8 at token 17, layer 2, outside 0\.\.7"):
        read(tmp_path / "a.trace")
    experts[17, 2, 1] = 255
    raw_file(tmp_path / "a.trace", {**MODEL.__dict__}, experts)
    with pytest.raises(TraceError, match="no expert at token 17, layer 2"):
        read(tmp_path / "a.trace")


@pytest.mark.parametrize(
    "change", [{"n_expert": 5000}, {"top_k": 9}, {"n_layers": 0}, {"layers": [1]}, {"expert_bytes": [1, 2]}]
)
def test_a_model_that_cannot_be(tmp_path: Path, change: dict[str, Any]) -> None:
    raw_file(tmp_path / "a.trace", {**MODEL.__dict__, **change}, ids(4).astype(np.uint8))
    with pytest.raises(TraceError, match="is corrupt: its model has"):
        read(tmp_path / "a.trace")


def test_a_head_of_another_kind(tmp_path: Path) -> None:
    text = json.dumps([1]).encode()
    head = blocks.MAGIC + struct.pack("<III", 1, len(text), zlib.crc32(text)) + text
    (tmp_path / "a.trace").write_bytes(head)
    with pytest.raises(TraceError, match="its head is no object"):
        read(tmp_path / "a.trace")
    assert list(blocks.read_blocks(io.BytesIO(b"HMBK"), "x")) == [None]


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "a.trace", MODEL)
    with pytest.raises(UsageError, match="token 3, layer 0: expert 9 is outside"):
        bad = ids(5)
        bad[3, 0, 0] = 9
        writer.append_tokens(bad, prompt=np.zeros(5))
    with pytest.raises(UsageError, match="weights have shape"):
        writer.append_tokens(ids(5), prompt=np.zeros(5), weights=np.zeros((5, 3, 3)))
    writer.append_tokens(ids(5), prompt=np.zeros(5))
    with pytest.raises(UsageError, match="earlier ones with"):
        writer.append_tokens(ids(5), prompt=np.zeros(5), is_decode=np.zeros(5))
    with pytest.raises(UsageError, match="must be integers"):
        writer.append_tokens(np.zeros((5, 2, 2), int), prompt=np.zeros(5))


class FullDisk(io.RawIOBase):
    """A file on a disk with so many bytes left."""

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def write(self, data: Any) -> int:
        n = min(len(data), self.left)
        self.file.write(bytes(data[:n]))
        self.left -= n
        if n < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return n

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return int(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_stops_the_recording_with_a_message(tmp_path: Path) -> None:
    said: list[str] = []
    writer = TraceWriter(tmp_path / "a.trace", MODEL, on_failure=said.append)
    writer.append_tokens(ids(300), prompt=np.zeros(300))
    assert writer._file is not None
    writer._file = FullDisk(writer._file, 200)  # type: ignore[assignment]
    for _ in range(5):
        writer.append_tokens(ids(300), prompt=np.zeros(300))
    events = new_events(1)
    events["type"] = EventType.PROMPT
    writer.append_events(events)
    writer.close()
    assert len(said) == 1 and "the disk is full; 300 records are kept" in said[0] and writer.failure == said[0]
    trace = read(tmp_path / "a.trace")
    assert trace.n_tokens == 300 and "never closed" in trace.note


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    from hybrimoe.errors import HybrimoeError

    with pytest.raises(HybrimoeError, match="cannot write"):
        TraceWriter(tmp_path / "absent" / "a.trace", MODEL)


def test_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError), TraceWriter(tmp_path / "a.trace", MODEL, temporary=True) as writer:
        writer.append_tokens(ids(300), prompt=np.zeros(300))
        writer.append_tokens(np.zeros((1, 1, 1), int), prompt=[0])
    assert list(tmp_path.iterdir()) == []


def test_tokens_come_from_layer_events(tmp_path: Path) -> None:
    """Prefill of 3 tokens, whose last layer computes one, then two decoded tokens, over two appended blocks."""
    rng = np.random.default_rng(0)
    want = np.full((5, 3, 2), -1)
    with TraceWriter(tmp_path / "a.trace", MODEL) as writer:
        for steps in ([(0, 3)], [(3, 1), (4, 1)]):
            kinds: list[tuple[int, ...]] = []
            chosen: list[int] = []
            for first, n in steps:
                kinds.append((Note.STEP, 0, n, int(n == 1), -1))
                for layer in range(3):
                    rows = 1 if layer == 2 else n
                    experts = np.array([rng.permutation(8)[:2] for _ in range(rows)])
                    want[first + n - rows : first + n, layer] = experts
                    kinds.append((EventType.LAYER, layer, rows, 2, len(chosen)))
                    chosen += experts.ravel().tolist()
            events = new_events(len(kinds))
            for column, values in zip(
                ("type", "layer", "n_rows", "a", "offset"), zip(*kinds, strict=True), strict=True
            ):
                events[column] = values
            events["now_us"] = np.arange(len(kinds)) + 1000 * steps[0][0] + 1
            writer.append_events(events, ids=chosen)
    trace = read(tmp_path / "a.trace")
    np.testing.assert_array_equal(trace.experts, want)
    assert trace.is_decode is not None and trace.is_decode.tolist() == [0, 0, 0, 1, 1]
    assert trace.events is not None and len(trace.events) == 12
