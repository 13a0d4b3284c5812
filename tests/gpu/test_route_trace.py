"""Converting routing traces for the plug-in's `route_trace` setting."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import route_trace

from hybrimoe.errors import UsageError


def saved(path: Path, experts: np.ndarray, **arrays: np.ndarray) -> Path:
    np.savez(path, experts=experts, **arrays)
    return path


def test_steps_that_a_layer_did_not_run_are_left_out(tmp_path: Path) -> None:
    experts = np.array([[[1, 2], [3, 4]], [[5, 6], [255, 255]], [[7, 8], [9, 10]]], np.uint8)
    path = saved(tmp_path / "t.npz", experts, is_decode=np.array([0, 0, 1], np.uint8))
    assert route_trace.read_trace(path).tolist() == [[[1, 2], [3, 4]], [[7, 8], [9, 10]]]
    assert route_trace.read_trace(path, decode_only=True).tolist() == [[[7, 8], [9, 10]]]


def test_plain_arrays(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.save(path, np.array([[[255, 300]]], np.int64))
    assert route_trace.read_trace(path).tolist() == [[[255, 300]]]  # 255 is an id where ids are not bytes


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x93NUMPY"])
def test_files_that_are_no_trace(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        route_trace.read_trace(path)


@pytest.mark.parametrize(
    "experts", [np.zeros((3, 2), np.uint8), np.zeros((3, 2, 2), np.float32), np.full((3, 2, 2), 255, np.uint8)]
)
def test_arrays_of_another_kind(tmp_path: Path, experts: np.ndarray) -> None:
    with pytest.raises(UsageError):
        route_trace.read_trace(saved(tmp_path / "t.npz", experts))
    with pytest.raises(UsageError):
        route_trace.read_trace(saved(tmp_path / "no-decode-flag.npz", experts), decode_only=True)


def test_fitting_keeps_what_fits() -> None:
    ids = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], np.int32)
    same = route_trace.fit(ids, n_layers=2, moe_layers=[0, 1], n_experts=8, top_k=2)
    assert same.tolist() == ids.tolist()
    assert route_trace.fit(ids, n_layers=2, moe_layers=[0, 1], n_experts=8, top_k=1).tolist() == [
        [[0], [2]],
        [[4], [6]],
    ]


def test_fitting_to_another_model() -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 128, (40, 3, 6)).astype(np.int32)
    fitted = route_trace.fit(ids, n_layers=6, moe_layers=[1, 2, 3, 4, 5], n_experts=32, top_k=8)
    assert fitted.shape == (40, 6, 8)
    assert fitted.min() >= 0 and fitted.max() < 32
    assert all(len(set(row)) == 8 for step in fitted.tolist() for row in step)
    assert (fitted[:, 1] == fitted[:, 4]).all(), "the fourth MoE layer takes the trace's first layer again"
    for step in range(40):  # the trace's own choices come first
        own = dict.fromkeys(int(e) for e in ids[step, 0] % 32)
        assert list(own) == fitted[step, 1, : len(own)].tolist()
    with pytest.raises(UsageError):
        route_trace.fit(ids, n_layers=3, moe_layers=[0], n_experts=4, top_k=5)


def test_uniform_routing_has_no_favourites() -> None:
    ids = route_trace.uniform(2000, n_layers=2, n_experts=16, top_k=4)
    assert ids.shape == (2000, 2, 4)
    assert all(len(set(row)) == 4 for row in ids[:, 0].tolist())
    counts = np.bincount(ids.ravel(), minlength=16)
    # 1000 expected each; 5 standard deviations of a binomial share of 1/4 in 4000 draws are 137.
    assert abs(counts - 1000).max() < 137


def test_raw_file(tmp_path: Path) -> None:
    path = tmp_path / "t.raw"
    ids = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    route_trace.write_raw(path, ids)
    data = path.read_bytes()
    assert struct.unpack("<5i", data[:20]) == (0x52544D48, 1, 2, 3, 4)
    assert route_trace.read_raw(path).tolist() == ids.tolist()
    path.write_bytes(data[:-4])
    with pytest.raises(UsageError):
        route_trace.read_raw(path)
    assert [p.name for p in tmp_path.iterdir()] == ["t.raw"]


def test_command(tmp_path: Path, tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("qwen3moe", "Q4_0")
    trace = saved(tmp_path / "t.npz", np.arange(60, dtype=np.uint8).reshape(5, 2, 6))
    out = tmp_path / "t.raw"
    assert route_trace.main([str(trace), str(out), "--model", str(model)]) == 0
    assert "5 steps" in capsys.readouterr().out
    assert route_trace.main(["uniform", str(out), "--model", str(model), "--steps", "7"]) == 0
    assert len(route_trace.read_raw(out)) == 7
    assert route_trace.main([str(tmp_path / "missing.npz"), str(out), "--model", str(model)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "hint: " in error and len(error.splitlines()) == 2
    assert route_trace.main(["uniform", str(tmp_path / "no" / "folder"), "--model", str(model)]) == 1
