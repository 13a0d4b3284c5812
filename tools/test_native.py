"""Build the native code with its tests and run them (ctest), optionally with sanitizers."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = {"": "", "address": "address,undefined", "thread": "thread"}


def tool(name: str) -> str:
    """The path of a build tool: of this environment if it is there, else of the system."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or name


def run_native_tests(sanitize: str = "", jobs: int | None = None) -> int:
    """Configure, build and run the native tests; returns ctest's exit status."""
    build = ROOT / "build" / ("native" if not sanitize else f"native-{sanitize}")
    jobs = jobs or os.cpu_count() or 2
    configure = [
        tool("cmake"),
        "-S",
        str(ROOT),
        "-B",
        str(build),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
    ]
    configure += ["-DHYBRIMOE_TESTS=ON", f"-DHYBRIMOE_SANITIZE={SANITIZERS[sanitize]}"]
    configure += [f"-DPython3_EXECUTABLE={sys.executable}"]
    llama_cpp = importlib.util.find_spec("llama_cpp")
    if llama_cpp is not None and llama_cpp.origin is not None and not sanitize:  # compare the kernels with ggml's own
        configure.append(f"-DHYBRIMOE_GGML_LIB_DIR={Path(llama_cpp.origin).parent / 'lib'}")
    for command in (configure, [tool("cmake"), "--build", str(build), "-j", str(jobs)]):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            sys.stderr.write(result.stdout[-8000:])
            return result.returncode
    return subprocess.run(
        [tool("ctest"), "--test-dir", str(build), "--output-on-failure", "--no-tests=error", "-j", str(jobs)]
    ).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", choices=SANITIZERS, default="", help="build with these sanitizers")
    parser.add_argument("--jobs", type=int, help="parallel jobs (default: all processors)")
    options = parser.parse_args()
    raise SystemExit(run_native_tests(options.sanitize, options.jobs))


if __name__ == "__main__":
    main()
