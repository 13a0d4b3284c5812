"""What `dry_load` says, against llama.cpp's own log when it really loads the models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrimoe.dry_load import LoadShape, dry_load
from hybrimoe.errors import HybrimoeError, ModelError
from hybrimoe.gguf_header import read_header
from hybrimoe.gguf_model import inspect
from hybrimoe.planning import Setting, measure_needs

MIB = 1 << 20
LOAD = """
import ctypes, json, sys, llama_cpp
lines = []
@llama_cpp.llama_log_callback
def log(level, text, data):
    lines.append(text.decode("utf-8", "replace"))
llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
model_params = llama_cpp.llama_model_default_params()
model_params.use_extra_bufts, model_params.n_gpu_layers = False, 0
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), model_params)
params = llama_cpp.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch = int(sys.argv[2]), 2048, 512
assert llama_cpp.llama_init_from_model(model, params)
print(json.dumps("".join(lines)))
"""
MODELS = ("mixtral", "deepseek2", "gpt-oss", "nemotron-h", "qwen3moe")


def real_log(path: Path, n_ctx: int) -> str:
    """llama.cpp's log while it loads the model, weights and all."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(path), str(n_ctx)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return str(json.loads(done.stdout.strip().splitlines()[-1]))


def logged(log: str, pattern: str) -> float:
    return sum(float(m) for m in re.findall(pattern, log))


@pytest.mark.parametrize("name", MODELS)
def test_buffers_are_those_of_a_real_load(tiny_model: Callable[..., Path], name: str) -> None:
    path = tiny_model(name)
    model = inspect(path)
    needs = measure_needs(model, Setting(n_ctx=1024).of_model(model))
    log = real_log(path, 1024)
    assert needs.exact
    weights = logged(log, r"model buffer size = +([\d.]+) MiB") * MIB
    assert needs.weight_bytes == pytest.approx(weights, rel=0.01)
    # The log rounds to hundredths.
    assert abs(needs.buffers.kv_bytes / MIB - logged(log, r"llama_kv_cache\w*: size = +([\d.]+) MiB")) <= 0.011
    assert needs.buffers.kv_bytes == model.kv.bytes_for(1024)
    recurrent = logged(log, r"llama_memory_recurrent: size = +([\d.]+) MiB") * MIB
    assert needs.buffers.recurrent_bytes == pytest.approx(recurrent, abs=1)
    compute = logged(log, r"compute buffer size = +([\d.]+) MiB") * MIB
    assert needs.buffers.all_compute_bytes == pytest.approx(compute, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_a_header_without_weights_gives_the_same(tiny_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    whole = inspect(tiny_model(name))
    path = tmp_path / "header.gguf"
    path.write_bytes(whole.path.read_bytes()[: read_header(whole.path).data_offset])
    alone = inspect(path, header_only=True)
    assert dry_load(alone, LoadShape(512)) == dry_load(whole, LoadShape(512))
    assert path.stat().st_size < whole.file_bytes


def test_split_headers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Parts with their weights missing, as at the start of a download."""
    split = pytest.importorskip("gguf")
    whole = inspect(tiny_model("mixtral"))
    parts = _split(whole.path, tmp_path, split)
    model = inspect(parts[0], header_only=True)
    assert len(model.parts) == 2
    assert dry_load(model, LoadShape(512)) == dry_load(whole, LoadShape(512))


def _split(path: Path, folder: Path, gguf: object) -> list[Path]:
    """Two headers that share the tensors of a model; no data."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

    reader = GGUFReader(path)
    tensors = list(reader.tensors)
    half = len(tensors) // 2
    made = []
    for number, some in enumerate((tensors[:half], tensors[half:])):
        part = folder / f"m-{number + 1:05}-of-00002.gguf"
        writer = GGUFWriter(part, str(reader.fields["general.architecture"].contents()))
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith(("GGUF.", "general.architecture")):
                    sub = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(key, field.contents(), field.types[0], sub)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(tensors))
        for t in some:
            shape = tuple(int(n) for n in reversed(t.shape))
            kind = GGMLQuantizationType(t.tensor_type)
            writer.add_tensor_info(t.name, shape, np.dtype(np.float32), int(t.n_bytes), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        made.append(part)
    return made


def test_a_model_that_llama_refuses_is_an_error(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny_model("mixtral").read_bytes()
    path = tmp_path / "odd.gguf"
    path.write_bytes(data.replace(b"ffn_gate_inp", b"ffn_gate_xxx"))
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load 'odd\.gguf'"):
        dry_load(inspect(path), LoadShape(512))


def test_where_llama_cannot_be_asked_sizes_are_estimated(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe.planning import memory

    def fail(*_: object) -> None:
        raise HybrimoeError("it crashed")

    monkeypatch.setattr(memory, "dry_load", fail)
    model = inspect(tiny_model("mixtral"))
    needs = measure_needs(model, Setting(n_ctx=1024))
    assert not needs.exact
    assert needs.source.startswith("estimated") and needs.source.endswith("it crashed")
    assert needs.kv_bytes == model.kv.bytes_for(1024)
    hybrid = measure_needs(inspect(tiny_model("nemotron-h")), Setting(n_ctx=1024))
    assert "recurrent state is unknown" in hybrid.source
