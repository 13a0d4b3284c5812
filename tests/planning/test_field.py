"""The speed model against public measurements: what the documentation claims, kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fit_field
import price_field
import pytest

from hybrimoe.errors import UsageError
from hybrimoe.machine.constants import CONSTANTS, FITTED
from hybrimoe.machine.describe import describe

POINTS = price_field.read_list(price_field.PUBLIC_LIST)


@pytest.mark.parametrize("point", POINTS, ids=lambda p: p["id"])
def test_every_machine_of_the_list_is_one_description(point: dict[str, Any]) -> None:
    machine = describe(price_field.machine_text(point))
    assert machine.cpu.n_threads >= 4 and machine.ram.n_channels == point["ram"]["channels"]
    assert len(machine.cards) == (point["gpu"]["count"] if point["gpu"] else 0)


def test_a_point_is_one_command_line(tmp_path: Path) -> None:
    point = next(p for p in POINTS if p["id"] == "rtx2080-dsv2lite")
    made = price_field.price(point, tmp_path)
    assert made["command"] == (
        "hybrimoe plan deepseek-v2-lite-Q4_K_M.gguf --machine "
        "'gpu=1*RTX 2080,cpu=i9-10900X,ram=ddr4-3200x4:64GiB,link=pcie3x16' "
        "-c 4096 -ub 512 -b 2048 -p 512 -d 256 -ctk f16 -ctv f16 -ngl 512 -ncmoe 16"
    )
    assert made["decode"]["measured"] == 49.6 and abs(made["decode"]["error"]) < 0.5
    assert made["decode"]["low"] < made["decode"]["tokens_per_s"] < made["decode"]["high"]
    text = price_field.report([point], [made])
    assert "rtx2080-dsv2lite" in text and "median error" in text


def test_unknown_names_are_a_points_error(tmp_path: Path) -> None:
    made = price_field.price({**POINTS[0], "model": "gpt-9"}, tmp_path)
    assert "gpt-9" in made["error"]
    made = price_field.price({**POINTS[0], "gpu": {"name": "RTX 9090", "count": 1}}, tmp_path)
    assert "unknown card" in made["error"]


def test_lists_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    for text in ("{", "{}", json.dumps([{"id": "a"}])):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"list\.json"):
            price_field.read_list(path)


@pytest.mark.slow
def test_machines_that_the_fit_has_not_seen(tmp_path: Path) -> None:
    """The bounds that were set for the model; docs/cost-model.md has the figures."""
    points = fit_field.load(POINTS, tmp_path)
    results = fit_field.leave_one_out(points, FITTED)
    for name, error, bias, width in (("decode", 0.25, 0.10, 2.0), ("prefill", 0.35, 0.15, 2.5)):
        row = price_field.scores(POINTS, results, name)[0]
        assert row["median_error"] <= error and abs(row["bias"]) <= bias, row
        assert 0.75 <= row["inside"] <= 0.90 and row["width"] <= width, row
    fitted = fit_field.fit(points, FITTED)
    for name in FITTED:  # the constants in use are those of a fit
        assert getattr(CONSTANTS, name) == pytest.approx(getattr(fitted, name), rel=0.1)
