"""ctypes binding of the plug-in's measurements (C prototypes: native/include/hybrimoe_probe.h)."""

from __future__ import annotations

import ctypes as ct
import enum
from dataclasses import dataclass
from typing import Any

from hybrimoe.errors import HybrimoeError, PluginError
from hybrimoe.native.plugin import REINSTALL_HINT, load_plugin

__all__ = ["CopyKind", "CpuProbe", "DeviceProbe", "FfnShape", "read_rate"]


class CopyKind(enum.IntEnum):
    """enum hybrimoe_copy_kind"""

    H2D_PINNED = 0
    H2D_PAGEABLE = 1
    D2H_PINNED = 2


class _ShapeC(ct.Structure):
    """struct hybrimoe_ffn_shape"""

    _fields_ = (
        ("n_embd", ct.c_int64),
        ("n_ff", ct.c_int64),
        ("gate_type", ct.c_int32),
        ("down_type", ct.c_int32),
        ("op", ct.c_int32),
        ("n_experts", ct.c_int32),
    )


@dataclass(frozen=True)
class FfnShape:
    """One gated expert: gate and up [n_embd, n_ff], down [n_ff, n_embd]; types are ggml's numbers, `op` its glu op."""

    n_embd: int
    n_ff: int
    gate_type: int
    down_type: int
    op: int = 2

    def to_c(self, n_experts: int) -> _ShapeC:
        """The structure for the library, with `n_experts` held in memory."""
        return _ShapeC(self.n_embd, self.n_ff, self.gate_type, self.down_type, self.op, n_experts)


_handle, _f64p, _error = ct.c_void_p, ct.POINTER(ct.c_double), (ct.c_char_p, ct.c_size_t)
_shape = ct.POINTER(_ShapeC)
_PROTOTYPES: dict[str, tuple[object, tuple[object, ...]]] = {
    "hybrimoe_cpu_probe_open": (ct.c_int, (_shape, ct.POINTER(_handle), *_error)),
    "hybrimoe_cpu_probe_close": (None, (_handle,)),
    "hybrimoe_cpu_probe_run": (ct.c_int, (_handle, *(ct.c_int32,) * 4, _f64p, *_error)),
    "hybrimoe_cpu_probe_nodes": (ct.c_int, (_handle, *(ct.c_int32,) * 3, _f64p, *_error)),
    "hybrimoe_cpu_probe_dense": (ct.c_int, (_handle, *(ct.c_int32,) * 3, _f64p, *_error)),
    "hybrimoe_probe_read": (ct.c_int, (ct.c_int32, ct.c_size_t, ct.c_double, _f64p, *_error)),
    "hybrimoe_device_probe_open": (ct.c_int, (ct.c_int32, _shape, ct.POINTER(_handle), *_error)),
    "hybrimoe_device_probe_close": (None, (_handle,)),
    "hybrimoe_device_probe_has": (ct.c_int, (_handle, ct.c_int32)),
    "hybrimoe_device_probe_copy": (ct.c_int, (_handle, ct.c_int32, ct.c_size_t, ct.c_int32, _f64p, *_error)),
    "hybrimoe_device_probe_sync": (ct.c_int, (_handle, ct.c_int32, _f64p, *_error)),
    "hybrimoe_device_probe_run": (ct.c_int, (_handle, *(ct.c_int32,) * 3, _f64p, *_error)),
    "hybrimoe_device_probe_together": (
        ct.c_int,
        (_handle, ct.c_int32, ct.c_size_t, ct.c_double, _f64p, _f64p, *_error),
    ),
}


def _library() -> Any:
    plugin = load_plugin()
    library = plugin._library
    try:
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise PluginError(f"the plug-in is older than this package: {error}", REINSTALL_HINT) from None
    return library


def _call(function: Any, *arguments: Any) -> None:
    error = ct.create_string_buffer(512)
    if function(*arguments, error, ct.c_size_t(len(error))) != 0:
        raise HybrimoeError(f"cannot measure: {error.value.decode('utf-8', 'replace')}", "hybrimoe doctor")


