"""ctypes binding of the ggml backend plug-in, `libggml-hybrimoe.so` (C prototypes: native/include/hybrimoe.h)."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from hybrimoe.errors import PluginError
from hybrimoe.native.locate import installed_library
from hybrimoe.native.trace_ring import TraceRing

LIBRARY_NAME = "libggml-hybrimoe.so"
ABI_VERSION = 6
REINSTALL_HINT = "reinstall the package for this llama-cpp-python: pip install --force-reinstall --no-deps hybrimoe"


class Ending(IntEnum):
    """enum hybrimoe_ending: why the kernel would end the process"""

    FILE_IS_GONE = 0
    ILLEGAL_INSTRUCTION = 1


@dataclass(frozen=True)
class LayerCounters:
    """What the plug-in did for one layer since its counters were last reset (native/backend/counters.def).

    Hits, misses and late ones (misses whose copy was under way) are counted where an accelerator takes part; `plan_us`
    is planning and launching, `wait_us` waiting for accelerators once the CPU's share was done. Of blocks of a single
    token `decode_us` is the experts' time, `predicted_us` what their plans said (0 without accelerators).
    """

    layer: int
    n_steps: int
    n_tokens: int
    n_blocks: int
    n_blocks_delegated: int
    n_experts_cpu: int
    n_experts_gpu: int
    router_us: float
    experts_us: float
    merge_us: float
    plan_us: float = 0.0
    wait_us: float = 0.0
    n_hits: int = 0
    n_misses: int = 0
    n_late: int = 0
    n_evictions: int = 0
    n_copies: int = 0
    n_prefetched: int = 0
    h2d_bytes: int = 0
    n_decode: int = 0
    decode_us: float = 0.0
    predicted_us: float = 0.0


class Library:
    """The plug-in's library, whether or not a ggml has loaded it: what it knows of this process, and its observer."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._baselines: dict[int, dict[str, Any]] = {}

    @property
    def version(self) -> str:
        return _text(self._library.hybrimoe_version())

    @property
    def ggml_version(self) -> str:
        """The ggml release that the plug-in was compiled for."""
        return _text(self._library.hybrimoe_ggml_version())

    def configure(self, **settings: Any) -> None:
        """Set what backend instances made from now on use (keys: docs/settings.md).

        Raises PluginError for unknown keys and values; nothing is changed then.
        """
        error = ctypes.create_string_buffer(512)
        if self._library.hybrimoe_configure(json.dumps(settings).encode(), error, len(error)) != 0:
            raise PluginError(f"the plug-in refused its settings: {_text(error.value)}", "hybrimoe doctor")

    def snapshot(self, request: str = "") -> dict[str, Any]:
        """What the observer's socket serves (docs/observability.md), of this process. Thread-safe."""

        def write(out: Any, size: int) -> int:
            return int(self._library.hybrimoe_snapshot(request.encode(), out, size))

        return dict(json.loads(_whole_text(write)))

    def set_host_facts(self, facts: Mapping[str, Any]) -> None:
        """What snapshots hold as `host`. Starts the observer where it is configured. Raises PluginError."""
        error = ctypes.create_string_buffer(256)
        if self._library.hybrimoe_set_host_facts(json.dumps(facts).encode(), error, len(error)) != 0:
            raise PluginError(f"the plug-in refused facts of its host: {_text(error.value)}", "hybrimoe doctor")

    def runtime_folder(self) -> Path:
        """Where this user's observer sockets are; it need not exist."""
        return Path(os.fsdecode(_whole_text(self._library.hybrimoe_runtime_folder)))


