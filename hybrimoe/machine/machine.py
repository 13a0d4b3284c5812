"""One concept of a machine: its parts, what is known about them, and what a model's work costs on it.

`plan`, `simulate` and the engine's start see machines through this class alone, whether they were described
(`describe`), read from a file (`files`), or probed (`calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import UsageError
from hybrimoe.machine import rates
from hybrimoe.machine.constants import CONSTANTS
from hybrimoe.machine.costs import CostTable, Device, ExpertClass, layer_classes
from hybrimoe.machine.parts import Card, Cpu, Link, Ram
from hybrimoe.machine.rates import ExpertShape

if TYPE_CHECKING:
    from hybrimoe.calibration import Calibration
    from hybrimoe.gguf_model import GgufModel
    from hybrimoe.trace.format import ModelIdentity

__all__ = ["Machine", "expert_shapes"]

# Reads and copies at once reach a little more than reads alone: 44-45 against 37-38 GB/s (DDR4-3200), 39-41 against 40
# (i7-13620H), both reported from the field.
_CEILING_OVER_READS = 1.1
# Graph nodes of one layer beside its experts, where no graph is known (a trace): 50 to 100 by architecture.
_USUAL_NODES = 60
# Of a machine that is described: what the system and other programs keep.
SYSTEM_BYTES = 2 << 30


@dataclass(frozen=True)
class Machine:
    """A machine. `ram_bytes` is what a model may take of main memory, `card_bytes` of each card (as it is now, for this
    machine). `assumed` names what its owner did not say. `calibration` is a probe's outcome on this machine;
    `table` a cost table for one model, with `table_gap_us`, which then stands for all parts.
    """

    name: str
    source: str
    cpu: Cpu
    ram: Ram
    cards: tuple[Card, ...] = ()
    link: Link | None = None
    ram_bytes: int = 0
    description: str = ""
    assumed: tuple[str, ...] = ()
    disk_bytes_per_s: float | None = None
    ceiling_bytes_per_s: float | None = None
    calibration: Calibration | None = None
    table: CostTable | None = None
    table_gap_us: float | None = None

    @property
    def has_card(self) -> bool:
        return bool(self.cards)

    @property
    def card_bytes(self) -> tuple[int, ...]:
        return tuple(card.memory_bytes for card in self.cards)

    @property
    def cards_text(self) -> str:
        """`2 x rtx3060 + rtx3090`."""
        names = [card.name for card in self.cards]
        counts = {name: names.count(name) for name in names}
        return " + ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.items())

    @property
    def is_measured(self) -> bool:
        """Whether speeds come from a probe."""
        return self.calibration is not None

    @property
    def disk_rate(self) -> float:
        """Bytes per microsecond of random reads from the disk."""
        if self.calibration is not None:
            measured = self.calibration.fit.get("disk_bytes_per_us")
            if measured:
                return float(measured)
        return (self.disk_bytes_per_s or CONSTANTS.disk_bytes_per_s) / 1e6

    def costs(self, model: GgufModel | ModelIdentity) -> CostTable:
        """The cost table of a model's experts. Raises UsageError for a trace that says too little, CalibrationError."""
        if self.table is not None:
            n_layers, n_theirs = len(self.table.layer_class), _n_layers(model)
            if n_layers != n_theirs:
                raise UsageError(
                    f"the calibration '{self.name}' is for {n_layers} MoE layers, '{model.name}' has {n_theirs}",
                    "use a calibration of this model, or a machine: hybrimoe simulate --machines",
                )
            return self.table
        if self.calibration is not None:
            return CostTable.from_json(self.calibration.cost_section(model))  # type: ignore[arg-type]
        return self.price(expert_shapes(model))

    def price(self, shapes: Sequence[ExpertShape]) -> CostTable:
        """The cost table of [n_layers] experts on these parts."""
        kinds, layer_class = layer_classes(shapes)
        cpu, ram = self.cpu, self.ram
        step_us = rates.handover_us(cpu) if self.cards else rates.cpu_nodes_us(CONSTANTS.expert_nodes, cpu)
        ceiling = self.ceiling_bytes_per_s or rates.dram_bytes_per_us(cpu, ram) * 1e6 * _CEILING_OVER_READS
        return CostTable(
            layer_class,
            tuple(
                ExpertClass(
                    shape.n_bytes,
                    rates.curve(rates.cpu_expert_us(shape, n, cpu, ram) for n in rates.shape_tokens()),
                    cpu.first_us,
                    tuple(
                        rates.curve(rates.card_expert_us(shape, n, card) for n in rates.shape_tokens())
                        for card in self.cards
                    ),
                )
                for shape in kinds
            ),
            cpu.step_us if cpu.step_us is not None else step_us,
            None if math.isinf(ceiling) else ceiling / 1e6,
            tuple(self._device(card) for card in self.cards),
        )

    def _device(self, card: Card) -> Device:
        assert self.link is not None
        step_us = card.step_us
        if step_us is None:
            step_us = rates.card_nodes_us(CONSTANTS.expert_nodes, card, self.cpu, split=True)
        return Device(CONSTANTS.copy_latency_us, self.link_bytes_per_us(pinned=False), step_us)

    def link_bytes_per_us(self, *, pinned: bool) -> float:
        assert self.link is not None
        return rates.link_bytes_per_us(self.link, self.cpu, self.ram, pinned=pinned)

    def gap_us(self, model: ModelIdentity) -> float | None:
        """Time from the end of one layer's experts to the next layer's, of which a trace knows only the dense bytes;
        None where it does not."""
        if self.table is not None:
            return self.table_gap_us
        if not model.dense_bytes:
            return None
        n_layers = max(1, model.n_layers)
        if self.calibration is not None:
            per_layer = model.dense_bytes / n_layers / self.calibration.dense_bytes_per_us()
            return per_layer + self.calibration.step_us()
        if self.cards:
            card = self.cards[0]
            nodes = card.step_us
            if nodes is None:
                nodes = rates.card_nodes_us(_USUAL_NODES, card, self.cpu, split=True)
            return model.dense_bytes / n_layers / rates.card_bytes_per_us(card) + nodes
        step = self.cpu.step_us if self.cpu.step_us is not None else rates.cpu_nodes_us(_USUAL_NODES, self.cpu)
        return model.dense_bytes / n_layers / rates.dram_bytes_per_us(self.cpu, self.ram) + step

    def budget_bytes(self, model: ModelIdentity) -> float | None:
        """What `--expert-cache auto` may take in a simulation: the cards' memory less dense weights and a tenth for all
        else; None without a card, or where the trace does not know the dense weights."""
        if not self.cards or self.table is not None or not model.dense_bytes:
            return None
        return max(0.0, 0.9 * sum(self.card_bytes) - model.dense_bytes)

    def without_cards(self) -> Machine:
        return replace(self, cards=(), link=None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data: bytes, bytes per second."""
        return {
            "name": self.name,
            "source": self.source,
            "measured": self.is_measured,
            "assumed": list(self.assumed),
            "ram_bytes": self.ram_bytes,
            "vram_bytes": list(self.card_bytes),
            "gpu": self.cards_text,
            "cpu": {"name": self.cpu.name, "family": self.cpu.design.title, "n_cores": self.cpu.n_threads},
            "ram": {"kind": self.ram.kind, "mts": self.ram.mts, "n_channels": self.ram.n_channels,
                    "peak_bytes_per_s": self.ram.peak_bytes_per_s},
            "link_bytes_per_s": None if self.link is None else self.link.bytes_per_s,
        }  # fmt: skip


def _n_layers(model: GgufModel | ModelIdentity) -> int:
    from hybrimoe.gguf_model import GgufModel

    return len(expert_shapes(model)) if isinstance(model, GgufModel) else model.n_layers


def expert_shapes(model: GgufModel | ModelIdentity) -> list[ExpertShape]:
    """[n_layers] one expert of each MoE layer that decoding runs. Raises UsageError for a trace without bytes."""
    from hybrimoe.gguf_model import GgufModel

    if isinstance(model, GgufModel):
        return [ExpertShape.of_layer(layer) for layer in model.moe_layers if not layer.predicts_ahead]
    if not model.knows_bytes:
        raise UsageError(
            f"--machine needs the bytes of an expert, and the trace of '{model.name}' does not know them",
            "import it with --expert-bytes SIZE",
        )
    macs: Sequence[float | None] = [None] * model.n_layers
    if model.expert_macs and min(model.expert_macs) > 0:
        macs = list(model.expert_macs)
    return [ExpertShape.of_bytes(float(b), m) for b, m in zip(model.expert_bytes, macs, strict=True)]


def from_section(name: str, data: Mapping[str, Any]) -> Machine:
    """A machine of which only a cost section is known, as a calibration or a trace holds it. Raises UsageError."""
    table = CostTable.from_json(data)
    gap = data.get("gap_us")
    cpu = Cpu(name, "unknown", 1, 0, 1.0, is_known=False)
    return Machine(
        name, "a cost section", cpu, Ram("unknown", 0, 1, 0, is_known=False), table=table,
        table_gap_us=None if gap is None else float(gap),
    )  # fmt: skip
