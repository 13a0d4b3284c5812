"""Machines from files: a probe's calibration, parts that were measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.calibration import Calibration
from hybrimoe.errors import HybrimoeError, UsageError
from hybrimoe.gguf_model import inspect
from hybrimoe.machine.files import open_machine, with_model
from hybrimoe.native.probe import FfnShape
from hybrimoe.trace.identity import identity_of


def calibration(path: Path) -> Path:
    """What a probe of a machine without a card may have written."""
    entry = {"points": [[1, 10.0], [8, 40.0]], "first_us": 2.0, "step_us": 3.0, "node_us": 1.0}
    cpu = [{"shape": asdict(FfnShape(64, 96, 0, 0)), "by_threads": {"1": entry}}]
    data: dict[str, Any] = {
        "format": 1,
        "date": "a day",
        "n_threads": [1],
        "fit": {"reasons": [], "devices": [], "cpu": cpu},
    }
    Calibration(data).save(path)
    return path


def test_a_probes_calibration_prices_its_model(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = calibration(tmp_path / "c.json"), tiny_model("mixtral")
    with pytest.raises(UsageError, match="needs the model"):
        open_machine(str(path))
    text = with_model(str(path), model)
    identity = identity_of(inspect(model))
    machine = open_machine(text)
    costs, gap_us = machine.costs(identity).costs(), machine.gap_us(identity)
    assert costs.n_devices == 0 and costs.n_layers == len(inspect(model).moe_layers)
    assert gap_us is not None and gap_us > 3.0
    monkeypatch.setenv("HYBRIMOE_CALIBRATION", str(path))
    assert open_machine(with_model("this", model)).gap_us(identity) == gap_us
    assert with_model("rtx3060-pcie3-ddr4", model) == "rtx3060-pcie3-ddr4"


def test_a_calibration_that_cannot_be_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = calibration(tmp_path / "c.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "date": "another day"}), encoding="utf-8")
    with pytest.raises(HybrimoeError, match="changed by hand"):
        open_machine(f"{path}@model.gguf")
    monkeypatch.setenv("HYBRIMOE_CALIBRATION", str(tmp_path / "absent.json"))
    with pytest.raises(HybrimoeError, match="there is no calibration"):
        open_machine("this")
