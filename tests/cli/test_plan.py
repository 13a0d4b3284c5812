"""`hybrimoe plan`, `probe` and `--dry-run` from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrimoe import calibration
from hybrimoe.calibration import CalibrationError

Call = Callable[..., Any]
MACHINE = "rtx3060-pcie4-ddr4"


@pytest.fixture
def qwen3(tmp_path: Path) -> str:
    """The header of Qwen3-30B-A3B's first four layers."""
    from make_header_model import PRESETS, write_header

    return str(write_header(tmp_path / "qwen3.gguf", PRESETS["qwen3-30b-a3b"], n_layers=4))


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose probe is disturbed."""

    def fail(*_: Any, **__: Any) -> None:
        raise CalibrationError("the probe was disturbed", "close other programs")

    monkeypatch.setattr(calibration, "load_or_probe", fail)


def test_plan_as_text(call: Call, qwen3: str) -> None:
    done = call("plan", qwen3, "--machine", MACHINE, "-c", "4096")
    assert done.code == 0, done.err
    for words in ("header alone was read", "128 experts, top-8", "128 of 128 per layer", "expected t/s", "-c 4096"):
        assert words in done.out


def test_plan_as_json(call: Call, qwen3: str) -> None:
    done = call("plan", qwen3, "--machine", f"{MACHINE}:vram=8GiB", "-c", "4096", "--json")
    data = json.loads(done.out)
    assert data["memory"]["fits"] is True
    assert data["machine"]["vram_bytes"] == [8 << 30]
    assert data["needs"]["exact"] is True
    assert data["model"]["header_only"] is True
    assert data["speed"]["ours"]["decode"]["tokens_per_s"] > 0
    assert data["flags"][:2] == ["-c", "4096"]


def test_what_does_not_fit_ends_with_4_and_what_fits(call: Call, qwen3: str) -> None:
    done = call("plan", qwen3, "--machine", f"{MACHINE}:vram=1800MiB", "-c", "40960")
    assert done.code == 4
    assert done.err.startswith("error: 'qwen3.gguf' does not fit: ")
    hint = done.err.splitlines()[1]
    assert hint.startswith("hint: it fits with -c ")
    again = call("plan", qwen3, "--machine", f"{MACHINE}:vram=1800MiB", "-c", hint.split()[-1])
    assert again.code == 0


def test_this_machine_without_a_probe(call: Call, qwen3: str, unprobed: None) -> None:
    done = call("plan", qwen3, "-c", "512")
    assert done.code == 0
    assert "speeds are estimates: the probe was disturbed" in done.err
    assert "(not probed)" in done.out and "assumed: " in done.out
    assert "estimated costs" in done.out and "would tell more" in done.out
    quiet = call("plan", qwen3, "-c", "512", "--no-probe")
    assert quiet.code == 0 and quiet.err == ""


def test_a_machine_in_words_and_a_placement(call: Call, qwen3: str) -> None:
    machine = "gpu=rtx3060:4GiB,cpu=5600x,ram=ddr4-3200x2:32GiB,link=pcie4"
    arguments = ("plan", qwen3, "--machine", machine, "-c", "4096", "-ncmoe", "3", "-d", "2000", "-p", "1000")
    text = call(*arguments)
    assert text.code == 0, text.err
    for words in ("llama.cpp -ncmoe 3", "llama.cpp -ngl", "hybrimoe", "2000 tokens in the context, a prompt of 1000"):
        assert words in text.out
    data = json.loads(call(*arguments, "--json").out)
    assert data["asked"] == {"placement": "-ncmoe 3", "depth": 2000, "n_prompt": 1000, "n_parallel": 1}
    assert data["ways"][0]["flags"] == "-ncmoe 3"
    assert data["speed"]["stock"]["decode"] == data["ways"][0]["decode"]
    one = data["speed"]["stock"]["decode"]
    assert one["low"] < one["tokens_per_s"] < one["high"] and one["widest"] in one["terms_us"]
    assert sum(one["terms_us"].values()) == pytest.approx(1e6 / one["tokens_per_s"], rel=0.01)


def test_without_a_context_the_plan_chooses_one(call: Call, qwen3: str) -> None:
    done = call("plan", qwen3, "--machine", f"{MACHINE}:vram=4GiB", "-np", "2")
    assert done.code == 0 and re.search(r"context \d+ .*, \d+ for each of 2 slots", done.out)
    explicit = json.loads(call("plan", qwen3, "--machine", MACHINE, "-c", "0", "--json").out)
    assert explicit["setting"]["n_ctx"] == 40960


def test_what_is_known(call: Call) -> None:
    text = call("plan", "--machines")
    assert text.code == 0
    for words in ("rtx4070ti", "epyc7713", "rtx3060-pcie4-ddr4", "ram-gbs"):
        assert words in text.out
    data = json.loads(call("plan", "--machines", "--json").out)
    assert {"presets", "keys", "cards", "cpus"} == set(data)


def test_what_if(call: Call, qwen3: str, tmp_path: Path) -> None:
    picture = tmp_path / "what-if.png"
    arguments = ("plan", qwen3, "--machine", f"{MACHINE}:vram=4GiB", "-c", "4096", "--vary", "ncmoe=0:4:2")
    done = call(*arguments, "--vary", "ram=ddr4-3200x2,ddr4-3600x2", "--plot", str(picture))
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 7 and done.out.split()[:2] == ["ncmoe", "ram"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    data = json.loads(call(*arguments, "--json").out)
    assert [one["values"] for one in data] == [{"ncmoe": "0"}, {"ncmoe": "2"}, {"ncmoe": "4"}]


def test_larger_than_memory_says_what_the_disk_allows(call: Call, qwen3: str) -> None:
    done = call("plan", qwen3, "--machine", "cpu=5600x,ram=ddr4-3200x2:3500MiB,disk-gbs=3", "-c", "512")
    assert done.code == 4
    assert (
        "larger than main memory" in done.out and "from the disk, 3.0 GB/s" in done.out and "expected t/s" in done.out
    )


@pytest.mark.parametrize("command", ["run", "chat"])
def test_dry_run_prints_the_plan_and_loads_nothing(
    call: Call, model: str, unprobed: None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe import engine

    monkeypatch.setattr(engine, "Engine", None)
    done = call(command, model, "--dry-run", "-c", "512")
    assert done.code == 0, done.err
    assert "llama.cpp's own dry run" in done.out


def test_bad_input(call: Call, qwen3: str, dense_header: Path, tmp_path: Path) -> None:
    call("plan", "missing.gguf", "--machine", MACHINE).assert_two_lines(3)
    call("plan", str(dense_header), "--machine", MACHINE).assert_two_lines(3)
    call("plan", qwen3, "--machine", "cray-1").assert_two_lines(2)
    call("plan", qwen3, "--machine", "gpu=rtx3060,ram=ddr5-6000x0").assert_two_lines(2)
    call("plan", qwen3, "--machine", MACHINE, "--vary", "ncmoe=x").assert_two_lines(2)
    call("plan", qwen3, "--machine", MACHINE, "-ot", "(=CPU", "-c", "512").assert_two_lines(2)
    call("plan", qwen3, "--machine", MACHINE, "-d", "-1").assert_two_lines(2)
    call("plan", qwen3, "--machine", MACHINE, "-c", "1000000").assert_two_lines(2)
    call("plan", qwen3, "--machine", MACHINE, "-c", "many").assert_two_lines(2)
    call("plan", qwen3, "again.gguf").assert_two_lines(2)
    damaged = tmp_path / "machine.json"
    damaged.write_text('{"name": "x"}')
    call("plan", qwen3, "--machine", str(damaged)).assert_two_lines(2)
    call("probe", "missing.gguf").assert_two_lines(3)
    call("probe", "-t", "0").assert_two_lines(2)


def test_a_disturbed_probe_is_refused_and_leaves_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe.probing import fit

    def fail(_: Any) -> None:
        raise fit.BadFitError("copies vary by 80%")

    monkeypatch.setattr(calibration, "QUICK_SECONDS", 0.3)
    monkeypatch.setattr(fit, "fit_all", fail)
    path = tmp_path / "calibration.json"
    done = call("probe", "--quick", "--calibration", str(path))
    done.assert_two_lines(1)
    assert "copies vary by 80%" in done.err
    assert not path.exists()
