"""Build and install the pinned llama-cpp-python into the running environment, for the accelerator at hand.

The sdist is fetched once through pip and checked against native/cmake/llama_cpp_release.txt. The built wheel is kept
in the user's cache under a key of release, accelerator and CPU, so that a second checkout installs it in seconds; pip's
own wheel cache knows neither. Prints progress while it compiles. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "native" / "cmake"))
from fetch_ggml_headers import cache_root, fail, get_sdist, read_release  # noqa: E402

TRIM = ROOT / "native" / "cmake" / "llama_cpp_trim.cmake"
CMAKE_OPTIONS = {
    "none": [],
    "cuda": ["-DGGML_CUDA=on"],
    "vulkan": ["-DGGML_VULKAN=on"],
}
# "none" took 287 s on 2 cores of a Xeon (family 6, model 167, GCC 12); the others have not been measured.
EXPECTED = {"none": "about 5 minutes on 2 cores", "cuda": "may take half an hour", "vulkan": "some minutes longer"}
STEP = re.compile(r"\[(\d+)/(\d+)\]")


def detect_gpu() -> str:
    """Return the accelerator that a build on this machine can use: `cuda`, `vulkan` or `none`."""
    has_nvidia_card = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if has_nvidia_card and shutil.which("nvcc"):
        return "cuda"
    has_card = any(Path("/dev/dri").glob("renderD*")) or has_nvidia_card
    has_vulkan_sdk = shutil.which("glslc") is not None and Path("/usr/include/vulkan/vulkan.hpp").exists()
    return "vulkan" if has_card and has_vulkan_sdk else "none"


def cpu_key() -> str:
    """Identify the CPU's instruction sets: ggml compiles for the very machine it is built on."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        flags = os.uname().machine
    return hashlib.sha256(flags.encode()).hexdigest()[:10]


def build_wheel(sdist: Path, gpu: str, folder: Path) -> Path:
    """Compile the wheel into `folder`, with progress on stderr; the last lines of the log follow a failure."""
    print(f"building llama-cpp-python once (GPU={gpu}): {EXPECTED[gpu]}", file=sys.stderr)
    options = ["-DLLAVA_BUILD=OFF", f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={TRIM}", *CMAKE_OPTIONS[gpu]]
    environment = dict(os.environ)
    environment["CMAKE_ARGS"] = " ".join([shlex.join(options), environment.get("CMAKE_ARGS", "")])
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 2))
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--disable-pip-version-check"]
    command += [str(sdist), "-w", str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=40)
    start = time.monotonic()
    for line in process.stdout:
        tail.append(line)
        show_progress(line, start)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    wheels = sorted(folder.glob("llama_cpp_python-*.whl"))
    if process.wait() != 0 or not wheels:
        sys.stderr.writelines(tail)
        hint = "the lines above say why; " + (
            "try GPU=none" if gpu != "none" else "a C++17 compiler and make are needed"
        )
        fail("llama-cpp-python could not be built", hint)
    return wheels[0]


def show_progress(line: str, start: float) -> None:
    step = STEP.search(line)
    if step is None or int(step[1]) == 0:
        return
    done, total = int(step[1]), int(step[2])
    passed = time.monotonic() - start
    left = passed / done * (total - done)
    text = f"compiling llama.cpp {done}/{total}, {passed:.0f} s, about {left:.0f} s left"
    if sys.stderr.isatty():
        print(f"\r{text:<70}", end="", file=sys.stderr, flush=True)
    elif done == total or done % 10 == 0:
        print(text, file=sys.stderr, flush=True)


def install(wheel: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--force-reinstall"]
    subprocess.run([*command, "--no-deps", str(wheel)], check=True)
    subprocess.run([*command[:-1], str(wheel)], check=True)  # its dependencies, where they are missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=["auto", *CMAKE_OPTIONS], default="auto", help="accelerator (default: detect)")
    parser.add_argument("--print-gpu", action="store_true", help="only print what --gpu means here")
    options = parser.parse_args()
    gpu = detect_gpu() if options.gpu == "auto" else options.gpu
    if options.print_gpu:
        print(gpu)
        return
    version, sha256 = read_release()
    key = hashlib.sha256(TRIM.read_bytes() + os.environ.get("CMAKE_ARGS", "").encode()).hexdigest()[:6]
    kept = cache_root() / f"wheel-{version}-{sha256[:12]}-{gpu}-{cpu_key()}-{key}"
    wheels = sorted(kept.glob("*.whl"))
    try:
        if not wheels:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
                sdist = get_sdist(version, sha256, Path(scratch))
                made = Path(scratch) / "wheel"
                made.mkdir()
                build_wheel(sdist, gpu, made)
                shutil.rmtree(kept, ignore_errors=True)
                made.rename(kept)
            wheels = sorted(kept.glob("*.whl"))
        install(wheels[0])
    except OSError as error:
        fail(f"cannot write to {kept.parent}: {error.strerror or error}", "set XDG_CACHE_HOME to a folder you own")
    except subprocess.CalledProcessError:
        fail("pip could not install llama-cpp-python", "see pip's message above")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
