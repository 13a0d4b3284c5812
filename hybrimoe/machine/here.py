"""This machine: its parts by their names, what is free now, and a probe's calibration where there is one."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from hybrimoe.errors import UsageError
from hybrimoe.machine import host, parts
from hybrimoe.machine.cpus import FAMILIES
from hybrimoe.machine.describe import memory_of_kind
from hybrimoe.machine.machine import Machine

if TYPE_CHECKING:
    from hybrimoe.calibration import Calibration

__all__ = ["local_cards", "this_machine"]

_GPU, _INTEGRATED_GPU = 1, 2  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
# A card that no table knows is taken as a middling one of its size: GB/s and FP32 TFLOPS for each GiB.
_GBS_PER_GIB, _TFLOPS_PER_GIB = 40.0, 2.0
_LEVELS = {"AVX-512 VNNI": "zen4", "AVX-512": "skylake-x", "AVX-VNNI": "alderlake", "AVX2": "zen3", "NEON": "altra"}


def this_machine(calibration: Calibration | None = None) -> Machine:
    """This machine as it is now. Without a calibration its speeds are estimates from its parts' names, and what the
    system does not tell (the kind of its memory) is assumed."""
    memory = host.memory()
    assumed = ["ram"]
    cpu = _cpu(assumed)
    cards = tuple(_card(name, n_bytes, assumed) for name, n_bytes in local_cards())
    ram = replace(memory_of_kind(FAMILIES[cpu.family].ram), n_bytes=memory.total_bytes, is_known=False)
    link = None
    if cards:
        assumed.append("link")
        generation = min(cards[0].design.pcie, cpu.design.pcie)
        link = parts.Link(generation, cards[0].lanes, is_known=False)
    return Machine(
        "this machine",
        "not probed" if calibration is None else calibration.describe(),
        cpu, ram, cards, link, memory.available_bytes,
        assumed=tuple(dict.fromkeys(assumed)), calibration=calibration,
    )  # fmt: skip


def _cpu(assumed: list[str]) -> parts.Cpu:
    seen = host.cpu()
    name = re.sub(r"\s+(@.*|\d+-core.*|with .*)$", "", seen.name, flags=re.IGNORECASE)
    try:
        cpu = parts.find_cpu(name, seen.n_cores)
    except UsageError:
        cpu = parts.find_cpu("unknown", seen.n_cores)
    if cpu.family == "unknown":
        assumed.append("cpu")
        family = _LEVELS.get(seen.level, "ivybridge-xeon")
        cpu = replace(cpu, family=family, ghz=FAMILIES[family].ghz)
    return replace(cpu, name=seen.name)


def _card(name: str, n_bytes: int, assumed: list[str]) -> parts.Card:
    """The card with what is free of its memory now."""
    try:
        return replace(parts.find_card(name), name=name, memory_bytes=n_bytes)
    except UsageError:
        assumed.append("gpu")
        gib = max(1.0, n_bytes / 2**30)
        card = parts.unknown_card(name, n_bytes, gib * _GBS_PER_GIB * 1e9, gib * _TFLOPS_PER_GIB * 1e12)
        return replace(card, name=name)


def local_cards() -> list[tuple[str, int]]:
    """(description, free bytes) of the GPUs that this llama.cpp can use, integrated ones too."""
    from hybrimoe.native.plugin import ggml_library

    ggml = ggml_library()
    # void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total)
    size_p = ctypes.POINTER(ctypes.c_size_t)
    ggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size_p, size_p]
    ggml.ggml_backend_dev_memory.restype = None
    cards = []
    for index in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(index)
        if ggml.ggml_backend_dev_type(device) in (_GPU, _INTEGRATED_GPU):
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            cards.append((ggml.ggml_backend_dev_description(device).decode("utf-8", "replace"), int(free.value)))
    return cards
