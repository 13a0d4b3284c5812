"""Machines in words: `gpu=rtx4070ti,cpu=7900x,ram=ddr5-6000x2:96GiB,link=pcie4x8`, presets, and files.

The grammar (docs/cost-model.md, "Describing a machine"):

    machine = preset [":" pairs] | pairs | file | calibration ["@" model] | "this"
    pairs   = key "=" value {"," key "=" value}

Later pairs of a preset replace what it says. Every figure has bounds that no machine comes near; beyond them, for
unknown names and for parts that contradict each other a UsageError says what is wrong and what is known.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hybrimoe.errors import UsageError
from hybrimoe.machine.cpus import FAMILIES
from hybrimoe.machine.machine import SYSTEM_BYTES, Machine
from hybrimoe.machine.parts import Card, Cpu, Link, Ram, find_card, find_cpu, unknown_card

__all__ = ["KEYS", "changed", "describe", "memory_of_kind", "presets"]

_FOLDER = Path(__file__).parent / "presets"
KEYS = {
    "gpu": "cards: rtx3060, 2*rtx3060+rtx3090, rtx3060:8GiB, none",
    "gpus": "number of cards, all like the first",
    "vram": "memory of each card: 8GiB",
    "cpu": "processor: 7900x, i5-12600k, 2*epyc7713, 8-core",
    "cores": "its cores, where the table lacks it or fewer are used",
    "ghz": "its clock with all cores busy",
    "ram": "memory: ddr5-6000x2:96GiB (million transfers a second, channels, size)",
    "link": "PCIe generation and lanes: pcie4, pcie4x8",
    "ram-gbs": "GB/s that reading memory was measured to reach",
    "gpu-gbs": "GB/s that reading a card's memory was measured to reach",
    "link-gbs": "GB/s that copies to a card were measured to reach",
    "disk-gbs": "GB/s of random reads from the model's drive",
    "gpu-peak-gbs": "a card's memory bandwidth by its data sheet",
    "gpu-tflops": "its FP32 TFLOPS by its data sheet",
}
_RAM = re.compile(r"(ddr[345]|lpddr[45]x?)(?:-(\d+))?(?:x(\d+))?")
_LINK = re.compile(r"pcie([1-6])(?:x(1|2|4|8|16))?")
_USUAL_MTS = {
    "ddr3": 1600,
    "ddr4": 3200,
    "ddr5": 5600,
    "lpddr4": 4266,
    "lpddr4x": 4266,
    "lpddr5": 6400,
    "lpddr5x": 7500,
}
_USUAL_RAM_BYTES = 64 << 30
_MOST_CARDS, _MOST_CORES, _MOST_CHANNELS, _MOST_SOCKETS = 1 << 16, 1024, 48, 8
_MTS_RANGE = (200.0, 20_000.0)
_MOST_RAM_BYTES, _MOST_CARD_BYTES = 1 << 50, 1 << 42
_GBS_RANGE = (0.01, 1e5)


def presets() -> dict[str, str]:
    """Names of whole machines, and what they stand for."""
    named: dict[str, str] = json.loads((_FOLDER / "presets.json").read_text(encoding="utf-8"))
    files = {path.stem: json.loads(path.read_text(encoding="utf-8"))["description"] for path in _preset_files()}
    return dict(sorted({**named, **files}.items()))


def _preset_files() -> list[Path]:
    return [path for path in _FOLDER.glob("*.json") if path.stem != "presets"]


def describe(text: str) -> Machine:
    """The machine of a description or a preset. Raises UsageError."""
    name, colon, changes = text.partition(":")
    if "=" in name:
        return _assemble(text, _pairs(text), None)
    machine = _preset(name)
    if not colon or not changes:
        return machine
    return replace(_assemble(text, _pairs(changes), machine), name=text)


def changed(machine: Machine, text: str) -> Machine:
    """The machine with parts replaced, `ram=ddr5-8000x2,link=pcie5`: what was measured on it as a whole is gone. Raises
    UsageError."""
    made = _assemble(text, _pairs(text), machine)
    if "ram" not in text:  # what is free of its memory now
        made = replace(made, ram_bytes=machine.ram_bytes)
    source = "estimated from its parts" if machine.is_measured else machine.source
    return replace(made, name=f"{machine.name}:{text}", source=source)


def _preset(name: str) -> Machine:
    from hybrimoe.machine.files import read_machine

    named: dict[str, str] = json.loads((_FOLDER / "presets.json").read_text(encoding="utf-8"))
    if name in named:
        return replace(_assemble(name, _pairs(named[name]), None), description=named[name], assumed=())
    for path in _preset_files():
        if path.stem == name:
            return read_machine(path)
    known = list(presets())
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise UsageError(
        f"no such machine: '{name}'",
        f"describe it, gpu=rtx3060,cpu=5600x,ram=ddr4-3200x2:32GiB, or take {', '.join(near or known)}",
    )


def _pairs(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        key = key.lower()
        if not equals or not value:
            raise UsageError(f"--machine: '{part}' is not of the form key=value", f"keys: {', '.join(KEYS)}")
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"--machine: '{part}' names no part of a machine", f"{hint}keys: {', '.join(KEYS)}")
        if key in pairs:
            raise UsageError(f"--machine: {key} is given twice", "several cards are written gpu=2*rtx3060+rtx3090")
        pairs[key] = value
    return pairs


def _assemble(text: str, pairs: Mapping[str, str], base: Machine | None) -> Machine:
    assumed: list[str] = list(base.assumed) if base else []
    cards = _cards(pairs, base)
    if not cards:
        for key in ("link", "vram", "gpus", "gpu-gbs", "link-gbs", "gpu-peak-gbs", "gpu-tflops"):
            if key in pairs:
                what = "has no card to link to" if key.startswith("link") else f"has no card, but {key} speaks of one"
                raise UsageError(f"--machine: '{text}' {what}", "name one first: gpu=rtx3060")
    cpu = _cpu(pairs, base, assumed)
    ram = _ram(pairs, base, cpu, assumed)
    link = _link(pairs, base, cards, cpu, assumed) if cards else None
    disk = _gbs(pairs, "disk-gbs")
    given = Machine(
        text, "described by its owner", cpu, ram, cards, link, max(0, ram.n_bytes - SYSTEM_BYTES),
        assumed=tuple(assumed), disk_bytes_per_s=disk,
    )  # fmt: skip
    if base is None:
        return given
    ceiling = base.ceiling_bytes_per_s if "ram" not in pairs and "ram-gbs" not in pairs else None
    return replace(
        given, description=base.description, source=base.source, ceiling_bytes_per_s=ceiling,
        disk_bytes_per_s=disk or base.disk_bytes_per_s,
    )  # fmt: skip


def _cards(pairs: Mapping[str, str], base: Machine | None) -> tuple[Card, ...]:
    cards = base.cards if base else ()
    if "gpu" in pairs:
        cards = () if pairs["gpu"].lower() == "none" else tuple(_gpu(pairs))
    if "gpus" in pairs and cards:
        cards = (cards[0],) * _whole(pairs["gpus"], "gpus", _MOST_CARDS)
    if "vram" in pairs:
        size = _size(pairs["vram"], "vram", _MOST_CARD_BYTES)
        cards = tuple(replace(card, memory_bytes=size) for card in cards)
    if (measured := _gbs(pairs, "gpu-gbs")) is not None:
        cards = tuple(replace(card, measured_bytes_per_s=measured) for card in cards)
    return cards


def _gpu(pairs: Mapping[str, str]) -> list[Card]:
    cards: list[Card] = []
    for part in pairs["gpu"].split("+"):
        count, star, name = part.strip().rpartition("*")
        name, _, size = name.partition(":")
        n = _whole(count, "number of cards", _MOST_CARDS) if star else 1
        memory = _size(size, "gpu", _MOST_CARD_BYTES) if size else None
        if "gpu-peak-gbs" in pairs or "gpu-tflops" in pairs:
            card = _by_data_sheet(name, memory, pairs)
        else:
            card = find_card(name)
        cards += [replace(card, memory_bytes=memory) if memory else card] * n
    return cards


def _by_data_sheet(name: str, memory: int | None, pairs: Mapping[str, str]) -> Card:
    bandwidth = _gbs(pairs, "gpu-peak-gbs")
    tflops = _number(pairs["gpu-tflops"], "gpu-tflops", 0.1, 1e5) if "gpu-tflops" in pairs else None
    try:
        known: Card | None = find_card(name)
    except UsageError:
        known = None
    if known is not None:
        return replace(
            known, bandwidth_bytes_per_s=bandwidth or known.bandwidth_bytes_per_s,
            fp32_flops=tflops * 1e12 if tflops else known.fp32_flops,
        )  # fmt: skip
    if "vram" in pairs:
        memory = _size(pairs["vram"], "vram", _MOST_CARD_BYTES)
    if memory is None or bandwidth is None or tflops is None:
        raise UsageError(
            f"--machine: the data sheet of '{name}' is incomplete",
            f"give memory, bandwidth and rate: gpu={name}:16GiB,gpu-peak-gbs=640,gpu-tflops=48",
        )
    return unknown_card(name, memory, bandwidth, tflops * 1e12)


def _cpu(pairs: Mapping[str, str], base: Machine | None, assumed: list[str]) -> Cpu:
    cores = _whole(pairs["cores"], "cores", _MOST_CORES) if "cores" in pairs else None
    if "cpu" in pairs:
        count, star, name = pairs["cpu"].rpartition("*")
        cpu = find_cpu(name, cores)
        if star:
            cpu = replace(cpu, n_sockets=_whole(count, "sockets", _MOST_SOCKETS))
        if cpu.n_cores > _MOST_CORES:
            raise UsageError(f"--machine: {cpu.n_cores} cores are more than any CPU has", "give those of one socket")
    elif base is not None:
        cpu = base.cpu
        if cores is not None:
            macs = cpu.measured_macs_per_us
            macs = None if macs is None else macs / cpu.n_threads * cores
            cpu = replace(cpu, n_cores=cores, n_efficiency_cores=0, measured_macs_per_us=macs)
    else:
        cpu = find_cpu("unknown", cores)
    if not cpu.is_known or cpu.family == "unknown":
        assumed.append("cpu")
    if "ghz" in pairs:
        cpu = replace(cpu, ghz=_number(pairs["ghz"], "ghz", 0.2, 10))
    return cpu


def _ram(pairs: Mapping[str, str], base: Machine | None, cpu: Cpu, assumed: list[str]) -> Ram:
    ram = base.ram if base else None
    text = pairs.get("ram")
    if text is None and ram is None:
        text = FAMILIES[cpu.family].ram
        assumed.append("ram")
    if text is not None:
        read = memory_of_kind(text)
        if not re.search(r"-\d", text) and "ram" not in assumed:
            assumed.append("ram")
        ram = replace(read, n_bytes=read.n_bytes or (ram.n_bytes if ram else _USUAL_RAM_BYTES))
    assert ram is not None
    if (measured := _gbs(pairs, "ram-gbs")) is not None:
        ram = replace(ram, measured_bytes_per_s=measured)
        assumed[:] = [part for part in assumed if part != "ram"]
    return ram


def memory_of_kind(text: str) -> Ram:
    """`ddr5-6000x2:96GiB`; 0 bytes where no size is given. Raises UsageError."""
    kind, _, size = text.strip().partition(":")
    match = _RAM.fullmatch(kind.lower())
    if match is None:
        raise UsageError(f"--machine: '{text}' is not a kind of memory", "for example ram=ddr5-6000x2:96GiB")
    mts = float(match[2] or _USUAL_MTS[match[1]])
    if not _MTS_RANGE[0] <= mts <= _MTS_RANGE[1]:
        raise UsageError(f"--machine: {mts:.0f} million transfers a second are not a memory's", "such as ddr5-6000")
    channels = _whole(match[3] or "2", "memory channels", _MOST_CHANNELS)
    return Ram(match[1], mts, channels, _size(size, "ram", _MOST_RAM_BYTES) if size else 0)


def _link(
    pairs: Mapping[str, str], base: Machine | None, cards: tuple[Card, ...], cpu: Cpu, assumed: list[str]
) -> Link:
    link = base.link if base else None
    if "link" in pairs:
        match = _LINK.fullmatch(pairs["link"].lower())
        if match is None:
            raise UsageError(f"--machine: unknown link '{pairs['link']}'", "pcie3 to pcie6, with lanes: pcie4x8")
        link = Link(int(match[1]), min(int(match[2] or 16), 16))
    elif link is None:
        link = Link(min(cards[0].design.pcie, cpu.design.pcie), cards[0].lanes, is_known=False)
        assumed.append("link")
    if (measured := _gbs(pairs, "link-gbs")) is not None:
        link = replace(link, measured_bytes_per_s=measured)
        assumed[:] = [part for part in assumed if part != "link"]
    return link


def _number(text: str, name: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"--machine: {name}={text} is not a number", KEYS.get(name, "")) from None
    if not math.isfinite(value) or not least <= value <= most:
        raise UsageError(f"--machine: {name}={text} must be from {least:g} to {most:g}", KEYS.get(name, ""))
    return value


def _whole(text: str, name: str, most: int) -> int:
    if not re.fullmatch(r"\d{1,9}", text.strip()) or not 1 <= int(text) <= most:
        raise UsageError(f"--machine: {name}={text} must be from 1 to {most}", KEYS.get(name, "give a whole number"))
    return int(text)


def _size(text: str, name: str, most: int) -> int:
    from hybrimoe.config import parse_size

    try:
        size = parse_size(text)
    except ValueError as error:
        raise UsageError(f"--machine: {name}: {error}", "a size with its unit, such as 16GiB") from None
    if re.fullmatch(r"\d+", text.strip()) or not 1 << 20 <= size <= most:
        raise UsageError(f"--machine: {name}: {text} is not a memory's size", "give it with its unit, such as 16GiB")
    return int(size)


def _gbs(pairs: Mapping[str, str], key: str) -> float | None:
    if key not in pairs:
        return None
    return _number(re.sub(r"(?i)\s*gb/s$", "", pairs[key]), key, *_GBS_RANGE) * 1e9