class Plugin(Library):
    """The loaded plug-in, made by `load_plugin()`. One per process: ggml keeps backends until the process ends."""

    def __init__(self, path: Path, library: ctypes.CDLL, buffer_type: int) -> None:
        super().__init__(library)
        self.path = path
        self.buffer_type = buffer_type

    def last_instance(self) -> int:
        """The id of the backend instance made last by this thread, that is, by its newest llama_context; 0 if none."""
        return int(self._library.hybrimoe_last_instance())

    def instance(self, instance: int, *parts: str) -> dict[str, Any]:
        """Parts of a snapshot of one instance; empty for one that is gone."""
        found = self.snapshot(" ".join((f"instance={instance}", *parts)))["instances"]
        return dict(found[0]) if found else {}

    def counters(self, instance: int) -> list[LayerCounters]:
        """Counters since they were reset of every layer that has run since, in layer order."""
        now = _rows(self.instance(instance, "counters"))
        before = _rows(self._baselines.get(instance, {}))
        layers = []
        for layer, values in now.items():
            first = before.get(layer, {})
            since = LayerCounters(layer=layer, **{name: value - first.get(name, 0) for name, value in values.items()})
            if since.n_steps:
                layers.append(since)
        return layers

    def n_nodes_delegated(self, instance: int) -> int:
        """Graph nodes of `instance` that ggml's CPU backend computed outside any MoE block."""
        before = self._baselines.get(instance, {}).get("n_nodes_delegated", 0)
        return int(self.instance(instance, "counters").get("n_nodes_delegated", before) - before)

    def reset_counters(self, instance: int) -> None:
        """`counters` and `n_nodes_delegated` begin anew. What others read goes on growing."""
        self._baselines[instance] = self.instance(instance, "counters")

    def state(self, instance: int) -> dict[str, Any]:
        """Devices, slots, costs, statistics and guard of `instance`; empty for one that is gone."""
        return dict(self.instance(instance, "state").get("state", {}))

    def residency(self, instance: int) -> dict[int, list[int]]:
        """Per layer (llama.cpp's index) and expert the accelerator that holds it, -1 for none; empty where unknown."""
        found = self.instance(instance, "state", "residency")
        layers = found.get("state", {}).get("layers", [])
        return {layer["layer"]: on for layer, on in zip(layers, found.get("residency", []), strict=False)}

    def events(self, instance: int, after: int = 0) -> list[tuple[int, str]]:
        """What the dispatch logged after line number `after`: (number, line) in order."""
        return [(n, line) for n, line in self.instance(instance, "events", f"after={after}").get("events", [])]

    def trace_ring(self, instance: int) -> TraceRing:
        """The recording of `instance`, which must have been made with the setting `trace`."""
        return TraceRing(self._library, instance, lambda: dict(self.instance(instance, "state", "trace")))


