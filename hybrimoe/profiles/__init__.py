"""Machines as files: presets with sources, the user's own, and what they mean for a model's costs.

A machine file says what a machine's parts reach: memory bandwidth of the card, rate of the link, what expert products
read per second on the CPU. `Machine.calibration` turns it into the cost section of a calibration file, as
`Costs.from_calibration` reads it. Every figure that follows is an estimate; a probe of the machine measures instead.

The model of one expert on n tokens is the larger of reading its weights once and computing n tokens (a roofline):
    t(n) = max(bytes / bandwidth, n * macs / rate)
in which bandwidth and rate already hold the shares that kernels reach. Sources of the figures stand in the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import read_text
from hybrimoe.json_text import parse_json

if TYPE_CHECKING:
    from hybrimoe.native.core import Costs

__all__ = ["Cpu", "Gpu", "Link", "Machine", "load", "names"]

_FOLDER = Path(__file__).parent
# Bits per weight of Q4_K, to guess an expert's multiplications from its bytes where nothing better is known.
_GUESSED_BITS = 4.5
# Cards, cores.
_MOST = 1 << 16
# Tokens at which the curves are given; the core draws straight lines between and beyond.
_CURVE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Gpu:
    """A kind of card and how many of it; `bandwidth` and `macs_per_s` are the data sheet's."""

    name: str
    count: int
    vram_bytes: float
    bandwidth_bytes_per_s: float
    bandwidth_efficiency: float
    macs_per_s: float
    compute_efficiency: float
    step_us: float

    @property
    def reached_bytes_per_s(self) -> float:
        """What expert products read per second."""
        return self.bandwidth_bytes_per_s * self.bandwidth_efficiency


@dataclass(frozen=True)
class Link:
    """Between host and card, from pinned memory."""

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    latency_us: float


@dataclass(frozen=True)
class Cpu:
    """`stream_bytes_per_s`: what expert products read; `first_us`: extra of a layer's first CPU expert."""

    name: str
    cores: int
    stream_bytes_per_s: float
    ram_bytes: float
    macs_per_s: float
    step_us: float
    first_us: float


@dataclass(frozen=True)
class Machine:
    """One machine. `gpu` and `link` are None without a card; `shared_dram_bytes_per_s` None: no shared ceiling."""

    name: str
    description: str
    source: str
    gpu: Gpu | None
    link: Link | None
    cpu: Cpu
    shared_dram_bytes_per_s: float | None

    @property
    def n_devices(self) -> int:
        return self.gpu.count if self.gpu else 0

    def calibration(self, expert_bytes: Sequence[float], expert_macs: Sequence[float] | None = None) -> dict[str, Any]:
        """The cost section of a calibration for a model on this machine.

        Args:
            expert_bytes: [n_layers] bytes of one expert of each MoE layer.
            expert_macs: [n_layers] multiplications per token of one expert (n_embd x n_ff x 3 with a gate); None: as
                many as it has weights at 4.5 bits.
        """
        macs = [8 * b / _GUESSED_BITS for b in expert_bytes] if expert_macs is None else list(expert_macs)
        shapes = list(zip(map(float, expert_bytes), macs, strict=True))
        kinds = list(dict.fromkeys(shapes))
        return {
            "name": self.name,
            "source": self.source,
            "estimated": True,
            "layer_class": [kinds.index(shape) for shape in shapes],
            "classes": [self._layer_class(n_bytes, n_macs) for n_bytes, n_macs in kinds],
            "cpu_step_us": self.cpu.step_us,
            "dram_bytes_per_us": None if self.shared_dram_bytes_per_s is None else self.shared_dram_bytes_per_s / 1e6,
            "devices": [
                {
                    "latency_us": self.link.latency_us,
                    "bytes_per_us": self.link.h2d_bytes_per_s / 1e6,
                    "step_us": self.gpu.step_us,
                }
                for _ in range(self.n_devices)
                if self.gpu and self.link
            ],
        }

    def costs(self, expert_bytes: Sequence[float], expert_macs: Sequence[float] | None = None) -> Costs:
        """The cost model of a model on this machine; arguments as of `calibration`."""
        from hybrimoe.native.core import Costs

        return Costs.from_calibration(self.calibration(expert_bytes, expert_macs))

    def gap_us(self, dense_bytes: float, n_layers: int) -> float:
        """Time from the end of one layer's experts to the next layer's: attention and all else that is no expert.

        An estimate for decoding: the dense weights are read once per token, where they are (on the card if there is
        one), spread evenly over the layers; the KV cache is left out.
        """
        rate = self.gpu.reached_bytes_per_s if self.gpu else self.cpu.stream_bytes_per_s
        step_us = self.gpu.step_us if self.gpu else self.cpu.step_us
        return dense_bytes / max(1, n_layers) / rate * 1e6 + step_us

    def _layer_class(self, n_bytes: float, n_macs: float) -> dict[str, Any]:
        cpu = _roofline(n_bytes, n_macs, self.cpu.stream_bytes_per_s, self.cpu.macs_per_s)
        gpu = []
        if self.gpu:
            rate = self.gpu.macs_per_s * self.gpu.compute_efficiency
            gpu = [_roofline(n_bytes, n_macs, self.gpu.reached_bytes_per_s, rate)] * self.gpu.count
        return {"expert_bytes": n_bytes, "cpu": cpu, "cpu_first_us": self.cpu.first_us, "gpu": gpu}


