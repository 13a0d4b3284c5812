#!/usr/bin/env python3
"""Compile the native code for another processor: policy core, kernels, plug-in and their tests.

Shows that nothing depends on x86-64 without a branch for others. Needs the cross compiler of the distribution
(Debian: g++-aarch64-linux-gnu); with qemu-user the programs that need no ggml are run as well.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from test_native import tool  # noqa: E402

TARGETS = {
    "aarch64": ("aarch64-linux-gnu", "g++-aarch64-linux-gnu"),
}
# Programs that link neither ggml nor threads of it: they run under an emulator without more.
RUNNABLE = ("test_core_scheduling", "test_core_cache", "test_core_guard", "test_kernels")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor", choices=TARGETS, default="aarch64", help="(default: %(default)s)")
    parser.add_argument("--build", type=Path, metavar="DIR", help="build folder (default: build/cross-PROCESSOR)")
    parser.add_argument("--jobs", type=int, default=2, help="parallel jobs (default: %(default)s)")
    parser.add_argument("--no-tests", action="store_true", help="the libraries alone")
    options = parser.parse_args()
    prefix, package = TARGETS[options.processor]
    if shutil.which(f"{prefix}-g++") is None:
        print(f"error: {prefix}-g++ is not installed\nhint: apt install {package}", file=sys.stderr)
        return 1
    build = options.build or ROOT / "build" / f"cross-{options.processor}"
    configure = [
        tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={options.processor}",
        f"-DCMAKE_C_COMPILER={prefix}-gcc", f"-DCMAKE_CXX_COMPILER={prefix}-g++",
        f"-DHYBRIMOE_TESTS={'OFF' if options.no_tests else 'ON'}", f"-DPython3_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    for command in (configure, [tool("cmake"), "--build", str(build), "-j", str(options.jobs)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            print(done.stdout[-6000:], file=sys.stderr)
            print("error: it does not compile\nhint: the compiler's message is above", file=sys.stderr)
            return 1
        if "warning:" in done.stdout:
            print(done.stdout[-6000:], file=sys.stderr)
    for path in sorted(build.rglob("lib*hybrimoe*.so")):
        print(f"{path.relative_to(build)}  {path.stat().st_size // 1024} KiB")
    return _run_tests(build, prefix, options.processor)


def _run_tests(build: Path, prefix: str, processor: str) -> int:
    emulator = shutil.which(f"qemu-{processor}-static") or shutil.which(f"qemu-{processor}")
    if emulator is None:
        print(f"not run: qemu-{processor} is not installed (apt install qemu-user)", file=sys.stderr)
        return 0
    failed = 0
    for program in sorted(path for name in RUNNABLE for path in build.rglob(name) if path.is_file()):
        done = subprocess.run(
            [emulator, "-L", f"/usr/{prefix}", str(program)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        failed += done.returncode != 0
        print(f"{program.name}: {'passed' if done.returncode == 0 else f'FAILED ({done.returncode})'}")
        if done.returncode != 0:
            print(done.stdout[-2000:], file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
