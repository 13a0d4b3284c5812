"""GGUF inspection: what it reports on well-formed models, and that a damaged file is always a `ModelError`."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from hybrimoe.errors import HybrimoeError, ModelError, render
from hybrimoe.gguf_header import GGML_TYPES, read_header
from hybrimoe.gguf_model import GgufModel, inspect

N_EMBD, N_FF, N_EXPERTS = 64, 32, 8
MatrixType = gguf.GGMLQuantizationType


def add_matrix(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: MatrixType = MatrixType.F32) -> None:
    """Adds zeros; `shape` in ggml's order."""
    zeros = np.zeros(tuple(reversed(shape)), dtype=np.float32)
    data = zeros if kind == MatrixType.F32 else gguf.quants.quantize(zeros, kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def add_dense_layer(writer: gguf.GGUFWriter, i: int) -> None:
    add_matrix(writer, f"blk.{i}.attn_q.weight", (N_EMBD, N_EMBD))
    add_matrix(writer, f"blk.{i}.ffn_norm.weight", (N_EMBD,))


def add_experts(
    writer: gguf.GGUFWriter, i: int, down: MatrixType = MatrixType.Q4_0, merged: bool = False, shared: bool = False
) -> None:
    q4 = MatrixType.Q4_0
    add_matrix(writer, f"blk.{i}.ffn_gate_inp.weight", (N_EMBD, N_EXPERTS))
    if merged:
        add_matrix(writer, f"blk.{i}.ffn_gate_up_exps.weight", (N_EMBD, 2 * N_FF, N_EXPERTS), q4)
    else:
        add_matrix(writer, f"blk.{i}.ffn_gate_exps.weight", (N_EMBD, N_FF, N_EXPERTS), q4)
        add_matrix(writer, f"blk.{i}.ffn_up_exps.weight", (N_EMBD, N_FF, N_EXPERTS), q4)
    add_matrix(writer, f"blk.{i}.ffn_down_exps.weight", (N_FF, N_EMBD, N_EXPERTS), down)
    if shared:
        add_matrix(writer, f"blk.{i}.ffn_up_shexp.weight", (N_EMBD, N_FF))


def write_gguf(path: Path, fill: Callable[[gguf.GGUFWriter], None], arch: str = "testmoe", **split: int) -> Path:
    writer = gguf.GGUFWriter(path, arch, use_temp_file=False)
    fill(writer)
    for key, value in split.items():
        (writer.add_int32 if key == "tensors_count" else writer.add_uint16)(f"split.{key.replace('_', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_common(writer: gguf.GGUFWriter, n_layers: int = 3, **more: Any) -> None:
    writer.add_name("Test MoE")
    writer.add_block_count(n_layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(N_EMBD)
    writer.add_head_count(4)
    writer.add_head_count_kv(more.get("n_head_kv", 2))
    writer.add_file_type(2)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(300)])
    writer.add_chat_template("{{ messages }}")


def mixed_model(writer: gguf.GGUFWriter) -> None:
    """Layer 0 dense, layer 1 mixed quantisation with a shared expert, layer 2 merged gate_up."""
    add_common(writer)
    writer.add_expert_count(N_EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_expert_shared_count(1)
    for i in range(3):
        add_dense_layer(writer, i)
    add_experts(writer, 1, down=MatrixType.Q8_0, shared=True)
    add_experts(writer, 2, merged=True)


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "mixed.gguf", mixed_model)


def q4(n: int) -> int:
    return n // 32 * 18


def test_reports_experts_and_bytes_per_layer(model_path: Path) -> None:
    model = inspect(model_path)
    assert (model.architecture, model.name, model.file_type) == ("testmoe", "Test MoE", "Q4_0")
    assert (model.n_layers, model.n_embd, model.n_ctx_train, model.n_vocab) == (3, N_EMBD, 2048, 300)
    assert (model.n_experts, model.n_experts_used, model.n_shared_experts) == (N_EXPERTS, 2, 1)
    assert model.chat_template == "{{ messages }}"
    assert model.tokenizer_model == "llama"
    assert model.moe_layer_indices == (1, 2)
    mixed, merged = model.moe_layers
    assert mixed.gate_bytes == mixed.up_bytes == q4(N_EMBD * N_FF)
    assert mixed.down_bytes == N_EMBD * N_FF // 32 * 34
    assert mixed.gate_up_bytes == 0
    assert mixed.expert_types == ("Q4_0", "Q8_0")
    assert mixed.shared_bytes == N_EMBD * N_FF * 4
    assert (merged.gate_up_bytes, merged.gate_bytes, merged.merged_gate_up) == (2 * q4(N_EMBD * N_FF), 0, True)
    assert mixed.expert_bytes == N_EXPERTS * mixed.bytes_per_expert
    assert [t.name for t in mixed.router_tensors] == ["blk.1.ffn_gate_inp.weight"]


def test_byte_sums_are_those_of_the_file(model_path: Path) -> None:
    model = inspect(model_path)
    reference = gguf.GGUFReader(model_path)
    assert model.total_bytes == sum(int(t.n_bytes) for t in reference.tensors)
    assert [(t.name, t.offset) for t in model.tensors] == [(t.name, int(t.data_offset)) for t in reference.tensors]
    assert model.dense_bytes + model.expert_bytes == model.total_bytes
    assert model.n_params == sum(int(t.n_elements) for t in reference.tensors)
    assert model.file_bytes == model_path.stat().st_size
    assert model.active_bytes == model.dense_bytes + 2 * sum(x.bytes_per_expert for x in model.moe_layers)
    assert json.loads(json.dumps(model.to_dict()))["layers"][0]["layer"] == 1


def test_type_sizes_are_those_of_the_gguf_package() -> None:
    known = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    for number, kind in GGML_TYPES.items():
        if number in known and kind.name != "Q8_1":  # gguf 0.19 has 40 bytes, ggml's block_q8_1 has 36
            assert known[number] == (kind.block_elems, kind.block_bytes), kind.name
    assert known.keys() <= GGML_TYPES.keys()


def test_top_k_and_kv_heads_per_layer(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        add_common(writer, n_head_kv=[0, 2, 1])
        writer.add_expert_count(N_EXPERTS)
        writer.add_array("testmoe.expert_used_count", [0, 4, 2])
        add_experts(writer, 1)
        add_experts(writer, 2)

    model = inspect(write_gguf(tmp_path / "m.gguf", fill))
    assert [layer.n_experts_used for layer in model.moe_layers] == [4, 2]
    assert model.n_experts_used == 4
    assert model.kv.n_head_kv == (0, 2, 1)
    assert model.kv.bytes_for(100) == 3 * (16 + 16) * 2 * 100


def test_expert_biases_count_towards_their_expert(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        add_common(writer, n_layers=1)
        writer.add_expert_count(N_EXPERTS)
        writer.add_expert_used_count(2)
        add_experts(writer, 0)
        add_matrix(writer, "blk.0.ffn_down_exps.bias", (N_EMBD, N_EXPERTS))
        add_matrix(writer, "blk.0.ffn_down_exps.scale", (N_EXPERTS,))

    layer = inspect(write_gguf(tmp_path / "m.gguf", fill)).moe_layers[0]
    assert layer.down_bytes == q4(N_FF * N_EMBD) + N_EMBD * 4 + 4
    assert layer.expert_bytes == N_EXPERTS * layer.bytes_per_expert


def test_prediction_head_is_no_ordinary_layer(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        add_common(writer)
        writer.add_expert_count(N_EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_uint32("testmoe.nextn_predict_layers", 1)
        add_experts(writer, 1)
        add_experts(writer, 2)

    model = inspect(write_gguf(tmp_path / "m.gguf", fill))
    assert model.moe_layer_indices == (1,)
    assert [layer.predicts_ahead for layer in model.moe_layers] == [False, True]
    assert len(model.kv.n_head_kv) == 2


def dense_model(writer: gguf.GGUFWriter) -> None:
    add_common(writer)
    add_dense_layer(writer, 0)


def test_dense_model_is_inspected_but_refused(tmp_path: Path) -> None:
    model = inspect(write_gguf(tmp_path / "qwen3-8b.gguf", dense_model, arch="qwen3"))
    assert not model.is_moe
    with pytest.raises(ModelError) as caught:
        model.require_moe()
    assert caught.value.exit_code == 3
    assert render(caught.value) == (
        "error: 'qwen3-8b.gguf' has no experts (architecture qwen3), nothing to schedule\nhint: hybrimoe models list"
    )


def test_experts_of_the_old_layout_are_named(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        add_common(writer)
        for e in range(2):
            add_matrix(writer, f"blk.0.ffn_gate.{e}.weight", (N_EMBD, N_FF))

    with pytest.raises(ModelError, match="tensor of its own"):
        inspect(write_gguf(tmp_path / "m.gguf", fill)).require_moe()


# --- split models ---------------------------------------------------------------------------------------------------


def write_split(folder: Path, n_tensors: int | None = None) -> list[Path]:
    def first(writer: gguf.GGUFWriter) -> None:
        add_common(writer, n_layers=2)
        writer.add_expert_count(N_EXPERTS)
        writer.add_expert_used_count(2)
        add_experts(writer, 0)

    total = 8 if n_tensors is None else n_tensors
    return [
        write_gguf(folder / "big-00001-of-00002.gguf", first, no=0, count=2, tensors_count=total),
        write_gguf(folder / "big-00002-of-00002.gguf", lambda w: add_experts(w, 1), no=1, count=2, tensors_count=total),
    ]


def test_split_model_is_read_whole(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    model = inspect(paths[0])
    assert model.parts == tuple(paths)
    assert model.moe_layer_indices == (0, 1)
    assert {t.path for t in model.moe_layers[1].expert_tensors} == {paths[1]}
    assert model.file_bytes == sum(p.stat().st_size for p in paths)


def test_missing_and_wrong_parts_are_named(tmp_path: Path) -> None:
    first, second = write_split(tmp_path)
    with pytest.raises(ModelError, match="part 2 of 2") as caught:
        inspect(second)
    assert first.name in caught.value.hint
    second.unlink()
    with pytest.raises(ModelError, match="part 2 of 2 is missing") as caught:
        inspect(first)
    assert second.name in caught.value.message
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match="is not part 2"):
        inspect(first)


def test_split_model_with_a_strange_name_or_count(tmp_path: Path) -> None:
    first, _ = write_split(tmp_path, n_tensors=9)
    with pytest.raises(ModelError, match="expected 9"):
        inspect(first)
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="name does not say so"):
        inspect(renamed)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + b"\0" * 100, "not a GGUF file"),
        (b"GG", "not a GGUF file"),
        (b"GGUF", "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors do not fit"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "metadata entries do not fit"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "does not name an architecture"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 50) + b"x" * 20, "bytes long"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"tjgg" + b"\0" * 60, "old GGML"),
    ],
)
def test_damaged_starts(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        inspect(path)
    assert expected in caught.value.message
    assert "broken.gguf" in caught.value.message
    assert caught.value.hint


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        inspect(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="no such file"):
        inspect(write_gguf(tmp_path / "x.gguf", dense_model) / "y.gguf")
    with pytest.raises(ModelError, match="is a directory") as caught:
        inspect(tmp_path)
    assert "x.gguf" in caught.value.hint
    with pytest.raises(ModelError, match="not a usable file name"):
        inspect("a\0b.gguf")
    fifo = tmp_path / "pipe.gguf"
    os.mkfifo(fifo)
    with pytest.raises(ModelError, match="not a regular file"):
        inspect(fifo)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file_is_a_run_time_error(model_path: Path) -> None:
    model_path.chmod(0)
    with pytest.raises(HybrimoeError) as caught:
        inspect(model_path)
    assert caught.value.exit_code == 1


def test_every_truncation_is_an_error_and_header_only_accepts_missing_weights(model_path: Path) -> None:
    whole = model_path.read_bytes()
    data_offset = read_header(model_path).data_offset
    last = max(t.offset + t.n_bytes for t in read_header(model_path).tensors)
    for n_bytes in [*range(0, data_offset, 97), data_offset - 40, data_offset, last - 1]:
        model_path.write_bytes(whole[:n_bytes])
        with pytest.raises(ModelError):
            inspect(model_path)
    model_path.write_bytes(whole[:data_offset])
    assert inspect(model_path, header_only=True).moe_layer_indices == (1, 2)


def test_unknown_quantisation_type(model_path: Path) -> None:
    content = bytearray(model_path.read_bytes())
    at = content.index(b"blk.1.ffn_down_exps.weight") + len("blk.1.ffn_down_exps.weight") + 4 + 3 * 8
    assert content[at] == MatrixType.Q8_0
    for number, expected in ((31, "removed"), (99, "unknown quantisation type 99")):
        content[at] = number
        model_path.write_bytes(content)
        with pytest.raises(ModelError, match=expected):
            inspect(model_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_used_count", 9),
        ("expert_used_count", 0),
        ("expert_count", 4000),
        ("block_count", 2),
        ("block_count", 1 << 30),
    ],
)
def test_impossible_hyperparameters(model_path: Path, key: str, value: int) -> None:
    content = bytearray(model_path.read_bytes())
    at = content.index(f"testmoe.{key}".encode()) + len(f"testmoe.{key}") + 4
    content[at : at + 4] = struct.pack("<I", value)
    model_path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        inspect(model_path)


def test_a_vocabulary_costs_no_memory(tmp_path: Path) -> None:
    """Claims of huge counts in a sparse file are refused or skipped, never allocated."""
    path = tmp_path / "sparse.gguf"
    key = b"tokenizer.ggml.scores"
    header = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<IIQ", 9, 6, 1 << 30)
    path.write_bytes(header)
    os.truncate(path, (4 << 30) + 4096)
    with pytest.raises(ModelError, match="does not name an architecture"):
        inspect(path)
    path.write_bytes(header.replace(struct.pack("<IIQ", 9, 6, 1 << 30), struct.pack("<IIQ", 9, 8, 1 << 27)))
    os.truncate(path, 4 << 30)
    with pytest.raises(ModelError, match="would have 134217728 entries"):
        inspect(path)


@pytest.mark.parametrize("seed", range(6))
def test_mutated_headers_give_a_model_or_a_model_error(model_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    whole = model_path.read_bytes()
    n_header = read_header(model_path).data_offset
    words = [0, 1, 2, 8, 9, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
    n_refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(4, n_header - 8)
            how = rng.randrange(4)
            if how == 0:
                content[at] = rng.randrange(256)
            elif how == 1:
                width = rng.choice([1, 2, 4, 8])
                content[at : at + width] = rng.choice(words).to_bytes(8, "little")[:width]
            elif how == 2:
                del content[at : at + rng.randrange(1, 9)]
            else:
                content[at:at] = rng.randbytes(rng.randrange(1, 9))
        model_path.write_bytes(content)
        try:
            model = inspect(model_path)
        except ModelError as error:
            n_refused += 1
            assert "mixed.gguf" in error.message
            assert len(render(error).splitlines()) <= 2
        else:
            assert isinstance(model, GgufModel)
            json.dumps(model.to_dict())
    assert n_refused > 20