def _roofline(n_bytes: float, n_macs: float, bytes_per_s: float, macs_per_s: float) -> dict[str, Any]:
    read_us = n_bytes / bytes_per_s * 1e6
    return {"points": [[n, max(read_us, n * n_macs / macs_per_s * 1e6)] for n in _CURVE_TOKENS]}


def names() -> list[str]:
    """Presets that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load(text: str | Path) -> Machine:
    """A machine by preset name or file, with parts replaced after a colon.

    `rtx4090-pcie4-ddr5:link=pcie3,ram=ddr4,gpu=rtx3060,gpus=2,vram=16GiB,cores=6` replaces link, memory, card,
    the number of cards, a card's memory and the number of cores.

    Raises:
        UsageError: there is no such preset, file or part, or the file is no machine.
    """
    name, colon, changes = str(text).partition(":")
    if Path(text).is_file():
        return _read(Path(text))
    path = Path(name) if name.endswith(".json") else _FOLDER / f"{name}.json"
    if not path.is_file():
        raise UsageError(f"no such machine: '{name}'", f"known are {', '.join(names())}, or give a file")
    machine = _read(path)
    for change in filter(None, changes.split(",")):
        machine = _changed(machine, change)
    return replace(machine, name=f"{machine.name}:{changes}") if colon and changes else machine


def _read(path: Path) -> Machine:
    hint = "see docs/simulate.md for what a machine file holds"
    try:
        data = parse_json(read_text(path))
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error
    except ValueError as error:
        raise UsageError(f"'{path}' is no JSON: {error}", hint) from error
    try:
        return _machine(data)
    except KeyError as error:
        raise UsageError(f"the machine file '{path}' lacks {error}", hint) from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"the machine file '{path}' is malformed: {error}", hint) from error


def _machine(data: Mapping[str, Any]) -> Machine:
    ceiling = data["shared_dram_bytes_per_s"]
    return Machine(
        str(data["name"]),
        str(data.get("description", "")),
        str(data["source"]),
        None if data["gpu"] is None else _gpu(data["gpu"]),
        None if data["gpu"] is None else _link(data["link"]),
        _cpu(data["cpu"]),
        None if ceiling is None else _positive(ceiling, "shared_dram_bytes_per_s"),
    )


def _gpu(data: Mapping[str, Any]) -> Gpu:
    fields = ("vram_bytes", "bandwidth_bytes_per_s", "bandwidth_efficiency", "macs_per_s", "compute_efficiency")
    values = {name: _positive(data[name], f"gpu.{name}") for name in fields}
    return Gpu(
        name=str(data["name"]),
        count=_count(data.get("count", 1), "gpu.count"),
        step_us=_positive(data["step_us"], "gpu.step_us", zero=True),
        **values,
    )


def _link(data: Mapping[str, Any]) -> Link:
    return Link(
        _positive(data["h2d_bytes_per_s"], "link.h2d_bytes_per_s"),
        _positive(data["d2h_bytes_per_s"], "link.d2h_bytes_per_s"),
        _positive(data["latency_us"], "link.latency_us", zero=True),
    )


def _cpu(data: Mapping[str, Any]) -> Cpu:
    return Cpu(
        name=str(data["name"]),
        cores=_count(data["cores"], "cpu.cores"),
        stream_bytes_per_s=_positive(data["stream_bytes_per_s"], "cpu.stream_bytes_per_s"),
        ram_bytes=_positive(data["ram_bytes"], "cpu.ram_bytes"),
        macs_per_s=_positive(data["macs_per_s"], "cpu.macs_per_s"),
        step_us=_positive(data["step_us"], "cpu.step_us", zero=True),
        first_us=_positive(data["first_us"], "cpu.first_us", zero=True),
    )


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


_PARTS = "parts: link=pcie3, ram=ddr4, gpu=rtx3060, gpus=2, vram=16GiB, cores=8"


def _changed(machine: Machine, change: str) -> Machine:
    """The machine with one part replaced; `change` is `part=value`."""
    part, _, value = change.partition("=")
    parts = json.loads((_FOLDER / "parts" / "parts.json").read_text(encoding="utf-8"))
    if part in ("link", "ram", "gpu"):
        if value not in parts[part]:
            raise UsageError(f"unknown {part} '{value}'", f"known are {', '.join(parts[part])}")
        data = parts[part][value]
        if part == "ram":
            cpu = replace(machine.cpu, stream_bytes_per_s=data["stream_bytes_per_s"])
            return replace(machine, cpu=cpu, shared_dram_bytes_per_s=data["shared_dram_bytes_per_s"])
        if part == "gpu":
            return replace(machine, gpu=_gpu(data), link=machine.link or _link(parts["link"]["pcie4"]))
        if machine.gpu is None:
            raise UsageError(f"'{machine.name}' has no card to link to", "give one first, such as gpu=rtx3060")
        return replace(machine, link=_link(data))
    try:
        if part == "cores":
            per_core = machine.cpu.macs_per_s / machine.cpu.cores
            cores = int(_positive(value, part))
            return replace(machine, cpu=replace(machine.cpu, cores=cores, macs_per_s=per_core * cores))
        if part == "gpus" and machine.gpu is not None:
            return replace(machine, gpu=replace(machine.gpu, count=_count(value, part)))
        if part == "vram" and machine.gpu is not None:
            from hybrimoe.config import parse_size

            return replace(machine, gpu=replace(machine.gpu, vram_bytes=_positive(parse_size(value), part)))
    except ValueError as error:
        raise UsageError(f"'{change}' cannot replace a part of '{machine.name}': {error}", _PARTS) from error
    raise UsageError(f"'{change}' names no part of '{machine.name}'", _PARTS)
