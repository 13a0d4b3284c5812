"""ggml backends compiled as modules (`tools/build_ggml_backend.py`), loaded into llama_cpp's ggml at run time.

So a llama-cpp-python built for the CPU alone gets a GPU: after loading, llama.cpp and the plug-in see its devices.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from hybrimoe.errors import PluginError

VARIABLE = "HYBRIMOE_BACKENDS"
_MISSING_LIBRARY = re.compile(r"^(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")


def backend_module_paths(environment: Mapping[str, str] | None = None) -> tuple[Path, ...]:
    """The modules that HYBRIMOE_BACKENDS names (separated as in PATH); empty where it is not set."""
    text = (os.environ if environment is None else environment).get(VARIABLE, "")
    return tuple(Path(part) for part in text.split(os.pathsep) if part.strip())


def load_backend_modules(paths: Iterable[Path | str]) -> tuple[str, ...]:
    """Load modules into llama_cpp's ggml, before the model is loaded; returns the names of the devices they bring.

    A module that is loaded already is not loaded again, and its devices are not returned again. A driver without a
    device brings none and is no error. Raises PluginError when a module is missing, damaged, of another ggml API, finds
    no driver, or brings a device that is there already (a llama-cpp-python compiled for the same kind of GPU).
    """
    from hybrimoe.native.plugin import ggml_library

    names: list[str] = []
    for path in (Path(p) for p in paths):
        names += _load(ggml_library(), path)
    return tuple(names)


def _load(ggml: ctypes.CDLL, path: Path) -> list[str]:
    if not path.is_file():
        raise PluginError(
            f"the backend module {path} is missing", f"correct {VARIABLE}, or run tools/build_ggml_backend.py"
        )
    # By its absolute path: a bare name would be searched in the system's folders.
    path = path.resolve()
    before = device_names(ggml)
    _open_with_dependencies(path)
    # ggml_backend_reg_t ggml_backend_load(const char * path)
    registry = ggml.ggml_backend_load(str(path).encode())
    if not registry:
        raise PluginError(
            f"ggml refused the backend module {path}",
            f"it is of another ggml release or its driver is missing; unset {VARIABLE} to go on without it",
        )
    new = device_names(ggml)[len(before) :]
    twice = [name for name in new if name in before]
    if twice:
        # void ggml_backend_unload(ggml_backend_reg_t reg)
        ggml.ggml_backend_unload.argtypes = [ctypes.c_void_p]
        ggml.ggml_backend_unload.restype = None
        ggml.ggml_backend_unload(registry)
        raise PluginError(
            f"the backend module {path} brings {', '.join(twice)}, which this llama.cpp has already",
            f"unset {VARIABLE}",
        )
    return new


def device_names(ggml: ctypes.CDLL | None = None) -> list[str]:
    """Names of all devices of llama_cpp's ggml, in its order."""
    if ggml is None:
        from hybrimoe.native.plugin import ggml_library

        ggml = ggml_library()
    count = ggml.ggml_backend_dev_count()
    return [ggml.ggml_backend_dev_name(ggml.ggml_backend_dev_get(i)).decode("utf-8", "replace") for i in range(count)]


def device_memory(name: str) -> tuple[int, int]:
    """(free, total) bytes of a device as its driver reports them. Raises PluginError for an unknown device."""
    from hybrimoe.native.plugin import ggml_library

    ggml = ggml_library()
    names = device_names(ggml)
    if name not in names:
        raise PluginError(f"there is no device '{name}'", f"known are: {', '.join(names)}")
    # void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total)
    ggml.ggml_backend_dev_memory.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.POINTER(ctypes.c_size_t),
    ]
    ggml.ggml_backend_dev_memory.restype = None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    device = ggml.ggml_backend_dev_get(names.index(name))
    ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def _open_with_dependencies(path: Path) -> None:
    """Open a library for good, and before it what it needs of the CUDA libraries that pip has installed.

    pip puts those where the system's loader does not look. ggml would not tell why a library cannot be opened.
    """
    opened: set[str] = set()
    while True:
        try:
            ctypes.CDLL(str(path))
            return
        except OSError as error:
            missing = _MISSING_LIBRARY.match(str(error))
            found = _pip_library(missing[1]) if missing and missing[1] not in opened else None
            if missing is None or found is None:
                hint = f"install what it needs, or unset {VARIABLE} to go on without it"
                raise PluginError(f"the backend module cannot be loaded: {error}", hint) from error
            opened.add(missing[1])
            _open_with_dependencies(found)


def _pip_library(name: str) -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for library in sorted(Path(folder).glob(f"*/lib/{name}")):
            return library
    return None
