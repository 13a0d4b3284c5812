#!/usr/bin/env python3
"""Builds plain llama.cpp programs from the sdist of the pinned llama-cpp-python, for comparisons and with the plug-in.

The source is the very llama.cpp that the plug-in is compiled for, so `GGML_BACKEND_PATH` works with what comes out. The
programs are kept in the user's cache, and only missing ones are built. Prints the folder that holds them.
HYBRIMOE_LLAMA_CPP_BIN names a folder of programs that exist already; then nothing is built.

--without-avx builds llama.cpp's libraries alone, for x86-64 CPUs without AVX: with LLAMA_CPP_LIB_PATH they take the
place of the installed ones, which are compiled for the CPU at hand.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from install_llama_cpp import cpu_key, show_progress
from test_native import tool

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "native" / "cmake"))
from fetch_ggml_headers import cache_root, fail, get_sdist, read_release  # noqa: E402

TARGETS = ("llama-bench", "test-backend-ops", "test-llama-archs", "llama-completion")
MORE_TARGETS = ("llama-server", "llama-perplexity")
SOURCE = "vendor/llama.cpp/"
# The plug-in binds to shared ggml libraries; $ORIGIN lets the programs find theirs after the folder is renamed.
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
# The same compiler fault as in llama_cpp_trim.cmake: ggml's AMX path crashes when built with GCC 12.
X86_OPTIONS = ("-DCMAKE_C_FLAGS=-U__AMX_INT8__", "-DCMAKE_CXX_FLAGS=-U__AMX_INT8__")
WITHOUT_AVX = ("-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=OFF" for name in ("AVX", "AVX2", "FMA", "F16C", "BMI2")))


def kept_folder(cpu: str) -> Path:
    """Where builds are kept: one folder for each release and CPU, because ggml compiles for the CPU at hand."""
    version, sha256 = read_release()
    root: Path = cache_root().parent
    return root / f"llama.cpp-{version}-{sha256[:12]}-{cpu}"


def kept_targets(folder: Path) -> set[str]:
    """Targets that a finished build has left in `folder`."""
    file = folder / "targets.txt"
    return set(file.read_text().split()) if file.is_file() else set()


def find_kept(targets: Sequence[str], folder: Path) -> Path | None:
    """The programs and libraries of a finished build; None when one of `targets` is missing."""
    return folder / "bin" if set(targets) <= kept_targets(folder) else None


def find_programs(targets: Sequence[str] = TARGETS) -> Path | None:
    """The folder that holds all of `targets`, without building anything; None when one is missing."""
    given = os.environ.get("HYBRIMOE_LLAMA_CPP_BIN")
    if given:
        return Path(given) if all((Path(given) / name).is_file() for name in targets) else None
    return find_kept(targets, kept_folder(cpu_key()))


def extract_source(sdist: Path, folder: Path) -> Path:
    """Unpacks llama.cpp below `folder`; returns its root."""

    def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        for member in archive:
            below = member.name.partition("/")[2]
            if below.startswith(SOURCE) and ".." not in Path(below).parts and (member.isfile() or member.isdir()):
                member.name = below[len(SOURCE) :]
                yield member

    with tarfile.open(sdist) as archive:
        archive.extractall(folder, members=members(archive))
    if not (folder / "CMakeLists.txt").is_file():
        fail("the sdist does not hold llama.cpp where it is expected", "this is a bug in HybriMoE; please report it")
    return folder


def run(command: Sequence[str]) -> None:
    """Runs one step of the build with progress on stderr; its last lines follow a failure."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=40)
    start = time.monotonic()
    try:
        for line in process.stdout:
            tail.append(line)
            show_progress(line, start)
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if status != 0:
        sys.stderr.writelines(tail)
        fail("llama.cpp could not be built", "the lines above say why")


def build(targets: Sequence[str], folder: Path, jobs: int, more_options: Sequence[str] = ()) -> None:
    """Builds `targets` in a temporary folder beside `folder`, then puts its programs and libraries there."""
    version, sha256 = read_release()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".llama.cpp-") as scratch_name:
        scratch = Path(scratch_name)
        source = extract_source(get_sdist(version, sha256, scratch), scratch / "source")
        work = scratch / "build"
        configure = [tool("cmake"), "-S", str(source), "-B", str(work), "-G", "Ninja", *CMAKE_OPTIONS]
        configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        configure += [f"-DLLAMA_BUILD_SERVER={'ON' if 'llama-server' in targets else 'OFF'}"]
        if platform.machine() in ("x86_64", "AMD64"):
            configure += X86_OPTIONS
        run([*configure, *more_options])
        run([tool("cmake"), "--build", str(work), "-j", str(jobs), "--target", *targets])
        if sys.stderr.isatty():
            print(file=sys.stderr)
        made = scratch / "made"
        made.mkdir()
        (work / "bin").rename(made / "bin")
        (made / "targets.txt").write_text("\n".join(sorted(targets)) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", metavar="NAME", help=f"default: {' '.join(TARGETS)}")
    parser.add_argument(
        "--more", action="append", choices=MORE_TARGETS, default=[], help="a further target beside the default ones"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="parallel jobs (default: all processors)")
    parser.add_argument("--no-build", action="store_true", help="only look for them; status 1 when one is missing")
    parser.add_argument("--without-avx", action="store_true", help="the libraries alone, for CPUs without AVX")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if options.without_avx and (options.target or options.more):
        parser.error("--without-avx builds no programs")
    if options.without_avx:
        what, targets, folder, more_options = "libraries without AVX", ["llama"], kept_folder("no-avx"), WITHOUT_AVX
        found = find_kept(targets, folder)
    else:
        targets = [*(options.target or TARGETS), *options.more]
        what, folder, more_options = "own programs", kept_folder(cpu_key()), ()
        found = find_programs(targets)
        if found is None and (given := os.environ.get("HYBRIMOE_LLAMA_CPP_BIN")):
            fail(
                f"HYBRIMOE_LLAMA_CPP_BIN ({given}) lacks one of {' '.join(targets)}",
                "unset it to build them from the pinned release",
            )
    if found is None and options.no_build:
        fail(f"one of {' '.join(targets)} is not built yet", "leave --no-build out")
    try:
        if found is None:
            print(f"building llama.cpp's {what} once: about 8 minutes on 2 cores", file=sys.stderr)
            build(sorted(kept_targets(folder) | set(targets)), folder, options.jobs, more_options)
            found = folder / "bin"
    except OSError as error:
        fail(
            f"cannot write to {folder.parent}: {error.strerror or error}",
            "set XDG_CACHE_HOME to a folder with 2 GB free",
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(found)


if __name__ == "__main__":
    main()
