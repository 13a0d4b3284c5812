"""Findings about a machine's settings, on made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybrimoe.host_checks import host_findings

CARD: dict[str, Any] = {
    "name": "RTX 4090",
    "driver": "550",
    "memory_bytes": 24 << 30,
    "memory_free_bytes": 23 << 30,
    "pcie_generation": 1,
    "pcie_generation_max": 4,
    "pcie_width": 16,
    "pcie_width_max": 16,
    "power_limit_w": 450.0,
    "power_default_w": 450.0,
    "temperature_c": 40,
    "thermal_slowdown": False,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine without fault."""
    put(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")
    put(
        tmp_path,
        "proc/self/mounts",
        "/dev/nvme0n1p2 / ext4 rw 0 0\n/dev/sda1 /data ext4 rw 0 0\nnas:/m /mnt/nas nfs4 rw 0 0\n",
    )
    put(tmp_path, "sys/block/sda/queue/rotational", "1")
    put(tmp_path, "sys/block/nvme0n1/queue/rotational", "0")
    return tmp_path


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def topics(root: Path, folder: str = "/home/me/models", cards: list[dict[str, Any]] | None = None) -> list[str]:
    found = host_findings(Path(folder), root=root, cards=cards or [])
    assert all(f.mend for f in found)
    return [f.topic for f in found if f.topic not in ("heat", "pinned memory")]


def test_a_sound_machine_has_no_findings(root: Path) -> None:
    assert topics(root) == []
    # An idle link reports a low generation: no finding.
    assert topics(root, cards=[CARD]) == []


def test_huge_pages_that_are_off(root: Path) -> None:
    put(root, "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]")
    assert topics(root) == ["huge pages"]


@pytest.mark.parametrize(
    ("folder", "words"), [("/data/models", "rotating disk (/data)"), ("/mnt/nas/models", "network file system (nfs4)")]
)
def test_slow_storage(root: Path, folder: str, words: str) -> None:
    (finding,) = [f for f in host_findings(Path(folder), root=root, cards=[]) if f.topic == "storage"]
    assert words in finding.message


def test_throttled_clocks(root: Path) -> None:
    put(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq", "1200000")
    put(root, "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", "4800000")
    put(root, "sys/class/power_supply/BAT0/type", "Battery")
    put(root, "sys/class/power_supply/BAT0/status", "Discharging")
    assert topics(root) == ["clocks", "clocks"]


@pytest.mark.parametrize(
    ("change", "topic"),
    [
        ({"memory_free_bytes": 1 << 30}, "card memory"),
        ({"power_limit_w": 200.0}, "power"),
        ({"pcie_width": 4}, "link"),
    ],
)
def test_cards(root: Path, change: dict[str, Any], topic: str) -> None:
    assert topics(root, cards=[{**CARD, **change}]) == [topic]


def test_a_hot_card(root: Path) -> None:
    found = host_findings(Path("/home"), root=root, cards=[{**CARD, "thermal_slowdown": True}])
    assert "RTX 4090 slows down" in " ".join(f.message for f in found)


def test_a_card_whose_driver_tells_nothing(root: Path) -> None:
    assert topics(root, cards=[dict.fromkeys(CARD)]) == []
