"""Fetch llama.cpp's ggml headers from the sdist of the pinned llama-cpp-python release.

The sdist is fetched through pip, checked against the hash in `llama_cpp_release.txt`, and the headers are kept in the
user's cache, so that a second build needs no network. Prints the include folder on stdout. Also fetches the JSON
library that llama.cpp bundles, and `ggml-backend-impl.h`, with which the tests compare our own declaration.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

RELEASE_FILE = Path(__file__).with_name("llama_cpp_release.txt")
PACKAGE = "llama-cpp-python"
# Folders of the sdist whose headers are kept, and where they go below the include folder.
HEADERS = (
    (re.compile(r"vendor/llama\.cpp/ggml/include/[^/]+\.h"), ""),
    (re.compile(r"vendor/llama\.cpp/ggml/src/ggml-backend-impl\.h"), ""),
    (re.compile(r"vendor/llama\.cpp/vendor/nlohmann/json(_fwd)?\.hpp"), "nlohmann"),
)
VERSION_SOURCE = "vendor/llama.cpp/ggml/CMakeLists.txt"


def fail(message: str, hint: str) -> None:
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    raise SystemExit(1)


def read_release() -> tuple[str, str]:
    """Return (version, sha256) of the pinned release."""
    fields = dict(
        line.split(maxsplit=1)
        for line in RELEASE_FILE.read_text().splitlines()
        if line.strip() and not line.startswith("#")
    )
    return fields["version"].strip(), fields["sha256"].strip()


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hybrimoe" / "ggml"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_sdist(version: str, sha256: str, folder: Path) -> Path:
    """Download the sdist into `folder` through pip, whose configured index, proxies and cache apply."""
    print(f"fetching the sdist of {PACKAGE} {version} for ggml's headers (75 MB) ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", PACKAGE, f"{PACKAGE}=={version}", "-d", str(folder)]
    if importlib.util.find_spec("scikit_build_core"):  # the sdist's own build backend: no second environment for it
        command.append("--no-build-isolation")
    result = subprocess.run(command, stdout=sys.stderr)
    found = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
    if result.returncode != 0 or not found:
        fail(
            f"pip could not download the sdist of {PACKAGE} {version}",
            f"check the network, or put the sdist on disk and set HYBRIMOE_LLAMA_CPP_SDIST (sha256 {sha256})",
        )
    return found[0]


def get_sdist(version: str, sha256: str, folder: Path) -> Path:
    given = os.environ.get("HYBRIMOE_LLAMA_CPP_SDIST")
    sdist = Path(given) if given else fetch_sdist(version, sha256, folder)
    if not sdist.is_file():
        fail(f"HYBRIMOE_LLAMA_CPP_SDIST names no file: {sdist}", "unset it to let pip download the sdist")
    if sha256_of(sdist) != sha256:
        fail(f"{sdist.name} does not have the pinned SHA-256 {sha256}", "the download is damaged or was altered; retry")
    return sdist


def extract_headers(sdist: Path, target: Path) -> None:
    """Extract the headers, and the ggml version as `ggml-release.h`, into the new folder `target`."""
    version: dict[str, str] = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            file = archive.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            if name == VERSION_SOURCE:
                text = file.read().decode()
                version = dict(re.findall(r"set\(GGML_VERSION_(MAJOR|MINOR|PATCH) (\d+)\)", text))
            for pattern, below in HEADERS:
                if pattern.fullmatch(name):
                    path = target / below / Path(name).name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(file.read())
    if len(version) != 3 or not (target / "ggml-backend-impl.h").is_file():
        fail("the sdist does not have the layout of the pinned release", "this is a bug in HybriMoE; please report it")
    number = ".".join(version[part] for part in ("MAJOR", "MINOR", "PATCH"))
    (target / "ggml-release.h").write_text(f'#pragma once\n#define HYBRIMOE_GGML_VERSION "{number}"\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sdist-to", type=Path, help="also keep the checked sdist in this folder")
    options = parser.parse_args()
    version, sha256 = read_release()
    final = cache_root() / f"headers-{version}-{sha256[:12]}"
    if options.sdist_to is None and (final / "ggml-release.h").is_file():
        print(final)
        return
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
            sdist = get_sdist(version, sha256, Path(scratch))
            if options.sdist_to is not None:
                options.sdist_to.mkdir(parents=True, exist_ok=True)
                shutil.copy(sdist, options.sdist_to / f"llama_cpp_python-{version}.tar.gz")
            made = Path(scratch) / "headers"
            made.mkdir()
            extract_headers(sdist, made)
            if not final.exists():
                made.rename(final)
    except OSError as error:
        fail(
            f"cannot write ggml's headers to {final}: {error.strerror or error}",
            "set XDG_CACHE_HOME to a folder you own",
        )
    print(final)


if __name__ == "__main__":
    main()
