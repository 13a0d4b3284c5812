"""The whole plan of one model on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hybrimoe.gguf_header import GGML_TYPES
from hybrimoe.planning.machines import PlanMachine, moe_layers
from hybrimoe.planning.memory import MemoryPlan, Needs, Setting, measure_needs, plan_memory
from hybrimoe.planning.speed import Speed, SpeedModel, scaled

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel

# Quantisations worth changing to, and how much smaller the next one must be to be worth a line.
_QUANTS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ2_XXS")
_SMALLER_QUANT = 0.85
_LEAST_GAIN = 1.02


@dataclass(frozen=True)
class Advice:
    """A change of the machine or the setting, and the decode speed it would give."""

    change: str
    decode_per_s: float
    gain: float


@dataclass(frozen=True)
class ModelPlan:
    """What `hybrimoe plan` prints. Speeds are None where nothing is known about the machine's speed."""

    model: GgufModel
    header_only: bool
    machine: PlanMachine
    setting: Setting
    needs: Needs
    memory: MemoryPlan
    stock: tuple[Speed, Speed] | None
    ours: tuple[Speed, Speed] | None
    advice: tuple[Advice, ...]

    @property
    def flags(self) -> list[str]:
        """Flags of `hybrimoe run` that give this plan."""
        flags = ["-c", str(self.setting.n_ctx)]
        default = Setting()
        for name, flag in (("n_ubatch", "-ub"), ("cache_type_k", "-ctk"), ("cache_type_v", "-ctv")):
            if getattr(self.setting, name) != getattr(default, name):
                flags += [flag, str(getattr(self.setting, name))]
        if self.machine.has_gpu:
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
            "machine": {
                "name": self.machine.name,
                "source": self.machine.source,
                "measured": self.machine.measured,
                "ram_bytes": self.machine.ram_bytes,
                "vram_bytes": list(self.machine.vram_bytes),
                "gpu": self.machine.gpu_name,
            },
            "setting": asdict(self.setting),
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
            "advice": [asdict(a) for a in self.advice],
            "flags": self.flags,
        }


def make_plan(model: GgufModel, setting: Setting, machine: PlanMachine) -> ModelPlan:
    """Plans `model` for `machine`. Raises ModelError when it has no experts or llama.cpp refuses it."""
    model.require_moe()
    setting = setting.of_model(model)
    needs = measure_needs(model, setting)
    memory = plan_memory(model, needs, setting, machine)
    header_only = any(t.offset + t.n_bytes > _size(t) for t in model.tensors)
    section = machine.costs_of(model)
    plan = ModelPlan(model, header_only, machine, setting, needs, memory, None, None, ())
    if section is None or not memory.fits:
        return plan
    speed = SpeedModel(model, needs, setting, machine, section)
    slots = memory.n_slots
    ours = (speed.prefill(slots), speed.decode(slots))
    stock = (speed.prefill(slots, stock=True), speed.decode(slots, stock=True))
    plan = replace(plan, ours=ours, stock=stock)
    return replace(plan, advice=tuple(_advice(plan, section)))


def _size(tensor: Any) -> int:
    try:
        return int(tensor.path.stat().st_size)
    except OSError:
        return 0


def _advice(plan: ModelPlan, section: Mapping[str, Any]) -> list[Advice]:
    """Changes that would help decoding, best first."""
    machine, model, setting = plan.machine, plan.model, plan.setting
    assert plan.ours is not None
    now = plan.ours[1].per_s

    def decode(changed: Mapping[str, Any], at: PlanMachine, of: Setting, needs: Needs, room: float = 1.0) -> float:
        memory = plan_memory(model, needs, of, at)
        slots = [
            min(layer.n_experts, int(n / room)) for n, layer in zip(memory.n_slots, moe_layers(model), strict=True)
        ]
        return SpeedModel(model, needs, of, at, changed).decode(slots).per_s

    tried: list[tuple[str, float]] = []
    faster = machine if machine.has_gpu else replace(machine, dense_bytes_per_us=2 * machine.dense_bytes_per_us)
    tried.append(
        ("twice the RAM channels", decode(scaled(section, cpu=2.0), faster, setting, plan.needs)),
    )
    if (quant := _smaller_quant(model)) is not None:
        text, share = quant
        tried.append((text, decode(scaled(section, expert=share), machine, setting, plan.needs, share)))
    if machine.has_gpu:
        tried.append(("a link twice as fast", decode(scaled(section, link=2.0), machine, setting, plan.needs)))
        more = replace(machine, vram_bytes=(machine.vram_bytes[0] + (8 << 30), *machine.vram_bytes[1:]))
        tried.append(("8 GiB more card memory", decode(section, more, setting, plan.needs)))
        if setting.n_ctx >= 8192:
            half = replace(setting, n_ctx=setting.n_ctx // 2)
            buffers = replace(plan.needs.buffers, kv_bytes=plan.needs.buffers.kv_bytes // 2)
            tried.append((f"-c {half.n_ctx}", decode(section, machine, half, replace(plan.needs, buffers=buffers))))
    found = [Advice(change, per_s, per_s / now) for change, per_s in tried if per_s / now >= _LEAST_GAIN]
    return sorted(found, key=lambda a: -a.gain)


def _smaller_quant(model: GgufModel) -> tuple[str, float] | None:
    """The next smaller quantisation of the experts, in words, and its bytes as a share of now's."""
    sizes = {t.name: 8 * t.block_bytes / t.block_elems for t in GGML_TYPES.values()}
    n_weights = sum(t.n_elements for layer in moe_layers(model) for t in layer.expert_tensors)
    now = 8 * model.expert_bytes / max(1, n_weights)
    for name in _QUANTS:
        if sizes[name] <= _SMALLER_QUANT * now:
            return f"experts in {name} ({sizes[name]:.1f} instead of {now:.1f} bits per weight)", sizes[name] / now
    return None
