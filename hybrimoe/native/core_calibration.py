"""The policy core's fits, and costs read back (C prototypes: "calibration" in native/include/hybrimoe_core.h).

Errors and units as in `hybrimoe.native.core`.
"""

from __future__ import annotations

import ctypes as ct
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrimoe.errors import PluginError
from hybrimoe.native import core_abi as abi
from hybrimoe.native.core import CPU, Costs

__all__ = ["CostReader", "Fit", "fit_costs"]

MAX_FIT_PARAMS = 3


class _FitC(ct.Structure):
    """hm_fit"""

    _fields_ = (
        ("params", ct.c_double * MAX_FIT_PARAMS),
        ("median_error", ct.c_double),
        ("p90_error", ct.c_double),
        ("n_outliers", ct.c_int32),
    )


_f64p, _handle = ct.POINTER(ct.c_double), ct.c_void_p
_message = (ct.c_char_p, ct.c_size_t)
_PROTOTYPES: dict[str, tuple[object, tuple[object, ...]]] = {
    "hm_fit_costs": (ct.c_int, (_f64p, _f64p, ct.c_int32, ct.c_int32, ct.POINTER(_FitC), *_message)),
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
