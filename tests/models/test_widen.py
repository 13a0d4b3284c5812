"""Widening models of test-llama-archs: here on a model of that kind, 2 experts and both used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import widen_arch_models
from make_tiny_models import write_tiny_model
from moe_shapes import ARCHITECTURES

from hybrimoe.errors import ModelError
from hybrimoe.gguf_model import inspect
from hybrimoe.models.activations import ModelRun


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    shape = replace(ARCHITECTURES["gpt-oss"].tiny, n_experts=2, top_k=2)
    return write_tiny_model(tmp_path / "narrow-moe.gguf", "gpt-oss", shape=shape)


def test_widened_model_runs_and_keeps_the_rest(narrow: Path, tmp_path: Path) -> None:
    wide = widen_arch_models.widen(narrow, tmp_path / "wide.gguf", n_experts=8, top_k=3, type_name="Q4_0")
    before, after = inspect(narrow), inspect(wide)
    (layer, *_) = after.moe_layers
    assert (layer.n_experts, layer.n_experts_used, layer.expert_types) == (8, 3, ("Q4_0",))
    assert [t.shape[-1] for t in layer.router_tensors] == [8, 8]
    same = {t.name: t for t in before.tensors if "exps" not in t.name and "gate_inp" not in t.name}
    assert all(
        (t.shape, t.type_name) == (same[t.name].shape, same[t.name].type_name) for t in after.tensors if t.name in same
    )
    assert {k: v for k, v in after.metadata.items() if "expert" not in k} == {
        k: v for k, v in before.metadata.items() if "expert" not in k
    }
    with ModelRun(wide, n_window=16) as run:
        logits = run.run(range(3, 19)).copy()
    assert np.isfinite(logits).all() and np.abs(np.diff(logits, axis=0)).mean() > 0.1


def test_first_experts_are_the_original_ones(narrow: Path, tmp_path: Path) -> None:
    import gguf

    wide = widen_arch_models.widen(narrow, tmp_path / "wide.gguf", n_experts=4)
    name = "blk.0.ffn_down_exps.weight"
    (old,) = (t.data for t in gguf.GGUFReader(narrow).tensors if t.name == name)
    (new,) = (t.data for t in gguf.GGUFReader(wide).tensors if t.name == name)
    assert np.array_equal(old, new[:2]) and not np.array_equal(new[2], new[3])


def test_command_line(
    narrow: Path, tmp_path: Path, tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert widen_arch_models.main([str(tmp_path), "--out", str(out), "--experts", "6"]) == 0
    assert [p.name for p in out.iterdir()] == ["narrow-moe-e6k2.gguf"]
    (tmp_path / "empty").mkdir()
    assert widen_arch_models.main([str(tmp_path / "empty"), "--out", str(out)]) == 2
    assert widen_arch_models.main([str(narrow), "--out", str(out), "--top-k", "9"]) == 2
    assert widen_arch_models.main([str(tmp_path / "none.gguf"), "--out", str(out)]) == 3
    assert capsys.readouterr().err.count("error: ") == 3
    with pytest.raises(ModelError, match="has 16 experts already"):
        widen_arch_models.widen(tiny_model("qwen3moe"), out / "x.gguf", n_experts=8)
