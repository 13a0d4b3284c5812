"""The benchmark tool: its statistics, and one short run of every kind. No speed is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_cpu
import pytest


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, bench_cpu.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_interval_of_the_median() -> None:
    # The sign test's ranks: 9 values leave 2 * (1 + 9) / 512 = 3.9 % outside the second smallest and largest.
    assert bench_cpu.interval([5, 1, 9, 2, 8, 3, 7, 4, 6]) == (2, 8)
    assert bench_cpu.interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    assert bench_cpu.interval([1, 2, 3, 4, 5]) is None
    assert bench_cpu.interval([]) is None


def test_ratios_are_formed_within_rounds() -> None:
    speeds = {"decode 8": {"stock": [10.0, 20.0, 40.0], "ours": [20.0, 10.0, 80.0]}}
    result = bench_cpu.summarise({"tokens_per_s": speeds}, ["stock", "ours"])
    ratios: dict[str, Any] = result["decode 8"]["ratios"]
    assert set(ratios) == {"ours/stock"}
    assert ratios["ours/stock"]["median"] == 2.0


def test_speed(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    rows = "stock-r0,ours-r0,ours-ggml-r0"
    options = ["--rounds", 2, "--decode", 3, "--prefill", "5,600", "--wait", 0, "--rows", rows, "--json", report_file]
    result = run(tiny_model("qwen3moe", "Q4_0"), *options)
    assert result.returncode == 0, result.stderr
    report = json.loads(report_file.read_text())
    speeds = report["tokens_per_s"]
    assert list(speeds) == ["decode 3", "prefill 5", "prefill 600"]
    assert all(len(values) == 2 and min(values) > 0 for test in speeds.values() for values in test.values())
    assert len(report["rounds"]) == 2
    # What the plug-in counted: every round, the decode steps alone, in every layer.
    n_layers = report["provenance"]["model"]["n_layers"]
    assert [reply["n_blocks"] for reply in report["blocks"]["decode 3"]["ours-r0"]] == [3 * n_layers] * 2
    assert all(r["experts_us"] > 0 for replies in report["blocks"]["prefill 5"].values() for r in replies)
    assert set(report["features"]) == set(rows.split(","))
    assert report["provenance"]["model"]["active_expert_bytes_per_layer"] == 4 * 3 * 256 * 256 * 18 // 32
    assert "GB/s" in result.stdout
    origin = report["provenance"]
    assert origin["commit"] and origin["machine"]["cpu"] and origin["model"]["n_experts"] == 16
    assert all(row in result.stdout for row in rows.split(","))
    assert not list(tmp_path.glob(".*"))


def test_peak_memory(tiny_model: Callable[..., Path]) -> None:
    options = ["--peak-memory", "--decode", 2, "--prefill", 5, "--rows", "stock-r0,ours-r0", "--markdown"]
    result = run(tiny_model("qwen3moe", "Q4_0"), *options)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    excess_mib = float(line.split("|")[4])
    # The bound that users are promised; a second copy of anything would show on larger models only.
    assert excess_mib < 64


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["missing.gguf"], 3),
        (["missing.gguf", "--rounds", "0"], 2),
        (["missing.gguf", "--rows", "mine"], 2),
        (["missing.gguf", "--rows", "ours,ik"], 2),
        (["missing.gguf", "--prefill", "many"], 2),
        ([bench_cpu.__file__], 3),
    ],
)
def test_bad_input(arguments: list[str], status: int) -> None:
    result = run(*arguments)
    assert result.returncode == status
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
