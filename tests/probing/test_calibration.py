"""The calibration file: kept whole, believed only where it holds, turned into costs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrimoe import calibration
from hybrimoe.calibration import Calibration, CalibrationError
from hybrimoe.errors import HybrimoeError
from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.native.core import Costs
from hybrimoe.native.core_calibration import CostReader
from hybrimoe.native.probe import FfnShape

Samples = Callable[..., dict[str, Any]]
KEY = {"cpu": "a CPU", "n_cores": 2, "plugin": "1.0"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What this machine says it is; change it to be another one."""
    key = dict(KEY)
    monkeypatch.setattr(calibration, "machine_key", lambda: dict(key))
    return key


@pytest.fixture
def made(samples: Samples) -> Calibration:
    return made_of(samples(device=True))


def made_of(data: dict[str, Any]) -> Calibration:
    from hybrimoe.probing.fit import fit_all

    content = {
        "format": calibration.FORMAT,
        "key": KEY,
        "date": "2026-01-01 00:00 UTC",
        "n_threads": [2],
        "fit": fit_all(data),
        "samples": data,
    }
    return Calibration(json.loads(json.dumps(content)))


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> GgufModel:
    return inspect(tiny_model("mixtral", "Q4_0"))


def test_what_is_kept_comes_back(made: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibration.json"
    made.save(path)
    back = calibration.load(path)
    assert back.fit == made.fit and back.path == path
    assert [p.name for p in path.parent.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("24", "25"), "changed by hand or is damaged"),
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[]", "another format"),
        (lambda text: text.replace('"format": 1', '"format": 7'), "another format"),
    ],
)
def test_what_was_changed_is_not_believed(
    made: Calibration, tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    path = tmp_path / "calibration.json"
    made.save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(CalibrationError, match=message):
        calibration.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration"):
        calibration.load(tmp_path / "none.json")


def test_a_write_that_fails_leaves_the_old_file(
    made: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "calibration.json"
    made.save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HybrimoeError, match="No space left"):
        made.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.json"]


def test_costs_of_the_measured_shape(made: Calibration) -> None:
    fake = _model_of(FfnShape(2048, 768, 12, 12))
    section = made.cost_section(fake)
    costs = Costs.from_calibration(section)
    reader = CostReader(costs)
    assert reader.expert_us(1) == pytest.approx(120.0, rel=0.05)
    assert reader.expert_us(1, device=0) == pytest.approx(30.0, rel=0.05)
    assert reader.link(0)[1] == pytest.approx(24800.0, rel=0.05)
    assert reader.dram_bytes_per_us == 38e3
    assert section["devices"][0]["ggml_device"] == 3


def test_another_shape_is_scaled_by_bytes_and_multiplications(made: Calibration) -> None:
    """Twice the width: twice the bytes and products; another type: its bytes only."""
    one = made.cost_section(_model_of(FfnShape(2048, 768, 12, 12)))["classes"][0]["cpu"]["points"]
    wide = made.cost_section(_model_of(FfnShape(2048, 1536, 12, 12)))["classes"][0]["cpu"]["points"]
    assert [us for _, us in wide] == pytest.approx([2 * us for _, us in one])
    fine = made.cost_section(_model_of(FfnShape(2048, 768, 8, 8)))["classes"][0]["cpu"]["points"]
    assert fine[0][1] == pytest.approx(one[0][1] * 8.5 / 4.5, rel=1e-3)
    assert fine[-1][1] - fine[0][1] == pytest.approx(one[-1][1] - one[0][1])


def test_the_file_serves_where_it_holds(
    made: Calibration, here: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: GgufModel
) -> None:
    path = tmp_path / "calibration.json"
    made.save(path)
    probed: list[Any] = []

    def probe(shapes: Any, **_: Any) -> Calibration:
        probed.append(shapes)
        return made

    monkeypatch.setattr(calibration, "probe", probe)
    monkeypatch.setattr(calibration, "model_shapes", lambda _: (FfnShape(2048, 768, 12, 12),))
    found, reason = calibration.load_or_probe(model, path=path)
    assert (found.fit, reason, probed) == (made.fit, "", [])
    # Another thread count, another shape, another machine: measured again, and said so.
    for change, words in (
        ({"n_threads": 7}, "does not hold this model's experts"),
        ({}, "another machine or build (cpu differ)"),
    ):
        if not change:
            here["cpu"] = "another CPU"
        _, reason = calibration.load_or_probe(model, path=path, **change)
        assert words in reason
    assert len(probed) == 2


@pytest.mark.parametrize("text", ["", "{", '{"format": 1, "key": {}}'])
def test_a_corrupt_file_is_probed_over(
    made: Calibration,
    here: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: GgufModel,
    text: str,
) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    monkeypatch.setattr(calibration, "probe", lambda *_, **__: made)
    found, reason = calibration.load_or_probe(model, path=path)
    assert found.fit == made.fit and reason.endswith("this machine was probed")
    assert calibration.load(path).fit == made.fit


def test_a_folder_that_cannot_be_written_costs_the_file_only(
    made: Calibration, here: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: GgufModel
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(calibration, "probe", lambda *_, **__: made)
    found, reason = calibration.load_or_probe(model, path=tmp_path / "file" / "calibration.json")
    assert found is made and "cannot be kept" in reason


def test_a_bad_fit_is_an_error_with_its_reason(
    samples: Samples, here: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: GgufModel
) -> None:
    from hybrimoe.probing import measure

    monkeypatch.setattr(measure, "run_in_child", lambda *_: samples(sigma=0.9))
    path = tmp_path / "calibration.json"
    with pytest.raises(CalibrationError, match="the probe was disturbed: experts on 2 CPU threads"):
        calibration.load_or_probe(model, path=path, devices=())
    assert not path.exists()


def _model_of(shape: FfnShape) -> Any:
    """A model with two layers of such experts."""
    from types import SimpleNamespace

    from hybrimoe.gguf_header import GGML_TYPES
    from hybrimoe.probing.measure import expert_bytes

    def tensor(name: str, kind: int, n_in: int, n_out: int) -> Any:
        return SimpleNamespace(
            name=f"blk.0.ffn_{name}_exps.weight", shape=(n_in, n_out, 8), type_name=GGML_TYPES[kind].name
        )

    layer = SimpleNamespace(
        predicts_ahead=False,
        bytes_per_expert=expert_bytes(shape),
        expert_types=(),
        expert_tensors=(
            tensor("gate", shape.gate_type, shape.n_embd, shape.n_ff),
            tensor("up", shape.gate_type, shape.n_embd, shape.n_ff),
            tensor("down", shape.down_type, shape.n_ff, shape.n_embd),
        ),
    )
    return SimpleNamespace(moe_layers=(layer, layer))


@pytest.mark.parametrize("n_threads", ["", "2", [], [0], [2.5], ["2"], [True], {"2": 1}, None])
def test_numbers_of_threads_that_are_none(made: Calibration, tmp_path: Path, n_threads: Any) -> None:
    """Found by atheris: an empty text was taken for a list of numbers."""
    path = tmp_path / "c.json"
    Calibration({**made.data, "n_threads": n_threads}).save(path)
    with pytest.raises(CalibrationError, match="malformed"):
        calibration.load(path)
