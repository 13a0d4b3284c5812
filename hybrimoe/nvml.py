"""NVIDIA cards through NVML, where the optional package nvidia-ml-py and a driver are there; nothing otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

__all__ = ["cards"]


def cards() -> list[dict[str, Any]]:
    """One object per card; a value that the driver does not tell is None. [] without NVML.

    `pcie_generation` and `pcie_width` are those of this moment: an idle link reports a low generation.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no card: all mean the same here
        return []
    try:
        driver = _text(_ask(pynvml.nvmlSystemGetDriverVersion))
        return [_card(pynvml, i, driver) for i in range(_ask(pynvml.nvmlDeviceGetCount) or 0)]
    finally:
        with contextlib.suppress(Exception):
            pynvml.nvmlShutdown()


def _card(nv: Any, index: int, driver: str | None) -> dict[str, Any]:
    handle = _ask(lambda: nv.nvmlDeviceGetHandleByIndex(index))

    def ask(name: str, *arguments: Any) -> Any:
        return _ask(lambda: getattr(nv, name)(handle, *arguments))

    memory = ask("nvmlDeviceGetMemoryInfo")
    throttle = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    return {
        "name": _text(ask("nvmlDeviceGetName")),
        "driver": driver,
        "memory_bytes": None if memory is None else int(memory.total),
        "memory_free_bytes": None if memory is None else int(memory.free),
        "pcie_generation": ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        "pcie_generation_max": ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        "pcie_width": ask("nvmlDeviceGetCurrPcieLinkWidth"),
        "pcie_width_max": ask("nvmlDeviceGetMaxPcieLinkWidth"),
        "power_limit_w": _scaled(ask("nvmlDeviceGetPowerManagementLimit")),
        "power_default_w": _scaled(ask("nvmlDeviceGetPowerManagementDefaultLimit")),
        "temperature_c": ask("nvmlDeviceGetTemperature", 0),
        # Bits of nvml.h: 0x8 hardware slowdown, 0x20 and 0x40 thermal slowdown, 0x80 power brake.
        "thermal_slowdown": None if throttle is None else bool(int(throttle) & 0xE8),
    }


def _ask(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception:  # NVML raises an error of its own for every value that a card does not have
        return None


def _text(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _scaled(milliwatts: Any) -> float | None:
    return None if milliwatts is None else milliwatts / 1000
