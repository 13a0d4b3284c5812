"""The whole plan of one model on one machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hybrimoe.gguf_header import GGML_TYPES
from hybrimoe.machine.costs import CostTable
from hybrimoe.machine.machine import Machine
from hybrimoe.planning.context import choose_context
from hybrimoe.planning.memory import MemoryPlan, Needs, Setting, measure_needs, plan_memory
from hybrimoe.planning.placement import Request
from hybrimoe.planning.speed import Speed, SpeedModel
from hybrimoe.planning.ways import Way, best_way, price, usual_ways
from hybrimoe.planning.work import ModelWork, moe_layers

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel

# Quantisations worth changing to, and how much smaller the next one must be to be worth a line.
_QUANTS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ2_XXS")
_SMALLER_QUANT = 0.85
_LEAST_GAIN = 1.02
_CLEARLY = 1.02


@dataclass(frozen=True)
class Asked:
    """What speeds are asked for: `request` places plain llama.cpp, `depth` tokens are in the context already, a prompt
    has `n_prompt` tokens (0: one batch), `n_parallel` slots share the context."""

    request: Request = field(default_factory=Request)
    depth: int = 0
    n_prompt: int = 0
    n_parallel: int = 1


@dataclass(frozen=True)
class Advice:
    """A change of the machine or the setting, and the decode speed it would give."""

    change: str
    decode_per_s: float
    gain: float


@dataclass(frozen=True)
class ModelPlan:
    """What `hybrimoe plan` prints. `stock` is plain llama.cpp as the user places it, else the fastest of `ways`; speeds
    are (prefill, decode). None where it does not run."""

    model: GgufModel
    header_only: bool
    machine: Machine
    setting: Setting
    asked: Asked
    needs: Needs
    memory: MemoryPlan
    context_reason: str
    stock: tuple[Speed, Speed] | None
    ours: tuple[Speed, Speed] | None
    ways: tuple[Way, ...] = ()
    advice: tuple[Advice, ...] = ()

    @property
    def plain_is_faster(self) -> bool:
        """Whether plain llama.cpp is predicted to decode clearly faster, in a placement that fits: with everything on
        the card nothing is left to share, and the plug-in's calls cost."""
        fitting = [way.decode.per_s for way in self.ways if way.fits]
        return self.ours is not None and bool(fitting) and max(fitting) > _CLEARLY * self.ours[1].per_s

    @property
    def flags(self) -> list[str]:
        """Flags of `hybrimoe run` that give this plan."""
        flags = ["-c", str(self.setting.n_ctx)]
        default = Setting()
        for name, flag in (("n_ubatch", "-ub"), ("cache_type_k", "-ctk"), ("cache_type_v", "-ctv")):
            if getattr(self.setting, name) != getattr(default, name):
                flags += [flag, str(getattr(self.setting, name))]
        if self.machine.has_card:
            flags += ["-ngl", "all"]
            if self.memory.cache_bytes:
                flags += ["--expert-cache", f"{self.memory.cache_bytes >> 20}MiB"]
        return flags

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data. Bytes throughout."""
        speeds = {}
        for name, pair in (("stock", self.stock), ("ours", self.ours)):
            speeds[name] = None if pair is None else {"prefill": pair[0].to_dict(), "decode": pair[1].to_dict()}
        layers = moe_layers(self.model)
        return {
            "model": {
                "path": str(self.model.path),
                "name": self.model.name,
                "architecture": self.model.architecture,
                "header_only": self.header_only,
                "n_layers": self.model.n_layers,
                "n_moe_layers": len(layers),
                "n_experts": self.model.n_experts,
                "n_experts_used": self.model.n_experts_used,
                "bytes_per_expert": [layer.bytes_per_expert for layer in layers],
            },
            "machine": self.machine.to_dict(),
            "setting": {**asdict(self.setting), "context_reason": self.context_reason},
            "asked": {
                "placement": self.asked.request.flags(), "depth": self.asked.depth, "n_prompt": self.n_prompt,
                "n_parallel": self.asked.n_parallel,
            },
            "needs": {
                "weight_bytes": self.needs.weight_bytes,
                "expert_bytes": self.needs.expert_bytes,
                "shared_bytes": self.needs.shared_bytes,
                "router_bytes": self.needs.router_bytes,
                "embedding_bytes": self.needs.embedding_bytes,
                "dense_bytes": self.needs.dense_bytes,
                "kv_bytes": self.needs.buffers.kv_bytes,
                "recurrent_bytes": self.needs.buffers.recurrent_bytes,
                "compute_bytes": self.needs.compute_bytes,
                "exact": self.needs.exact,
                "source": self.needs.source,
            },
            "memory": {**asdict(self.memory), "n_slots": list(self.memory.n_slots), "fits": self.memory.fits},
            "speed": speeds,
            "plain_is_faster": self.plain_is_faster,
            "ways": [way.to_dict() for way in self.ways],
            "advice": [asdict(a) for a in self.advice],
            "flags": self.flags,
        }  # fmt: skip

    @property
    def n_prompt(self) -> int:
        return self.asked.n_prompt or self.setting.n_ubatch


def make_plan(
    model: GgufModel, setting: Setting, machine: Machine, asked: Asked | None = None, *, advise: bool = True
) -> ModelPlan:
    """Plans `model` for `machine`; `setting.n_ctx` 0: the default context (`context`).

    Raises ModelError when it has no experts or llama.cpp refuses it, UsageError for a placement that cannot be read.
    """
    model.require_moe()
    asked = asked or Asked()
    if setting.n_ctx:
        setting = setting.of_model(model)
        needs = measure_needs(model, setting)
        memory, reason = plan_memory(model, needs, setting, machine), ""
    else:
        choice = choose_context(model, setting, machine, asked.n_parallel)
        setting, needs, memory, reason = choice.setting, choice.needs, choice.memory, choice.reason
    header_only = any(t.offset + t.n_bytes > _size(t) for t in model.tensors)
    plan = ModelPlan(model, header_only, machine, setting, asked, needs, memory, reason, None, None)
    speed = SpeedModel(ModelWork(model, setting, needs.buffers), machine, asked.depth)
    plan = replace(plan, **_stock(plan, speed))
    if not memory.runs:
        return plan
    slots, missing = memory.n_slots, memory.missing
    plan = replace(plan, ours=(speed.prefill(slots, plan.n_prompt, missing), speed.decode(slots, missing)))
    return replace(plan, advice=tuple(_advice(plan, speed))) if advise and memory.fits else plan


def _stock(plan: ModelPlan, speed: SpeedModel) -> dict[str, Any]:
    """Plain llama.cpp: as the user places it, and in the usual ways."""
    ways = list(usual_ways(speed, plan.needs, plan.n_prompt))
    chosen = best_way(ways)
    if not plan.asked.request.is_default:
        chosen = price(speed, plan.needs, plan.asked.request, plan.n_prompt)
        ways = [chosen, *(way for way in ways if way.flags != chosen.flags)]
    if chosen is None:
        return {"ways": tuple(ways)}
    return {"ways": tuple(ways), "stock": (chosen.prefill, chosen.decode)}


def _size(tensor: Any) -> int:
    try:
        return int(tensor.path.stat().st_size)
    except OSError:
        return 0


def _advice(plan: ModelPlan, speed: SpeedModel) -> list[Advice]:
    """Changes that would help decoding, best first."""
    machine, model, setting = plan.machine, plan.model, plan.setting
    assert plan.ours is not None
    now = plan.ours[1].per_s

    def decode(at: Machine, of: Setting, needs: Needs, room: float = 1.0, dram_factor: float = 1.0) -> float:
        memory = plan_memory(model, needs, of, at)
        slots = [
            min(layer.n_experts, int(n / room)) for n, layer in zip(memory.n_slots, moe_layers(model), strict=True)
        ]
        work = ModelWork(model, of, needs.buffers)
        return SpeedModel(work, at, plan.asked.depth, dram_factor=dram_factor).decode(slots).per_s

    tried: list[tuple[str, float]] = [
        ("twice the RAM channels", decode(_faster_ram(machine, speed), setting, plan.needs, dram_factor=2.0))
    ]
    if (quant := _smaller_quant(model)) is not None:
        text, share = quant
        smaller = replace(machine, table=_scaled(speed.table, expert=share))
        tried.append((text, decode(smaller, setting, plan.needs, share)))
    if machine.has_card:
        faster = replace(machine, table=_scaled(speed.table, link=2.0))
        tried.append(("a link twice as fast", decode(faster, setting, plan.needs)))
        first = replace(machine.cards[0], memory_bytes=machine.cards[0].memory_bytes + (8 << 30))
        more = replace(machine, cards=(first, *machine.cards[1:]))
        tried.append(("8 GiB more card memory", decode(more, setting, plan.needs)))
        if setting.n_ctx >= 8192:
            half = replace(setting, n_ctx=setting.n_ctx // 2)
            buffers = replace(plan.needs.buffers, kv_bytes=plan.needs.buffers.kv_bytes // 2)
            tried.append((f"-c {half.n_ctx}", decode(machine, half, replace(plan.needs, buffers=buffers))))
    found = [Advice(change, per_s, per_s / now) for change, per_s in tried if per_s / now >= _LEAST_GAIN]
    return sorted(found, key=lambda a: -a.gain)


def _faster_ram(machine: Machine, speed: SpeedModel) -> Machine:
    """Twice the memory channels: all that the CPU reads takes half the time at most."""
    if machine.is_measured or machine.table is not None:
        return replace(machine, table=_scaled(speed.table, cpu=2.0))
    ram = machine.ram
    measured = None if ram.measured_bytes_per_s is None else 2 * ram.measured_bytes_per_s
    return replace(machine, ram=replace(ram, n_channels=2 * ram.n_channels, measured_bytes_per_s=measured))


def _scaled(table: CostTable, *, cpu: float = 1.0, link: float = 1.0, expert: float = 1.0) -> CostTable:
    """For other parts: `cpu` and `link` times as fast a memory and link, `expert` times the bytes."""

    def curve(points: tuple[tuple[float, float], ...], factor: float) -> tuple[tuple[float, float], ...]:
        first = points[0][1]
        return tuple((n, max(us - first * (1 - factor), first * factor)) for n, us in points)

    ceiling = table.dram_bytes_per_us
    return replace(
        table,
        classes=tuple(
            replace(
                c,
                expert_bytes=c.expert_bytes * expert,
                cpu=curve(c.cpu, expert / cpu),
                gpu=tuple(curve(g, expert) for g in c.gpu),
            )
            for c in table.classes
        ),
        dram_bytes_per_us=None if ceiling is None else ceiling * cpu,
        devices=tuple(replace(d, bytes_per_us=d.bytes_per_us * link) for d in table.devices),
    )


def _smaller_quant(model: GgufModel) -> tuple[str, float] | None:
    """The next smaller quantisation of the experts, in words, and its bytes as a share of now's."""
    sizes = {t.name: 8 * t.block_bytes / t.block_elems for t in GGML_TYPES.values()}
    n_weights = sum(t.n_elements for layer in moe_layers(model) for t in layer.expert_tensors)
    now = 8 * model.expert_bytes / max(1, n_weights)
    for name in _QUANTS:
        if sizes[name] <= _SMALLER_QUANT * now:
            return f"experts in {name} ({sizes[name]:.1f} instead of {now:.1f} bits per weight)", sizes[name] / now
    return None
