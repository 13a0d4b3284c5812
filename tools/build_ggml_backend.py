#!/usr/bin/env python3
"""Builds one GPU backend of the pinned llama.cpp as a module that a CPU-only llama-cpp-python loads at run time.

HYBRIMOE_BACKENDS names such modules (see hybrimoe/native/plugin.py). The source is the sdist of the pinned
llama-cpp-python, checked by hash; nothing else of llama.cpp is compiled. The module is kept in the user's cache under a
key of release and options; an interrupted build goes on where it stopped. Prints the module's path.

Vulkan needs glslc and the headers of Vulkan and SPIR-V (Debian: libvulkan-dev glslc spirv-headers). CUDA needs nvcc;
where the toolkit has no cuBLAS, the Python package nvidia-cublas serves.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from build_llama_cpp import extract_source, run
from test_native import tool

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "native" / "cmake"))
from fetch_ggml_headers import cache_root, fail, get_sdist, read_release  # noqa: E402

VULKAN_SHIM = ROOT / "native" / "cmake" / "vulkan_shim"
# No run path: the module shall bind to the libggml-base that its host has loaded, by soname.
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_NATIVE=OFF",
    "-DCMAKE_SKIP_RPATH=ON",
    "-DLLAMA_BUILD_COMMON=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
EXPECTED = {
    "vulkan": "about 5 minutes on 2 cores",
    "cuda": "16 minutes on 2 cores for one architecture without flash attention",
}


def vulkan_options() -> list[str]:
    """CMake options of the Vulkan backend."""
    return ["-DGGML_VULKAN=ON", f"-DCMAKE_CXX_FLAGS=-I{VULKAN_SHIM}"]


def require_vulkan() -> None:
    """Fails in two lines when something that the build needs is missing."""
    missing = [name for name in ("glslc",) if shutil.which(name) is None]
    missing += [f"{name} (header)" for name in ("vulkan/vulkan.hpp",) if not has_header(name)]
    if missing:
        fail(f"the Vulkan backend needs {', '.join(missing)}", "apt-get install libvulkan-dev glslc spirv-headers")


def has_header(name: str) -> bool:
    folders = ["/usr/include", "/usr/local/include"]
    if "VULKAN_SDK" in os.environ:
        folders.append(f"{os.environ['VULKAN_SDK']}/include")
    folders += os.environ.get("CPLUS_INCLUDE_PATH", "").split(os.pathsep)
    return any(folder and Path(folder, name).exists() for folder in folders)


def cuda_options(architectures: str | None, flash_attention: bool) -> list[str]:
    """CMake options of the CUDA backend. Fails in two lines when something is missing."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        fail("the CUDA backend needs nvcc", "install the CUDA toolkit and put its bin folder on PATH")
        raise AssertionError  # not reached
    options = ["-DGGML_CUDA=ON", "-DGGML_CUDA_NCCL=OFF", f"-DGGML_CUDA_FA={'ON' if flash_attention else 'OFF'}"]
    if architectures is None and shutil.which("nvidia-smi") is None:
        fail("there is no NVIDIA card here to compile for", "name architectures, such as --architectures 86 or '86;89'")
    options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures or 'native'}")
    toolkit = Path(os.path.realpath(nvcc)).parent.parent
    if not list(toolkit.glob("**/stubs/libcuda.so")):  # virtual memory management calls the driver directly
        options.append("-DGGML_CUDA_NO_VMM=ON")
    if not list(toolkit.glob("**/libcublas.so*")) and not list(Path("/usr/lib").glob("*/libcublas.so*")):
        options += python_cublas()
    return options


