"""Build the native code with its tests and run them (ctest), optionally with sanitizers."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "native" / "cmake"))
from fetch_ggml_headers import cache_root, fail, get_sdist, read_release  # noqa: E402

SOURCE = "vendor/llama.cpp/ggml/"
SANITIZERS = {"": "", "address": "address,undefined", "thread": "thread"}


def tool(name: str) -> str:
    """The path of a build tool: of this environment if it is there, else of the system."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or name


def ggml_source() -> Path:
    """The source of the pinned release's ggml, unpacked once into the user's cache: to be compiled with sanitizers."""
    version, sha256 = read_release()
    folder = cache_root() / f"source-{version}-{sha256[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        sdist = get_sdist(version, sha256, Path(scratch))
        made = Path(scratch) / "ggml"
        with tarfile.open(sdist) as archive:
            for member in archive:
                below = member.name.partition("/")[2]
                file = archive.extractfile(member) if member.isfile() and below.startswith(SOURCE) else None
                if file is None or ".." in Path(below).parts:
                    continue
                path = made / below[len(SOURCE) :]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())
        if not (made / "CMakeLists.txt").is_file():
            fail("the sdist does not hold ggml where it is expected", "this is a bug in HybriMoE; please report it")
        made.rename(folder)
    return folder


def _build_folder(sanitize: str) -> Path:
    return ROOT / "build" / ("native" if not sanitize else f"native-{sanitize}")


def _configure_command(sanitize: str) -> list[str]:
    configure = [
        tool("cmake"),
        "-S",
        str(ROOT),
        "-B",
        str(_build_folder(sanitize)),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
    ]
    configure += ["-DHYBRIMOE_TESTS=ON", f"-DHYBRIMOE_SANITIZE={SANITIZERS[sanitize]}"]
    configure += [f"-DPython3_EXECUTABLE={sys.executable}"]
    llama_cpp = importlib.util.find_spec("llama_cpp")
    if llama_cpp is not None and llama_cpp.origin is not None and not sanitize:  # compare the kernels with ggml's own
        configure.append(f"-DHYBRIMOE_GGML_LIB_DIR={Path(llama_cpp.origin).parent / 'lib'}")
    if sanitize:
        configure.append(f"-DHYBRIMOE_GGML_SOURCE={ggml_source()}")
    return configure


def build_target(target: str, sanitize: str = "", jobs: int | None = None) -> Path:
    """Builds one target of the native code with its tests; returns the folder of the build.

    One process at a time builds there. Raises CalledProcessError, with what the compiler printed.
    """
    from filelock import FileLock  # not there where the other tools need this module

    build = _build_folder(sanitize)
    make = [tool("cmake"), "--build", str(build), "--target", target, "-j", str(jobs or os.cpu_count() or 2)]
    build.mkdir(parents=True, exist_ok=True)
    with FileLock(build / ".lock"):
        for command in (_configure_command(sanitize), make):
            subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return build


def build_test_device(sanitize: str = "") -> Path:
    """Builds the test device (native/tests/device), a backend module; returns its path. Takes seconds."""
    return build_target("ggml-test-device", sanitize) / "native" / "tests" / "device" / "libggml-test-device.so"


# What --only names: the target that builds it, and how ctest chooses it.
PARTS = {
    "": ("native_tests", ()),
    "accelerator": ("accelerator_tests", ("-L", "accelerator")),
    "others": ("light_native_tests", ("-LE", "accelerator")),
}


def run_native_tests(sanitize: str = "", jobs: int | None = None, part: str = "") -> int:
    """Configure, build and run the native tests, or one of PARTS; returns ctest's exit status."""
    jobs = jobs or os.cpu_count() or 2
    target, choice = PARTS[part]
    try:
        build = build_target(target, sanitize, jobs)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stdout[-8000:])
        return error.returncode
    test = [tool("ctest"), "--test-dir", str(build), "--output-on-failure", "--no-tests=error", "-j", str(jobs)]
    return subprocess.run([*test, *choice]).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", choices=SANITIZERS, default="", help="build with these sanitizers")
    parser.add_argument(
        "--only",
        choices=PARTS,
        default="",
        help="build and run this part alone: what needs a real ggml, or the others (default: all)",
    )
    parser.add_argument("--jobs", type=int, help="parallel jobs (default: all processors)")
    options = parser.parse_args()
    raise SystemExit(run_native_tests(options.sanitize, options.jobs, options.only))


if __name__ == "__main__":
    main()
