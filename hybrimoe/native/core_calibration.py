"""The policy core's fits and live cost model (C prototypes: "calibration" in native/include/hybrimoe_core.h).

Errors and units as in `hybrimoe.native.core`.
"""

from __future__ import annotations

import ctypes as ct
import enum
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrimoe.errors import PluginError
from hybrimoe.native import core_abi as abi
from hybrimoe.native.core import CPU, Costs, Handle

__all__ = ["CostKind", "CostReader", "Drift", "Estimator", "Fit", "fit_costs"]

MAX_FIT_PARAMS = 3


class CostKind(enum.IntEnum):
    """What a cost belongs to (hm_cost_kind)."""

    COPY = 0
    CPU = 1
    GPU = 2
    DRAM = 3


class _FitC(ct.Structure):
    """hm_fit"""

    _fields_ = (
        ("params", ct.c_double * MAX_FIT_PARAMS),
        ("median_error", ct.c_double),
        ("p90_error", ct.c_double),
        ("n_outliers", ct.c_int32),
    )


class _DriftC(ct.Structure):
    """hm_drift"""

    _fields_ = (
        ("kind", ct.c_int32),
        ("device", ct.c_int32),
        ("cls", ct.c_int32),
        ("parameter", ct.c_char_p),
        ("old_value", ct.c_double),
        ("new_value", ct.c_double),
        ("since_us", ct.c_double),
    )


_f64p, _i32p, _handle = ct.POINTER(ct.c_double), ct.POINTER(ct.c_int32), ct.c_void_p
_message = (ct.c_char_p, ct.c_size_t)
_PROTOTYPES: dict[str, tuple[object, tuple[object, ...]]] = {
    "hm_fit_costs": (ct.c_int, (_f64p, _f64p, ct.c_int32, ct.c_int32, ct.POINTER(_FitC), *_message)),
    "hm_estimator_create": (ct.c_int, (_handle, ct.c_double, ct.POINTER(_handle), *_message)),
    "hm_estimator_destroy": (None, (_handle,)),
    "hm_estimator_observe_copy": (None, (_handle, ct.c_int32, ct.c_double, ct.c_double, ct.c_double)),
    "hm_estimator_observe_cpu": (
        None,
        (_handle, ct.c_int32, _i32p, ct.c_int32, ct.c_double, ct.c_double, ct.c_double),
    ),
    "hm_estimator_observe_gpu": (
        None,
        (_handle, ct.c_int32, ct.c_int32, _i32p, ct.c_int32, ct.c_double, ct.c_double),
    ),
    "hm_estimator_moved": (ct.c_int32, (_handle,)),
    "hm_estimator_apply": (ct.c_int, (_handle, _handle, *_message)),
    "hm_estimator_next_drift": (ct.c_int32, (_handle, ct.POINTER(_DriftC))),
    "hm_estimator_n_rejected": (ct.c_int64, (_handle,)),
    "hm_costs_link": (ct.c_int, (_handle, ct.c_int32, _f64p, _f64p, *_message)),
    "hm_costs_expert_us": (
        ct.c_int,
        (_handle, ct.c_int32, ct.c_int32, ct.c_double, ct.c_int32, _f64p, *_message),
    ),
    "hm_costs_step_us": (ct.c_double, (_handle, ct.c_int32)),
    "hm_costs_dram": (ct.c_double, (_handle,)),
}


@functools.cache
def _declare(path: Path) -> None:
    lib = abi.library()
    try:
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise PluginError(
            f"the policy core '{path}' is older than this package: {error}", "reinstall hybrimoe"
        ) from None


def _library() -> ct.CDLL:
    _declare(abi.library_path())
    return abi.library()


@dataclass(frozen=True)
class Fit:
    """Parameters of a robust fit and the relative errors of its predictions."""

    params: tuple[float, ...]
    median_error: float
    p90_error: float
    n_outliers: int


def fit_costs(rows: Sequence[Sequence[float]], times_us: Sequence[float]) -> Fit:
    """Fits `times_us[k] = sum_i rows[k][i] * params[i]` with params >= 0, on relative residuals bounded by Huber.

    `rows` is [n_samples, 1..3], finite and at least 0, no row all zero; times are above 0. Raises CoreUsageError.
    """
    _library()
    n_params = len(rows[0]) if rows else 0
    flat = [float(v) for row in rows for v in row]
    if len(flat) != len(rows) * n_params or len(times_us) != len(rows):
        raise abi.CoreUsageError(
            f"{len(rows)} rows of {n_params} values and {len(times_us)} times do not belong together"
        )
    out = _FitC()
    x = (ct.c_double * max(1, len(flat)))(*flat)
    y = (ct.c_double * max(1, len(rows)))(*times_us)
    abi.call("hm_fit_costs", x, y, len(rows), n_params, ct.byref(out))
    return Fit(tuple(out.params[:n_params]), out.median_error, out.p90_error, out.n_outliers)


