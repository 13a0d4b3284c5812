"""`hybrimoe plugin`: builds for other interfaces, and that a program finds the one that fits it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hybrimoe.errors import PluginError, UsageError
from hybrimoe.native import builds
from hybrimoe.native.plugin import LIBRARY_NAME, library_path

from .conftest import Host

COMMAND = [sys.executable, "-m", "hybrimoe.cli.main"]
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of builds, empty."""
    folder = tmp_path / "plugins"
    monkeypatch.setenv("HYBRIMOE_PLUGINS", str(folder))
    return folder


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    """A prefix with the pinned release's public headers."""
    command = [sys.executable, str(ROOT / "native" / "cmake" / "fetch_ggml_headers.py")]
    source = Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
    include = tmp_path / "prefix" / "include"
    include.mkdir(parents=True)
    for path in source.glob("gg*.h"):
        if path.name not in ("ggml-backend-impl.h", "ggml-release.h"):
            shutil.copy(path, include)
    return include.parent


def remove_two_operations(prefix: Path) -> None:
    """What ggml 1.0 did: later operations have other numbers."""
    path = prefix / "include" / "ggml.h"
    text = re.sub(r"\n\s*GGML_OP_DIAG_MASK_(INF|ZERO),", "", path.read_text())
    path.write_text(text)


def test_the_same_interface_needs_no_build(headers: Path, plugins: Path) -> None:
    assert builds.build_plugin(headers).path == library_path()
    assert builds.builds() == []
    assert [path.name for path in plugins.iterdir()] == []


@pytest.mark.slow
def test_another_interface_gets_its_own_plugin(headers: Path, plugins: Path, unpacked: Host) -> None:
    remove_two_operations(headers)
    built = builds.build_plugin(headers)
    assert built.path.parent.parent == plugins and built.path.is_file()
    assert built.interface != builds.packaged().interface
    assert builds.builds() == [built]

    # Given to a program that it does not fit, it finds one that does.
    shutil.copytree(built.path.parent, plugins / "another")
    shutil.copy(library_path(), plugins / "another" / LIBRARY_NAME)
    environment = unpacked.environment(True, HYBRIMOE_PROBE="1", HYBRIMOE_PLUGINS=str(plugins))
    environment["GGML_BACKEND_PATH"] = str(built.path)
    done = unpacked.run("llama-server", "--list-devices", environment=environment)
    line = next(line for line in (done.stdout + done.stderr).splitlines() if "hybrimoe_probe" in line)
    told = json.loads(line)
    assert told["fits"] and told["other_build"] == str(plugins / "another" / LIBRARY_NAME)
    assert '"SOFT_MAX"' in told["reason"]

    del environment["HYBRIMOE_PROBE"]
    done = unpacked.run("llama-server", "--list-devices", environment=environment)
    assert "HybriMoE: hybrid CPU and GPU dispatch" in done.stdout

    # Nowhere one that fits: two lines, and the program goes on without it.
    shutil.rmtree(plugins / "another")
    done = unpacked.run("llama-server", "--list-devices", environment=environment)
    assert done.returncode == 0 and "HybriMoE:" not in done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(said) == 2 and "SOFT_MAX" in said[0] and "hybrimoe plugin build" in said[1]


def test_headers_are_looked_for(tmp_path: Path, plugins: Path) -> None:
    with pytest.raises(UsageError, match="holds no headers of ggml"):
        builds.build_plugin(tmp_path)


def test_headers_that_do_not_compile(headers: Path, plugins: Path) -> None:
    path = headers / "include" / "ggml.h"
    path.write_text(path.read_text().replace("GGML_OP_MUL_MAT_ID,", ""))
    with pytest.raises(PluginError, match="GGML_OP_MUL_MAT_ID"):
        builds.build_plugin(headers)
    assert "GGML_OP_MUL_MAT_ID" in (plugins / "build.log").read_text()
    assert builds.builds() == []


def test_what_lies_in_the_folder_may_be_anything(plugins: Path) -> None:
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"version": 1}'), ("d", '{"version": "\\ud800"}')):
        (plugins / name).mkdir(parents=True)
        (plugins / name / "plugin.json").write_text(text)
    (plugins / "file").write_text("")
    assert builds.builds() == []


def test_list_asks_programs(plugins: Path, tmp_path: Path) -> None:
    """What a program of llama.cpp would print, and one that loads nothing."""
    told = {"hybrimoe_probe": 1, "fits": False, "ggml": "9.9.9", "backend_api": 9, "other_build": "", "reason": "new"}
    program = tmp_path / "llama-server"
    program.write_text(f"#!/bin/sh\necho 'a line'\necho '{json.dumps(told)}' >&2\n")
    program.chmod(0o755)
    fit = builds.which_fits([str(program)])
    assert fit == builds.Fit(False, "9.9.9", 9, "", "new")
    assert builds.which_fits(["true"]) is None
    done = subprocess.run([*COMMAND, "plugin", "list", str(program)], capture_output=True, text=True)
    assert done.returncode == 0 and "none fits" in done.stdout and "hybrimoe plugin build" in done.stderr
    done = subprocess.run([*COMMAND, "plugin", "list", "--json", "/does/not/exist"], capture_output=True, text=True)
    assert json.loads(done.stdout)["programs"][0]["plugin"] == "not asked"
