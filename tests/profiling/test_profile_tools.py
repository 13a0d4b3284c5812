"""Comparing two profiles, and pictures of a page."""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import diff_profiles
import pytest
import screenshots
from profile_checks import Made

from hybrimoe.errors import HybrimoeError, UsageError


def written(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_differences_of_two_profiles(alone: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = copy.deepcopy(alone.data)
    phase = slower["phases"]["decode"]
    phase["ms_per_token"] *= 1.5
    phase["critical_us_per_token"]["cpu_experts"] += 500 * alone.data["phases"]["decode"]["ms_per_token"]
    phase["layers"][1]["total_us"] += 1e6
    slower["settings"]["schedule"] = "cpu-only"
    a, b = written(tmp_path / "a.json", alone.data), written(tmp_path / "b.json", slower)
    found = diff_profiles.difference(diff_profiles.read(a), diff_profiles.read(b))
    assert found["phases"]["decode"]["change"] == pytest.approx(0.5)
    assert found["phases"]["prefill"]["change"] == 0.0
    assert found["settings"] == {"schedule": ["two-threshold", "cpu-only"]}
    assert diff_profiles.main([str(a), str(b), "--layers", "1"]) == 0
    text = capsys.readouterr().out
    assert "+50.0%" in text and "different schedule: two-threshold / cpu-only" in text and "+1000000.0" in text
    assert diff_profiles.main([str(a), str(b), "--fail-above", "20", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    assert diff_profiles.main([str(b), str(a), "--fail-above", "20", "--json"]) == 0


def test_what_cannot_be_compared(alone: Made, tmp_path: Path) -> None:
    for content in ("", "[]", "{}", '{"format": 2, "phases": {}}'):
        path = tmp_path / "x.json"
        path.write_text(content)
        with pytest.raises(UsageError):
            diff_profiles.read(path)
    other = copy.deepcopy(alone.data)
    other["model"]["name"] = "another"
    with pytest.raises(UsageError, match="different models"):
        diff_profiles.difference(alone.data, other)


@pytest.fixture
def browser() -> str:
    try:
        return screenshots.find_browser()
    except HybrimoeError:
        pytest.skip("no Chromium here")


@pytest.mark.slow
def test_picture_of_a_report(shared: Made, tmp_path: Path, browser: str) -> None:
    picture = tmp_path / "r.png"
    command = [sys.executable, screenshots.__file__, shared.folder / "r.html", "-o", picture, "--width", 800, "--tall"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert width == 800 and height > 2000


def test_the_scripts_of_a_report_run(shared: Made, browser: str) -> None:
    """plotly drew, and said nothing to complain about."""
    page = (shared.folder / "r.html").resolve().as_uri()
    document = screenshots.run_browser(browser, ["--virtual-time-budget=4000", "--dump-dom", page])
    assert document.count('class="plot-container') >= 6


def test_bad_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        screenshots.address_of(str(tmp_path / "absent.html"))
    assert screenshots.address_of("http://127.0.0.1:1/") == "http://127.0.0.1:1/"
    with pytest.raises(UsageError):
        screenshots.find_browser("no-such-browser")
    assert screenshots.main([str(tmp_path / "absent.html")]) in (1, 2)
    assert capsys.readouterr().err.startswith("error: ")
