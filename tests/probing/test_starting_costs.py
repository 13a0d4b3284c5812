"""Which costs sharing starts from: the kept ones, a probe's, or none, in which case no miss is copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrimoe import calibration
from hybrimoe.calibration import Calibration, CalibrationError
from hybrimoe.engine import EngineOptions
from hybrimoe.expert_options import CacheSize, ExpertOptions
from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.native import backend_modules
from hybrimoe.native.core import Costs
from hybrimoe.placement import Placement
from hybrimoe.starting_costs import starting_costs

Samples = Callable[..., dict[str, Any]]
_NAMES = ["CPU", "HybriMoE", "Card0", "Card1"]


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> GgufModel:
    return inspect(tiny_model("mixtral", "Q4_0"))


@pytest.fixture
def found(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the kept calibration is: an entry to replace; an exception is raised. Two cards, the second one measured."""
    from hybrimoe.probing.fit import fit_all

    data = samples(device=True)
    fit = fit_all(data)
    content = {"format": 1, "key": {}, "date": "2026-01-01 00:00 UTC", "n_threads": [2], "fit": fit}
    entry: list[Any] = [Calibration(json.loads(json.dumps(content)))]

    def load_or_probe(*_: Any, **__: Any) -> tuple[Calibration, str]:
        if isinstance(entry[0], Exception):
            raise entry[0]
        return entry[0], "there is no calibration: this machine was probed"

    monkeypatch.setattr(calibration, "load_or_probe", load_or_probe)
    monkeypatch.setattr(calibration, "accelerators", lambda: [(2, "a card"), (3, "another card")])
    monkeypatch.setattr(backend_modules, "device_names", lambda: _NAMES)
    return entry


def options(**changes: Any) -> EngineOptions:
    return EngineOptions(n_threads=2, experts=ExpertOptions(**changes))


def test_a_kept_calibration_is_used_for_the_cards_it_holds(found: list[Any], model: GgufModel) -> None:
    made = starting_costs(options(), model)
    assert made.experts.devices == ("Card1",)
    assert made.warnings[0].startswith("Card0: not used for experts")
    assert made.notes == ("there is no calibration: this machine was probed",)
    section = made.experts.settings(model, 512, _NAMES)["costs"]
    assert [d["ggml_device"] for d in section["devices"]] == [3]
    Costs.from_calibration(section)


def test_a_card_that_was_named(found: list[Any], model: GgufModel) -> None:
    made = starting_costs(options(devices=("Card1",)), model)
    assert made.experts.costs is not None and not made.warnings
    made = starting_costs(options(devices=("Card0",)), model)
    assert made.experts.costs is None and "misses are computed on the CPU only" in made.warnings[0]


def test_unknown_costs_copy_nothing(found: list[Any], model: GgufModel) -> None:
    found[0] = CalibrationError("the probe was disturbed: link", "")
    made = starting_costs(options(), model)
    assert (made.experts.costs, made.experts.schedule, made.experts.prefetch) == (None, "cpu-only", "none")
    assert "the probe was disturbed: link" in made.warnings[0]
    # What was asked for by name is done all the same.
    assert starting_costs(options(schedule="gpu-only"), model).experts.schedule == "gpu-only"


def test_where_nothing_is_shared_nothing_is_probed(found: list[Any], model: GgufModel) -> None:
    found[0] = AssertionError("probed")
    for given in (
        options(cache=CacheSize(n_slots=0)),
        options(devices=()),
        options(devices=("CPU",)),
        options(devices=("CPU", "Card1")),
        replace(options(), plugin=False),
        replace(options(), placement=Placement(cpu_moe=True)),
        options(costs={"cpu_us": 1.0}),
    ):
        assert starting_costs(given, model).experts == given.experts


def test_a_calibration_that_was_named(found: list[Any], model: GgufModel, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    found[0].save(path)
    made = starting_costs(options(calibration=path, devices=("Card1",)), model)
    assert made.experts.costs is not None and not made.notes
    with pytest.raises(CalibrationError, match="no costs of device 2"):
        starting_costs(options(calibration=path), model)
    with pytest.raises(CalibrationError, match="there is no calibration"):
        starting_costs(options(calibration=tmp_path / "absent.json"), model)
