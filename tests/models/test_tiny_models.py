"""The makers of random models: llama.cpp loads what they write, and it computes something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_bench_model
import make_tiny_models
import numpy as np
import pytest
from moe_shapes import ARCHITECTURES

from hybrimoe.errors import UsageError
from hybrimoe.gguf_model import inspect
from hybrimoe.models.quantise import quantise, row_bytes, type_names

KINDS = [(name, kind, None) for name in ARCHITECTURES for kind in ("F32", "Q4_0")]
KINDS += [
    ("mixtral", "Q8_0", None),
    ("qwen3moe", "Q4_K", None),
    ("mixtral", "Q6_K", None),
    ("gpt-oss", "Q8_0", "MXFP4"),
]


def logits_of(path: Path, text: bytes = b"The quick brown fox") -> tuple[Any, Any]:
    """Logits of every prompt token and of three greedily decoded ones, each row a token."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    tokens = model.tokenize(text)
    model.eval(tokens)
    for _ in range(3):
        model.eval([int(np.argmax(model.scores[model.n_tokens - 1]))])
    scores = np.array(model.scores[: model.n_tokens])
    decoded = model.detokenize(tokens)
    model.close()
    return scores, decoded


@pytest.mark.parametrize(("arch", "kind", "expert_type"), KINDS)
def test_llama_cpp_runs_it(tiny_model: Callable[..., Path], arch: str, kind: str, expert_type: str | None) -> None:
    path = tiny_model(arch, kind, expert_type)
    model = inspect(path).require_moe()
    shape = ARCHITECTURES[arch].tiny
    assert (model.architecture, model.n_layers) == (ARCHITECTURES[arch].arch, shape.n_layers)
    assert {layer.n_experts for layer in model.moe_layers} == {shape.n_experts}
    assert max(layer.n_experts_used for layer in model.moe_layers) == shape.top_k
    assert model.moe_layers[0].expert_types == (expert_type or kind,)
    scores, text = logits_of(path)
    assert np.isfinite(scores).all()
    assert text.strip() == b"The quick brown fox"
    assert 0.5 < scores.std() < 2
    assert np.abs(np.diff(scores, axis=0)).mean(axis=1).min() > 0.1


def test_variants_are_what_they_claim(tiny_model: Callable[..., Path]) -> None:
    def layers(arch: str) -> Any:
        return inspect(tiny_model(arch)).moe_layers

    assert all(layer.merged_gate_up for layer in layers("deepseek2-merged"))
    assert all(layer.gate_bytes == layer.gate_up_bytes == 0 for layer in layers("nogate"))
    assert [layer.n_experts_used for layer in layers("nemotron-h")] == [2, 4]
    assert inspect(tiny_model("llama4")).moe_layer_indices == (1, 3)
    deepseek = inspect(tiny_model("deepseek2"))
    assert deepseek.moe_layer_indices == (1, 2)
    assert (deepseek.n_shared_experts, deepseek.n_expert_groups, deepseek.n_expert_groups_used) == (2, 4, 2)
    assert deepseek.kv.is_mla
    gpt_oss = layers("gpt-oss")[0]
    assert sum(t.name.endswith("_exps.bias") for t in gpt_oss.expert_tensors) == 3


def test_same_seed_same_file(tmp_path: Path) -> None:
    write = make_tiny_models.write_tiny_model
    first = write(tmp_path / "a.gguf", "mixtral", "Q4_0").read_bytes()
    assert write(tmp_path / "b.gguf", "mixtral", "Q4_0").read_bytes() == first
    assert write(tmp_path / "c.gguf", "mixtral", "Q4_0", seed=1).read_bytes() != first
    assert not list(tmp_path.glob(".*"))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_tiny_models.main(["--list"]) == 0
    assert set(ARCHITECTURES) <= set(capsys.readouterr().out.split())
    args = ["--out", str(tmp_path), "--arch", "qwen3moe", "--type", "Q8_0", "--experts", "12", "--top-k", "3"]
    assert make_tiny_models.main([*args, "--n-ff", "64"]) == 0
    model = inspect(tmp_path / "tiny-qwen3moe-Q8_0.gguf")
    assert (model.n_experts, model.n_experts_used) == (12, 3)
    for wrong in (["--arch", "gpt-5"], ["--type", "Q3_X"], ["--top-k", "99"], ["--layers", "0"]):
        assert make_tiny_models.main(["--out", str(tmp_path), *wrong]) == 2
        assert capsys.readouterr().err.splitlines()[0].startswith("error: ")


# ggml makes IQ2_S's tables when they are first asked for, which takes seconds.
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "IQ2_S" else n for n in type_names()])
def test_quantised_weights_are_near_the_originals(name: str) -> None:
    import gguf

    weights = np.random.default_rng(0).standard_normal((4, 512), dtype=np.float32)
    blocks = quantise(weights, name)
    assert blocks.size == 4 * row_bytes(512, name)
    kind = gguf.GGMLQuantizationType[name]
    shaped = blocks.view(np.float32 if name == "F32" else np.float16 if name == "F16" else np.uint8).reshape(4, -1)
    error = np.square(gguf.quants.dequantize(shaped, kind) - weights).mean()
    # The ternary types are made for ternary weights; 1 would be no information at all.
    assert error < (0.75 if name.startswith("T") else 0.12 if name in ("Q2_K", "IQ2_S") else 0.05)


def test_quantise_refuses_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="multiple of 256"):
        row_bytes(96, "Q4_K")
    with pytest.raises(UsageError, match="unknown quantisation type"):
        row_bytes(256, "IQ1_S")


def test_bench_model_has_the_shapes_of_its_preset(tmp_path: Path) -> None:
    path = make_bench_model.write_bench_model(
        tmp_path / "m.gguf", make_bench_model.PRESETS["deepseek-v2-lite"], n_layers=2
    )
    model = inspect(path)
    assert (model.n_layers, model.n_experts, model.n_experts_used, model.n_shared_experts) == (2, 64, 6, 2)
    (layer,) = model.moe_layers
    assert layer.down_bytes == 2048 * 1408 // 32 * 18
    assert layer.expert_tensors[0].shape == (2048, 1408, 64)
    scores, _ = logits_of(path)
    assert np.isfinite(scores).all()
    assert 0.3 < scores.std() < 3


def test_bench_model_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "m.gguf")]
    assert make_bench_model.main([*out, "--layers", "1"]) == 2
    assert make_bench_model.main([*out, "--type", "Q9"]) == 2
    assert "known types" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
