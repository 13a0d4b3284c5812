#!/usr/bin/env python3
"""Unpacks a distribution's own llama.cpp programs beside the system: nothing is installed, no root is needed.

    python tools/get_distribution.py [--vulkan] [--to FOLDER]

They are Debian unstable's, from the mirror that this machine's apt already uses, with the libraries that they need down
to the C library. Kept in the user's cache; fetched anew after a week, since that suite moves. Prints the folder. In it
`run PROGRAM [ARGUMENTS]` starts a program; start it in `modules`, since ggml looks for backends in the working folder.
Exit code 1: the packages cannot be had here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "native" / "cmake"))
from fetch_ggml_headers import cache_root, fail  # noqa: E402

PACKAGES = ("llama.cpp-tools", "libggml-dev")
VULKAN = ("libggml0-backend-vulkan", "mesa-vulkan-drivers")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
KEPT_S = 7 * 86400
# Of all that they depend on, what a program loads.
_LOADED = re.compile(r"^(lib|llama|mesa|zlib)(?!pam|apt|cap-ng|audit|debconf|semanage|selinux)")
_RUN = """#!/bin/sh
# run PROGRAM [ARGUMENTS]: one of the unpacked programs, with the libraries that were unpacked beside it.
here=$(cd "$(dirname "$0")" && pwd)
program=$here/files/usr/bin/$1
shift
{environment}exec "$here"/{loader} --library-path "{libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}" "$program" "$@"
"""
# Mesa's software device, which ggml uses only where it is named.
_VULKAN = """: "${{VK_DRIVER_FILES:=$here/{driver}}}" "${{GGML_VK_VISIBLE_DEVICES:=0}}"
export VK_DRIVER_FILES GGML_VK_VISIBLE_DEVICES
"""


def mirror() -> str:
    """The address of Debian's archive that apt uses here."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        fail("this system has no apt", "the distribution's programs are Debian's")
    found = [line for line in lines if "security" not in line]
    if not found or not KEYRING.is_file():
        fail("apt knows no archive of Debian", "the distribution's programs are Debian's")
    return found[0]


class Apt:
    """apt with an own state in `folder`: unstable alone, and nothing counts as installed."""

    def __init__(self, folder: Path, uri: str) -> None:
        for below in ("lists/partial", "cache/archives/partial", "etc"):
            (folder / below).mkdir(parents=True)
        (folder / "status").touch()
        (folder / "etc" / "unstable.sources").write_text(
            f"Types: deb\nURIs: {uri}\nSuites: sid\nComponents: main\nSigned-By: {KEYRING}\n"
        )
        settings = {
            "Dir::State": folder,
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourceparts": folder / "etc",
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
        }
        if os.geteuid() == 0:
            settings["APT::Sandbox::User"] = "root"
        self._command = ["apt-get", "-qq"] + [
            part for name, value in settings.items() for part in ("-o", f"{name}={value}")
        ]

    def run(self, *arguments: str, cwd: Path | None = None) -> str:
        """What apt prints. Ends the program when apt fails."""
        done = subprocess.run([*self._command, *arguments], cwd=cwd, capture_output=True, text=True)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            fail(f"the distribution's packages cannot be had: {said}", "check the network and apt's mirror")
        return done.stdout

    def needed(self, packages: tuple[str, ...]) -> list[str]:
        """The packages and what they load, as apt would install them on an empty system."""
        uris = self.run("install", "--no-install-recommends", "--print-uris", "-y", *packages)
        names = re.findall(r"^'[^']*' ([^_\s]+)_", uris, re.MULTILINE)
        return sorted({*packages, *(name for name in names if _LOADED.match(name))})


def unpack(folder: Path, packages: tuple[str, ...]) -> None:
    """Fetches and unpacks into the new `folder`: files, modules, run."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        apt = Apt(Path(scratch) / "apt", mirror())
        apt.run("update")
        made = Path(scratch) / "made"
        debs = Path(scratch) / "deb"
        (made / "modules").mkdir(parents=True)
        debs.mkdir()
        apt.run("download", *apt.needed(packages), cwd=debs)
        for deb in sorted(debs.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(deb), str(made / "files")], check=True)
        for module in sorted((made / "files" / "usr" / "lib").glob("*/ggml/*/libggml-*.so")):
            (made / "modules" / module.name).symlink_to(os.path.relpath(module, made / "modules"))
        _write_run(made)
        made.rename(folder)


def _write_run(made: Path) -> None:
    loaders = sorted((made / "files").glob("usr/lib*/**/ld-linux-*.so.*"))
    libraries_of_llama = sorted((made / "files").glob("usr/lib/*/libllama.so.*"))
    if not loaders or not libraries_of_llama:
        fail("the packages do not hold what they did when this was written", "docs/hosts.md says what was tried")
    loader, library = loaders[0], libraries_of_llama[0]
    folders = {library.parent, *(path.parent for path in library.parent.glob("**/lib*.so*") if not path.is_symlink())}
    ordered = sorted(folders, key=lambda path: (len(path.parts), path))
    libraries = ":".join(f"$here/{path.relative_to(made)}" for path in ordered)
    script = made / "run"
    driver = Path("files/usr/share/vulkan/icd.d/lvp_icd.json")
    environment = _VULKAN.format(driver=driver) if (made / driver).is_file() else ""
    script.write_text(_RUN.format(loader=loader.relative_to(made), libraries=libraries, environment=environment))
    script.chmod(0o755)


def get_distribution(folder: Path, packages: tuple[str, ...]) -> Path:
    """The folder with the unpacked programs, fetched if it is missing or old. An old one serves when that fails."""
    stamp = folder / "run"
    if stamp.is_file() and time.time() - stamp.stat().st_mtime < KEPT_S:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        unpack(fresh, packages)
    except SystemExit:
        if stamp.is_file():
            return folder
        raise
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vulkan", action="store_true", help="also ggml's Vulkan backend and a software device (150 MB)"
    )
    parser.add_argument("--to", type=Path, help="the folder (default: in the user's cache)")
    options = parser.parse_args()
    name = "debian-llama.cpp" + ("-vulkan" if options.vulkan else "")
    folder = options.to or cache_root().parent / name
    print(get_distribution(folder.resolve(), (*PACKAGES, *VULKAN) if options.vulkan else PACKAGES))


if __name__ == "__main__":
    main()