@dataclass(frozen=True)
class Drift:
    """A lasting change of a cost. Values in bytes per microsecond for bandwidths, else in microseconds."""

    kind: CostKind
    device: int
    cls: int
    parameter: str
    old: float
    new: float
    since_us: float

    def text(self, now_us: float) -> str:
        """One line for the user: `link 24.8 -> 6.1 GB/s since 12 s`."""
        names = {
            CostKind.COPY: "link" if self.device == 0 else f"link of device {self.device}",
            CostKind.CPU: "CPU experts",
            CostKind.GPU: "GPU experts" if self.device == 0 else f"experts on device {self.device}",
            CostKind.DRAM: "memory",
        }
        name = names[self.kind] + ("" if self.parameter == "bandwidth" else f" ({self.parameter})")
        if self.parameter == "bandwidth":
            values = f"{self.old / 1000:.1f} -> {self.new / 1000:.1f} GB/s"
        else:
            values = f"{self.old:.0f} -> {self.new:.0f} us"
        return f"{name} {values} since {max(0.0, now_us - self.since_us) / 1e6:.0f} s"


class Estimator(Handle):
    """Follows costs by timings of real work, from calibrated `costs` on. `memory`: samples until one counts 1/e."""

    _destroy = "hm_estimator_destroy"

    def __init__(self, costs: Costs, memory: float = 0.0) -> None:
        super().__init__()
        self._lib = _library()
        abi.call("hm_estimator_create", costs.c, memory, ct.byref(self._handle))

    def observe_copy(self, device: int, n_bytes: float, us: float, now_us: float) -> None:
        """A copy of `n_bytes` to `device` took `us`, ending at `now_us`."""
        self._lib.hm_estimator_observe_copy(self.c, device, n_bytes, us, now_us)

    def observe_cpu(
        self, layer: int, n_tokens: Sequence[int], us: float, now_us: float, *, copied_bytes: float = 0.0
    ) -> None:
        """A CPU batch of experts with `n_tokens` each; `copied_bytes` were copied to accelerators meanwhile."""
        loads = (ct.c_int32 * len(n_tokens))(*n_tokens)
        self._lib.hm_estimator_observe_cpu(self.c, layer, loads, len(n_tokens), us, copied_bytes, now_us)

    def observe_gpu(self, layer: int, device: int, n_tokens: Sequence[int], us: float, now_us: float) -> None:
        """A GPU batch of experts with `n_tokens` each."""
        loads = (ct.c_int32 * len(n_tokens))(*n_tokens)
        self._lib.hm_estimator_observe_gpu(self.c, layer, device, loads, len(n_tokens), us, now_us)

    @property
    def moved(self) -> bool:
        """Whether some cost differs from what `apply` wrote last."""
        return bool(self._lib.hm_estimator_moved(self.c))

    @property
    def n_rejected(self) -> int:
        """Samples that were no timings."""
        return int(self._lib.hm_estimator_n_rejected(self.c))

    def apply(self, costs: Costs) -> None:
        """Writes today's values into `costs`, of the same layers, classes and devices."""
        abi.call("hm_estimator_apply", self.c, costs.c)

    def drifts(self) -> Iterator[Drift]:
        """Lasting changes since the last call."""
        raw = _DriftC()
        while self._lib.hm_estimator_next_drift(self.c, ct.byref(raw)):
            yield Drift(
                CostKind(raw.kind),
                raw.device,
                raw.cls,
                raw.parameter.decode(),
                raw.old_value,
                raw.new_value,
                raw.since_us,
            )


class CostReader:
    """Reads costs back."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._lib = _library()

    def link(self, device: int) -> tuple[float, float]:
        """(latency in microseconds, bytes per microsecond)"""
        latency, rate = ct.c_double(), ct.c_double()
        abi.call("hm_costs_link", self._costs.c, device, ct.byref(latency), ct.byref(rate))
        return latency.value, rate.value

    def expert_us(self, n_tokens: float, *, layer: int = 0, device: int = CPU, first: bool = False) -> float:
        """Time of one expert of a layer with `n_tokens`."""
        us = ct.c_double()
        abi.call("hm_costs_expert_us", self._costs.c, layer, device, n_tokens, int(first), ct.byref(us))
        return us.value

    def step_us(self, device: int) -> float:
        """Fixed cost of a step of the device or `CPU`; NaN when unknown."""
        return float(self._lib.hm_costs_step_us(self._costs.c, device))

    @property
    def dram_bytes_per_us(self) -> float:
        """The shared ceiling; infinite when there is none."""
        return float(self._lib.hm_costs_dram(self._costs.c))
