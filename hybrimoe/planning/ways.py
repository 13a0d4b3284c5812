"""The ways in which people place a model in plain llama.cpp, priced: what ours is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrimoe.planning.memory import Needs, PlacedMemory, placed_memory
from hybrimoe.planning.placement import LayerPlacement, Request
from hybrimoe.planning.speed import Speed, SpeedModel

if TYPE_CHECKING:
    from hybrimoe.machine.machine import Machine
    from hybrimoe.planning.work import ModelWork

__all__ = ["Way", "best_way", "price", "usual_ways"]


@dataclass(frozen=True)
class Way:
    """One placement of plain llama.cpp: its flags, what it takes, how fast it is."""

    flags: str
    request: Request
    memory: PlacedMemory
    prefill: Speed
    decode: Speed

    @property
    def fits(self) -> bool:
        return self.memory.fits_vram and self.memory.missing <= 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "flags": self.flags,
            "fits": self.fits,
            "vram_need": self.memory.vram_need,
            "ram_need": self.memory.ram_need,
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
        }


def price(speed: SpeedModel, needs: Needs, request: Request, n_prompt: int) -> Way:
    """Prices what the user typed. Raises UsageError for a malformed `-ot`."""
    place = LayerPlacement.of(speed.work, request if speed.machine.has_card else _without_card(request))
    memory = placed_memory(speed.work, needs, speed.machine, place)
    missing = min(memory.missing, 1.0)
    return Way(
        request.flags(), request, memory,
        speed.stock_prefill(place, n_prompt, missing), speed.stock_decode(place, missing),
    )  # fmt: skip


def _without_card(request: Request) -> Request:
    return Request(0, request.cpu_moe, request.n_cpu_moe, request.overrides)


def usual_ways(speed: SpeedModel, needs: Needs, n_prompt: int) -> Iterator[Way]:
    """Everything on the CPU without a card; else all that fits by whole layers, all experts on the CPU, and the fewest
    layers of experts on the CPU that fit."""
    work, machine = speed.work, speed.machine
    if not machine.has_card:
        yield price(speed, needs, Request(0), n_prompt)
        return
    n = len(work.layers)
    whole = _first(range(n + 1, -1, -1), lambda ngl: Request(ngl), work, needs, machine)
    if whole is not None:
        yield price(speed, needs, whole, n_prompt)
    if whole is None or whole.n_gpu_layers <= n:
        best = _first(range(n + 1), lambda ncmoe: Request(n_cpu_moe=ncmoe), work, needs, machine)
        if best is not None and best.n_cpu_moe:
            yield price(speed, needs, best, n_prompt)
        yield price(speed, needs, Request(cpu_moe=True), n_prompt)


def _first(numbers: range, made: Any, work: ModelWork, needs: Needs, machine: Machine) -> Request | None:
    """The first request of a sequence that fits the cards."""
    for number in numbers:
        request: Request = made(number)
        if placed_memory(work, needs, machine, LayerPlacement.of(work, request)).fits_vram:
            return request
    return None


def best_way(ways: list[Way]) -> Way | None:
    """The fastest in decode of those that fit; None where none does."""
    fitting = [way for way in ways if way.memory.fits_vram]
    return max(fitting, key=lambda way: way.decode.per_s) if fitting else None
