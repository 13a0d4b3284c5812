"""The sdist holds all that a wheel needs; the wheel carries the compiled plug-in, the policy core and the recipes."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILED = ("hybrimoe/native/libggml-hybrimoe.so", "hybrimoe/native/libhybrimoe-core.so")
RECIPE = "hybrimoe/recipes/demo/recipe.toml"


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=1200, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_wheel_from_sdist_installs_and_loads(tmp_path: Path) -> None:
    program = "import scikit_build_core.build as b, sys; print(b.build_sdist(sys.argv[1]))"
    run(sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path / "tools"), "scikit-build-core")
    run(sys.executable, "-c", program, str(tmp_path), PYTHONPATH=str(tmp_path / "tools"))
    (sdist,) = tmp_path.glob("hybrimoe-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"native/cmake/fetch_ggml_headers.py", "models/demo/recipe.toml", "CMakeLists.txt", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".gguf", ".o"))]

    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(sdist))
    (wheel,) = tmp_path.glob("hybrimoe-*.whl")
    contents = set(zipfile.ZipFile(wheel).namelist())
    assert {*COMPILED, RECIPE} <= contents

    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel))
    check = "from hybrimoe.native.plugin import load_plugin; print(load_plugin().path)"
    # -S: no .pth files, or an editable install of this very package would be found first.
    search = os.pathsep.join([str(target), sysconfig.get_path("platlib")])
    loaded = run(sys.executable, "-S", "-c", check, cwd=tmp_path, PYTHONPATH=search, HYBRIMOE_PLUGIN="")
    assert Path(loaded.strip().splitlines()[-1]) == target / COMPILED[0]
