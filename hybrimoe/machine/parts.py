"""The parts of a machine as data sheets give them, found by the names that their owners use."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from functools import cache

from hybrimoe.errors import UsageError
from hybrimoe.machine.cards import ARCHITECTURES, Architecture, CardSheet, all_cards
from hybrimoe.machine.cpus import FAMILIES, CpuSheet, Family, all_cpus, family_of

__all__ = ["Card", "Cpu", "Link", "Ram", "find_card", "find_cpu"]

# Host to device from pinned memory, bytes per second at 16 lanes: PCIe 3 10-12, 4 25, 5 49-53 GB/s in field reports
# (RTX 3090, 4090, 5090); 1 and 2 by their line rates, 6 as twice 5.
LINK_BYTES_PER_S = {1: 3.0e9, 2: 6.0e9, 3: 11.0e9, 4: 25.0e9, 5: 51.0e9, 6: 102e9}
_FULL_WIDTH = 16
_BUS_BYTES = 8  # a memory channel is 64 bits wide
_RECENT = "blackwell"


@dataclass(frozen=True)
class Card:
    """One card. Where they were measured: `measured_bytes_per_s` is what products read, `measured_macs_per_us` what
    they multiply, `step_us` the fixed time of a layer's batch."""

    name: str
    architecture: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    fp32_flops: float
    lanes: int = _FULL_WIDTH
    measured_bytes_per_s: float | None = None
    measured_macs_per_us: float | None = None
    step_us: float | None = None
    is_known: bool = True

    @property
    def design(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    @property
    def int8_macs_per_us(self) -> float:
        """Dense INT8 multiplications per microsecond."""
        return self.fp32_flops * self.design.int8 / 2 / 1e6

    @property
    def fp16_macs_per_us(self) -> float:
        return self.fp32_flops * self.design.fp16 / 2 / 1e6


@dataclass(frozen=True)
class Cpu:
    """`n_sockets` processors with `n_cores` performance and `n_efficiency_cores` cores each. Where they were measured:
    `measured_macs_per_us` of all cores, `step_us` of a layer's batch, `first_us` more for its first expert."""

    name: str
    family: str
    n_cores: int
    n_efficiency_cores: int
    ghz: float
    n_sockets: int = 1
    measured_macs_per_us: float | None = None
    step_us: float | None = None
    first_us: float = 0.0
    is_known: bool = True

    @property
    def design(self) -> Family:
        return FAMILIES[self.family]

    @property
    def isa(self) -> str:
        return self.design.isa

    @property
    def n_threads(self) -> int:
        """What llama.cpp starts by default: one for each performance core (common_cpu_get_num_math)."""
        return self.n_sockets * self.n_cores

    @property
    def speed(self) -> float:
        """Of all threads together, in Zen 3 cores at 1 GHz."""
        return self.n_threads * self.thread_speed

    @property
    def thread_speed(self) -> float:
        """Of one core."""
        return self.ghz * self.design.rate

    @property
    def fabric_bytes_per_s(self) -> float | None:
        """What its chiplets together can read from memory; None where that is no bound."""
        design = self.design
        if not design.ccd_cores:
            return None
        return self.n_sockets * -(-self.n_cores // design.ccd_cores) * design.ccd_gbs * 1e9


@dataclass(frozen=True)
class Ram:
    """Main memory: `mts` million transfers per second on `n_channels` of 64 bits. `measured_bytes_per_s`: what reading
    it reaches, where that was measured."""

    kind: str
    mts: float
    n_channels: int
    n_bytes: int
    measured_bytes_per_s: float | None = None
    is_known: bool = True

    @property
    def peak_bytes_per_s(self) -> float:
        return self.mts * 1e6 * _BUS_BYTES * self.n_channels


@dataclass(frozen=True)
class Link:
    """Between host and card: PCIe generation and lanes, or what copies were measured to reach."""

    generation: int
    n_lanes: int
    measured_bytes_per_s: float | None = None
    is_known: bool = True

    @property
    def bytes_per_s(self) -> float:
        """From pinned memory."""
        return self.measured_bytes_per_s or LINK_BYTES_PER_S[self.generation] * self.n_lanes / _FULL_WIDTH


_BRANDS = re.compile(r"nvidia|geforce|amd|intel|\(r\)|\(tm\)|processor|graphics|\bcpu\b|(?<![\d-])core\b")


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", _BRANDS.sub("", name.lower()))


@cache
def _cards() -> dict[str, CardSheet]:
    found = {_key(sheet.name): sheet for sheet in all_cards()}
    for key, sheet in list(found.items()):
        short = re.sub(r"^(rtxpro|quadrortx|rtx|gtx|rx|arc|radeon)", "", key)
        found.setdefault(short, sheet)
        found.setdefault(f"radeon{key}", sheet)
        found.setdefault(f"radeonpro{key}", sheet)
        found.setdefault(f"radeonaipro{key}", sheet)
        found.setdefault(f"instinct{key}", sheet)
        found.setdefault(f"tesla{key}", sheet)
    return found


@cache
def _cpus() -> dict[str, CpuSheet]:
    found = {_key(sheet.name): sheet for sheet in all_cpus()}
    for key, sheet in list(found.items()):
        found.setdefault(re.sub(r"^(i[3579]|ultra[579]|epyc|threadripper(pro)?|gold|silver|platinum)", "", key), sheet)
        found.setdefault(re.sub(r"^threadripper", "tr", key), sheet)
    return found


def nearest(name: str, known: list[str]) -> str:
    """Known names like this one, as a hint."""
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"known names like it: {', '.join(near)}" if near else "hybrimoe plan --machines lists what is known"


def find_card(name: str) -> Card:
    """A card by name; `12gb` at its end chooses the variant, or sets the memory. Raises UsageError."""
    key = _key(name)
    sheet = _cards().get(key)
    memory = None
    for n_digits in (1, 2, 3):
        match = re.fullmatch(rf"(.+)(\d{{{n_digits}}})gi?b", key)
        if sheet is None and match is not None:
            sheet, memory = _cards().get(match[1]), int(match[2]) << 30
    if sheet is None:
        raise UsageError(
            f"--machine: unknown card '{name}'",
            f"{nearest(key, list(_cards()))}; or give its data sheet: gpu={name}:16GiB,gpu-peak-gbs=640,gpu-tflops=48",
        )
    return Card(
        sheet.name, sheet.architecture, memory or sheet.memory_bytes, sheet.bandwidth_bytes_per_s, sheet.fp32_flops,
        sheet.lanes,
    )  # fmt: skip


def unknown_card(name: str, memory_bytes: int, bandwidth_bytes_per_s: float, fp32_flops: float) -> Card:
    """A card by its data sheet; its matrix units are taken as those of its maker's recent ones."""
    key = _key(name)
    architecture = "rdna3" if key.startswith(("rx", "w7", "mi", "radeon")) else _RECENT
    if key.startswith("arc"):
        architecture = "battlemage"
    return Card(key, architecture, memory_bytes, bandwidth_bytes_per_s, fp32_flops, is_known=False)


def find_cpu(name: str, n_cores: int | None = None) -> Cpu:
    """A processor by name. What the table lacks needs its number of cores, and takes the rest from the family that its
    name belongs to. Raises UsageError."""
    key = re.sub(r"^ryzen[3579](?=\d)", "", _key(name.split("/")[0]))
    key = re.sub(r"^xeon", "", key)
    sheet = _cpus().get(key)
    if sheet is not None:
        cpu = Cpu(sheet.name, sheet.family, sheet.n_cores, sheet.n_efficiency_cores, sheet.ghz)
        if n_cores is None or n_cores == cpu.n_cores + cpu.n_efficiency_cores:
            return cpu
        return replace(cpu, n_cores=n_cores, n_efficiency_cores=0)
    family = family_of(key)
    if n_cores is None and (match := re.fullmatch(r"(\d{1,3})cores?", key)):
        n_cores = int(match[1])
    if n_cores is None:
        if family == "unknown":
            n_cores = 8
        else:
            hint = nearest(key, list(_cpus()))
            raise UsageError(f"--machine: unknown CPU '{name}'", f"{hint}; or give its cores: cpu={name},cores=8")
    return Cpu(name, family or "unknown", n_cores, 0, FAMILIES[family or "unknown"].ghz, is_known=family != "unknown")