def read_rate(n_threads: int, n_bytes: int, seconds: float) -> float:
    """Bytes per microsecond that `n_threads` read from main memory."""
    rate = ct.c_double()
    _call(_library().hybrimoe_probe_read, n_threads, n_bytes, seconds, ct.byref(rate))
    return rate.value


class _Probe:
    """Owns one handle; close it, or use it as a context manager."""

    _close = ""

    def __init__(self) -> None:
        self._library = _library()
        self._handle = _handle()

    def close(self) -> None:
        if self._handle:
            getattr(self._library, self._close)(self._handle)
            self._handle = _handle()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CpuProbe(_Probe):
    """Times expert batches on the CPU. Raises HybrimoeError for shapes without kernels and when memory is short."""

    _close = "hybrimoe_cpu_probe_close"

    def __init__(self, shape: FfnShape, n_experts: int) -> None:
        super().__init__()
        c = shape.to_c(n_experts)
        _call(self._library.hybrimoe_cpu_probe_open, ct.byref(c), ct.byref(self._handle))

    def run(self, n_active: int, n_tokens: int, n_threads: int, n_runs: int) -> list[float]:
        """Microseconds of batches of `n_active` experts (0: nothing but the fixed cost) with `n_tokens` each."""
        us = (ct.c_double * n_runs)()
        _call(self._library.hybrimoe_cpu_probe_run, self._handle, n_active, n_tokens, n_threads, n_runs, us)
        return list(us)

    def nodes(self, n_nodes: int, n_threads: int, n_runs: int) -> list[float]:
        """Microseconds of graphs of `n_nodes` small operations."""
        us = (ct.c_double * n_runs)()
        _call(self._library.hybrimoe_cpu_probe_nodes, self._handle, n_nodes, n_threads, n_runs, us)
        return list(us)

    def dense(self, n_experts: int, n_threads: int, n_runs: int) -> list[float]:
        """Microseconds of ggml's own product of one row with the gate matrices of `n_experts` at once."""
        us = (ct.c_double * n_runs)()
        _call(self._library.hybrimoe_cpu_probe_dense, self._handle, n_experts, n_threads, n_runs, us)
        return list(us)


class DeviceProbe(_Probe):
    """Times copies and expert batches on a ggml device, by its index in ggml's registry."""

    _close = "hybrimoe_device_probe_close"

    def __init__(self, device: int, shape: FfnShape, n_experts: int) -> None:
        super().__init__()
        c = shape.to_c(n_experts)
        _call(self._library.hybrimoe_device_probe_open, device, ct.byref(c), ct.byref(self._handle))

    def has(self, kind: CopyKind) -> bool:
        """Whether the device has copies of this kind."""
        return bool(self._library.hybrimoe_device_probe_has(self._handle, int(kind)))

    def copy(self, kind: CopyKind, n_bytes: int, n_runs: int) -> list[float]:
        """Microseconds of copies of `n_bytes`, each waited for."""
        us = (ct.c_double * n_runs)()
        _call(self._library.hybrimoe_device_probe_copy, self._handle, int(kind), n_bytes, n_runs, us)
        return list(us)

    def sync(self, n_runs: int) -> list[float]:
        """Microseconds of launching next to nothing and waiting for it."""
        us = (ct.c_double * n_runs)()
        _call(self._library.hybrimoe_device_probe_sync, self._handle, n_runs, us)
        return list(us)

    def run(self, n_active: int, n_tokens: int, n_runs: int) -> list[float]:
        """Microseconds of expert batches, rows up and down included."""
        us = (ct.c_double * n_runs)()
        _call(self._library.hybrimoe_device_probe_run, self._handle, n_active, n_tokens, n_runs, us)
        return list(us)

    def together(self, n_threads: int, n_bytes: int, seconds: float) -> tuple[float, float]:
        """(bytes read, bytes copied) per microsecond while threads read main memory beside copies to the device."""
        read, copied = ct.c_double(), ct.c_double()
        _call(
            self._library.hybrimoe_device_probe_together,
            self._handle,
            n_threads,
            n_bytes,
            seconds,
            ct.byref(read),
            ct.byref(copied),
        )
        return read.value, copied.value
