"""Machine files: presets, parts, and what they mean for costs. The figures themselves are estimates with sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybrimoe import profiles
from hybrimoe.errors import UsageError


@pytest.mark.parametrize("name", profiles.names())
def test_every_preset_says_where_its_figures_come_from(name: str) -> None:
    data = json.loads((Path(profiles.__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    assert data["name"] == name
    assert data["source"]
    for part in ("gpu", "link", "cpu"):
        assert data[part] is None or len(data[part]["source"]) > 20


@pytest.mark.parametrize("name", profiles.names())
def test_calibration_reads_weights_once_and_then_computes(name: str) -> None:
    machine = profiles.load(name)
    data = machine.calibration([4.9e6, 4.9e6, 9.8e6])
    assert data["layer_class"] == [0, 0, 1]
    assert len(data["devices"]) == machine.n_devices
    points = data["classes"][0]["cpu"]["points"]
    read_us = 4.9e6 / machine.cpu.stream_bytes_per_s * 1e6
    assert points[0][1] == pytest.approx(read_us, rel=0.01)
    # Two tokens cost one reading of the weights, except in the paper, whose CPU time is linear in tokens.
    assert points[1][1] == pytest.approx(2 * read_us if name == "hybrimoe-paper" else read_us, rel=0.01)
    assert points[-1][1] > 10 * points[0][1]
    assert data["classes"][1]["cpu"]["points"][0][1] == pytest.approx(2 * points[0][1])


def test_parts_replace_those_of_a_machine() -> None:
    plain = profiles.load("rtx4090-pcie4-ddr5")
    changed = profiles.load("rtx4090-pcie4-ddr5:link=pcie3,ram=ddr4,vram=16GiB,cores=4")
    assert plain.link is not None and changed.link is not None and changed.gpu is not None
    assert changed.link.h2d_bytes_per_s == 11e9 < plain.link.h2d_bytes_per_s
    assert changed.cpu.stream_bytes_per_s == 37.5e9
    assert changed.shared_dram_bytes_per_s == 44.5e9
    assert changed.gpu.vram_bytes == 16 << 30
    assert changed.cpu.macs_per_s == plain.cpu.macs_per_s / 2
    assert changed.name.endswith("cores=4")
    with_card = profiles.load("cpu-only-ddr5:gpu=rtx3060")
    assert with_card.gpu is not None and with_card.link is not None and with_card.n_devices == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtx9999", "no such machine: 'rtx9999'"),
        ("rtx4090-pcie4-ddr5:link=pcie9", "unknown link 'pcie9'"),
        ("rtx4090-pcie4-ddr5:cores=0", "cores = 0 must be finite and above 0"),
        ("rtx4090-pcie4-ddr5:vram=lots", "'lots' is no size"),
        ("rtx4090-pcie4-ddr5:colour=red", "names no part"),
        ("cpu-only-ddr5:link=pcie4", "has no card to link to"),
        ("nothing.json", "no such machine"),
    ],
)
def test_bad_names(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        profiles.load(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["cpu"].pop("cores"), "lacks 'cores'"),
        (lambda d: d["gpu"].update(vram_bytes=-1), "gpu.vram_bytes = -1 must be finite and above 0"),
        (lambda d: d.update(cpu="fast"), "is malformed"),
        (lambda d: d["link"].update(h2d_bytes_per_s="NaN"), "must be finite"),
    ],
)
def test_bad_files(tmp_path: Path, change: object, message: str) -> None:
    preset = Path(profiles.__file__).parent / "rtx3060-pcie3-ddr4.json"
    data = json.loads(preset.read_text(encoding="utf-8"))
    change(data)  # type: ignore[operator]
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        profiles.load(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="is no JSON"):
        profiles.load(path)