def python_cublas() -> list[str]:
    """Where the Python package nvidia-cublas keeps headers and libraries; the toolkit has none."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (Path(p) for p in (spec.submodule_search_locations or [] if spec else [])):
        for library in sorted(folder.glob("*/lib/libcublas.so.*")):
            lt = next(iter(sorted(library.parent.glob("libcublasLt.so.*"))), None)
            include = library.parent.parent / "include"
            if lt is not None and (include / "cublas_v2.h").is_file():
                flags = f"-I{include}"
                return [
                    f"-DCUDA_cublas_LIBRARY={library}",
                    f"-DCUDA_cublasLt_LIBRARY={lt}",
                    f"-DCMAKE_CUDA_FLAGS={flags}",
                    f"-DCMAKE_CXX_FLAGS={flags}",
                ]
    fail("this CUDA toolkit has no cuBLAS", f"{sys.executable} -m pip install nvidia-cublas")
    raise AssertionError  # not reached


def key_of(options: Sequence[str]) -> str:
    options = [option.replace(str(ROOT), "") for option in options]  # another checkout makes the same module
    return hashlib.sha256("\0".join([*options, platform.machine()]).encode()).hexdigest()[:10]


def module_name(kind: str) -> str:
    return f"libggml-{kind}.so"


def module_path(kind: str, options: Sequence[str]) -> Path:
    """Where the module with these options is kept."""
    version, sha256 = read_release()
    root: Path = cache_root().parent
    return root / f"ggml-{kind}-{version}-{sha256[:12]}-{key_of(options)}" / module_name(kind)


def build(kind: str, options: Sequence[str], module: Path, jobs: int) -> None:
    """Builds the module in a folder beside its own, which stays when the build is interrupted."""
    version, sha256 = read_release()
    work = module.parent.with_name(f".{module.parent.name}.build")
    work.mkdir(parents=True, exist_ok=True)
    source = work / "source"
    if not source.is_dir():
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            extract_source(get_sdist(version, sha256, Path(scratch)), Path(scratch) / "source").rename(source)
    # The generator of shaders is a project of its own, which looks for ninja on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(tool("ninja")).parent), os.environ.get("PATH", "")])
    configure = [tool("cmake"), "-S", str(source), "-B", str(work / "build"), "-G", "Ninja", *CMAKE_OPTIONS, *options]
    run([*configure, f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"])
    run([tool("cmake"), "--build", str(work / "build"), "-j", str(jobs), "--target", f"ggml-{kind}"])
    if sys.stderr.isatty():
        print(file=sys.stderr)
    put(work / "build" / "bin" / module_name(kind), module)
    shutil.rmtree(work, ignore_errors=True)


def put(source: Path, target: Path) -> None:
    """Copies a file under a temporary name, then renames it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as file:
        made = Path(file.name)
    try:
        shutil.copy2(source, made)
        made.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            made.unlink()
        raise


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("vulkan", "cuda"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="also copy the module into this folder and print that")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="parallel jobs (default: all processors)")
    parser.add_argument("--no-build", action="store_true", help="only look for it; status 1 when it is not built yet")
    parser.add_argument(
        "--architectures", metavar="LIST", help="CUDA: what to compile for, such as '86;89' (default: the card here)"
    )
    parser.add_argument(
        "--no-flash-attention", action="store_true", help="CUDA: leave those kernels out, which takes far less time"
    )
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if options.kind != "cuda" and (options.architectures or options.no_flash_attention):
        parser.error("--architectures and --no-flash-attention belong to cuda")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if options.kind == "vulkan":
        cmake_options = vulkan_options()
    else:
        cmake_options = cuda_options(options.architectures, not options.no_flash_attention)
    module = module_path(options.kind, cmake_options)
    try:
        if not module.is_file():
            if options.no_build:
                fail(f"the {options.kind} module is not built yet", f"run tools/build_ggml_backend.py {options.kind}")
            if options.kind == "vulkan":
                require_vulkan()
            print(f"building ggml's {options.kind} backend once: {EXPECTED[options.kind]}", file=sys.stderr)
            build(options.kind, cmake_options, module, options.jobs)
        if options.out is not None:
            put(module, options.out / module.name)
            module = options.out / module.name
    except OSError as error:
        fail(f"cannot write {module}: {error.strerror or error}", "set XDG_CACHE_HOME to a folder with 2 GB free")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(module)


if __name__ == "__main__":
    main()
