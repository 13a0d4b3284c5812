"""Opening a machine by whatever names it: a description, a preset, a file of measured parts, a calibration, `this`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import read_text
from hybrimoe.json_text import parse_json
from hybrimoe.machine.machine import SYSTEM_BYTES, Machine, from_section
from hybrimoe.machine.parts import Card, Cpu, Link, Ram

__all__ = ["THIS_MACHINE", "open_machine", "read_machine", "with_model"]

THIS_MACHINE = "this"
_MOST = 1 << 16  # cards, cores


def open_machine(text: str) -> Machine:
    """A description, a preset, a machine file, a cost section, or a probe's calibration (`this`: this machine's).

    A calibration holds curves per shape of expert, so it needs the model file: `calibration.json@model.gguf`.

    Raises:
        UsageError: it is none of these, or a calibration without a model.
        HybrimoeError: the calibration is missing, damaged, or was changed by hand.
    """
    from hybrimoe.machine.describe import changed, describe

    file, colon, changes = text.partition(":")
    if colon and file.endswith(".json") and _exists(Path(file)):
        return replace(changed(read_machine(Path(file)), changes), name=text)
    name, _, model = text.partition("@")
    path = _calibration_path() if name == THIS_MACHINE else Path(name)
    if name != THIS_MACHINE and not _exists(path):
        if name.endswith(".json") and "=" not in name:
            raise UsageError(f"no such machine: there is no file '{name}'", "hybrimoe plan --machines")
        return describe(text)
    data = _read_json(path) if _exists(path) else {"fit": {}}
    if "fit" in data:
        return _of_probe(name, path, model)
    section = data.get("costs", data)
    if isinstance(section, dict) and "classes" in section:
        return from_section(path.stem, section)
    return read_machine(path)


def with_model(text: str, model: Path | None) -> str:
    """The machine's text with the model that a probe's calibration needs; others stay as they are."""
    path = Path(text)
    is_probe = text == THIS_MACHINE or (_exists(path) and "fit" in _read_json(path))
    return f"{text}@{model}" if is_probe and model is not None else text


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name
        return False


def _calibration_path() -> Path:
    from hybrimoe.calibration import default_path

    return default_path()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(read_text(path))
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error
    except ValueError as error:
        raise UsageError(f"'{path}' is no JSON: {error}", "a machine or calibration file is expected") from error
    return data if isinstance(data, dict) else {}


def _of_probe(name: str, path: Path, model: str) -> Machine:
    from hybrimoe.calibration import load
    from hybrimoe.gguf_model import inspect

    calibration = load(path)
    if not model:
        raise UsageError(f"the calibration '{name}' needs the model whose experts it prices", "give it with -m MODEL")
    info = inspect(Path(model)).require_moe()
    section = calibration.cost_section(info)
    n_layers = len(section["layer_class"])
    gap_us = info.dense_bytes / n_layers / calibration.dense_bytes_per_us() + calibration.step_us()
    return from_section(name, {**section, "gap_us": gap_us})


def read_machine(path: Path) -> Machine:
    """A file of a machine's parts as they were measured (docs/simulate.md). Raises UsageError, HybrimoeError."""
    hint = "see docs/simulate.md for what a machine file holds"
    data = _read_json(path)
    try:
        return _machine(data)
    except KeyError as error:
        raise UsageError(f"the machine file '{path}' lacks {error}", hint) from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"the machine file '{path}' is malformed: {error}", hint) from error


def _machine(data: Mapping[str, Any]) -> Machine:
    ceiling = data["shared_dram_bytes_per_s"]
    cpu = data["cpu"]
    ram_bytes = int(_positive(cpu["ram_bytes"], "cpu.ram_bytes"))
    n_cores = _count(cpu["cores"], "cpu.cores")
    stream = _positive(cpu["stream_bytes_per_s"], "cpu.stream_bytes_per_s")
    return Machine(
        str(data["name"]),
        str(data["source"]),
        Cpu(
            str(cpu["name"]), "unknown", n_cores, 0, 4.0,
            measured_macs_per_us=_positive(cpu["macs_per_s"], "cpu.macs_per_s") / 1e6,
            step_us=_positive(cpu["step_us"], "cpu.step_us", zero=True),
            first_us=_positive(cpu["first_us"], "cpu.first_us", zero=True),
        ),
        Ram("measured", 0.0, 2, ram_bytes, stream),
        () if data["gpu"] is None else _cards(data["gpu"]),
        None if data["gpu"] is None else _link(data["link"]),
        max(0, ram_bytes - SYSTEM_BYTES),
        description=str(data.get("description", "")),
        ceiling_bytes_per_s=math.inf if ceiling is None else _positive(ceiling, "shared_dram_bytes_per_s"),
    )  # fmt: skip


def _cards(data: Mapping[str, Any]) -> tuple[Card, ...]:
    fields = ("vram_bytes", "bandwidth_bytes_per_s", "bandwidth_efficiency", "macs_per_s", "compute_efficiency")
    v = {name: _positive(data[name], f"gpu.{name}") for name in fields}
    card = Card(
        str(data["name"]), "ampere", int(v["vram_bytes"]), v["bandwidth_bytes_per_s"], 2 * v["macs_per_s"],
        measured_bytes_per_s=v["bandwidth_bytes_per_s"] * v["bandwidth_efficiency"],
        measured_macs_per_us=v["macs_per_s"] * v["compute_efficiency"] / 1e6,
        step_us=_positive(data["step_us"], "gpu.step_us", zero=True),
    )  # fmt: skip
    return (card,) * _count(data.get("count", 1), "gpu.count")


def _link(data: Mapping[str, Any]) -> Link:
    rate = _positive(data["h2d_bytes_per_s"], "link.h2d_bytes_per_s")
    _positive(data["d2h_bytes_per_s"], "link.d2h_bytes_per_s")
    _positive(data["latency_us"], "link.latency_us", zero=True)
    return Link(4, 16, rate)


def _count(value: Any, name: str) -> int:
    number = int(value)
    if not 1 <= number <= _MOST:
        raise ValueError(f"{name} = {value} must be from 1 to {_MOST}")
    return number


def _positive(value: Any, name: str, *, zero: bool = False) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} = {value} must be finite and {'at least' if zero else 'above'} 0")
    return number