def _rows(instance: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Per layer, its counters by name, from the columns of a snapshot."""
    columns = dict(instance.get("counters", {}))
    layers = columns.pop("layer", [])
    for shape in ("n_experts", "top_k"):
        columns.pop(shape, None)
    return {layer: {name: column[i] for name, column in columns.items()} for i, layer in enumerate(layers)}


def _whole_text(write: Callable[[Any, int], int]) -> bytes:
    """What `write` gives, however long it has become since it was asked how long it is."""
    size = 1 << 16
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = write(buffer, size)
        if length < 0:
            raise MemoryError
        if length < size:
            return buffer.value
        size = length + 4096


def library_path() -> Path:
    """Where the compiled plug-in is: HYBRIMOE_PLUGIN, or beside this module. Raises PluginError when it is missing."""
    given = os.environ.get("HYBRIMOE_PLUGIN")
    path = Path(given) if given else installed_library(LIBRARY_NAME)
    if not path.is_file():
        raise PluginError(f"the plug-in {path} is missing", "unset HYBRIMOE_PLUGIN" if given else REINSTALL_HINT)
    return path


@functools.cache
def _open_library() -> ctypes.CDLL:
    """The plug-in's library, not yet bound to any ggml. Raises PluginError when it is missing or damaged."""
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise PluginError(f"the plug-in cannot be loaded: {error}", REINSTALL_HINT) from error
    _declare(library)
    abi = library.hybrimoe_abi_version()
    if abi != ABI_VERSION:
        raise PluginError(f"the plug-in has ABI {abi}, this package needs {ABI_VERSION}", REINSTALL_HINT)
    return library


@functools.cache
def plugin_library() -> Library:
    """The plug-in's library without ggml and llama.cpp. Raises PluginError when it is missing or damaged."""
    return Library(_open_library())


@functools.cache
def load_plugin() -> Plugin:
    """Load the plug-in into llama_cpp's ggml and return it. Must run before the model is loaded.

    Raises PluginError when the library is missing or damaged, or does not fit llama_cpp's ggml.
    """
    path, library, ggml = library_path(), _open_library(), ggml_library()
    mismatch = library.hybrimoe_check_ggml(ggml._handle)
    if mismatch:
        raise PluginError(_text(mismatch), REINSTALL_HINT)
    registry = ggml.ggml_backend_load(str(path).encode())
    if not registry:
        raise PluginError(f"ggml refused the plug-in {path}", "run again with -v to see ggml's reason")
    device = ggml.ggml_backend_reg_dev_get(registry, 0)
    return Plugin(path, library, ggml.ggml_backend_dev_buffer_type(device))


def set_last_words(ending: Ending, text: str | None, exit_code: int = 1) -> None:
    """What goes to stderr when the kernel ends the process for that reason; None: as if this was never called.

    Calls nothing of ggml. Raises PluginError when the plug-in's library is missing or damaged.
    """
    _open_library().hybrimoe_set_last_words(ending, None if text is None else text.encode(), exit_code)


@functools.cache
def ggml_library() -> ctypes.CDLL:
    """The libggml that llama_cpp's libllama uses, with the few functions that the package calls declared.

    Reached through libllama's handle: a wheel holds several copies of libggml, each with a backend registry of its own,
    and opening one by its path may give another than libllama's.
    """
    from llama_cpp.llama_cpp import _lib as libllama

    libggml = ctypes.CDLL(libllama._name, handle=libllama._handle)
    # ggml_backend_reg_t ggml_backend_load(const char * path)
    libggml.ggml_backend_load.argtypes = [ctypes.c_char_p]
    libggml.ggml_backend_load.restype = ctypes.c_void_p
    # ggml_backend_dev_t ggml_backend_reg_dev_get(ggml_backend_reg_t reg, size_t index)
    libggml.ggml_backend_reg_dev_get.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libggml.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    # ggml_backend_buffer_type_t ggml_backend_dev_buffer_type(ggml_backend_dev_t device)
    libggml.ggml_backend_dev_buffer_type.argtypes = [ctypes.c_void_p]
    libggml.ggml_backend_dev_buffer_type.restype = ctypes.c_void_p
    # size_t ggml_backend_dev_count(void)
    libggml.ggml_backend_dev_count.argtypes = []
    libggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    # ggml_backend_dev_t ggml_backend_dev_get(size_t index)
    libggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    libggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    # enum ggml_backend_dev_type ggml_backend_dev_type(ggml_backend_dev_t device)
    libggml.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    libggml.ggml_backend_dev_type.restype = ctypes.c_int
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        # const char * ggml_backend_dev_name(ggml_backend_dev_t device), and the same of ggml_backend_dev_description
        getattr(libggml, name).argtypes = [ctypes.c_void_p]
        getattr(libggml, name).restype = ctypes.c_char_p
    # const char * ggml_version(void)
    libggml.ggml_version.argtypes = []
    libggml.ggml_version.restype = ctypes.c_char_p
    return libggml


def _declare(library: ctypes.CDLL) -> None:
    # int hybrimoe_abi_version(void)
    library.hybrimoe_abi_version.argtypes = []
    library.hybrimoe_abi_version.restype = ctypes.c_int
    for name in ("hybrimoe_version", "hybrimoe_ggml_version"):
        # const char * NAME(void)
        getattr(library, name).argtypes = []
        getattr(library, name).restype = ctypes.c_char_p
    # const char * hybrimoe_check_ggml(void * library)
    library.hybrimoe_check_ggml.argtypes = [ctypes.c_void_p]
    library.hybrimoe_check_ggml.restype = ctypes.c_char_p
    # int hybrimoe_configure(const char * json, char * error, size_t error_size)
    library.hybrimoe_configure.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    library.hybrimoe_configure.restype = ctypes.c_int
    # uint64_t hybrimoe_last_instance(void)
    library.hybrimoe_last_instance.argtypes = []
    library.hybrimoe_last_instance.restype = ctypes.c_uint64
    # int64_t hybrimoe_snapshot(const char * request, char * out, size_t size)
    library.hybrimoe_snapshot.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    library.hybrimoe_snapshot.restype = ctypes.c_int64
    # int hybrimoe_set_host_facts(const char * json, char * error, size_t error_size)
    library.hybrimoe_set_host_facts.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    library.hybrimoe_set_host_facts.restype = ctypes.c_int
    # int64_t hybrimoe_runtime_folder(char * out, size_t size)
    library.hybrimoe_runtime_folder.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.hybrimoe_runtime_folder.restype = ctypes.c_int64
    # int hybrimoe_set_last_words(int ending, const char * text, int exit_code)
    library.hybrimoe_set_last_words.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.hybrimoe_set_last_words.restype = ctypes.c_int


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")
