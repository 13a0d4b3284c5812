"""Where a model's bytes go, and whether they fit: the one rule of `plan`, `run`, `chat` and `serve`.

Main memory that can be had is what the system has available, page cache included, within the limits of control groups
(`machine.host.memory`). Weights are mapped from the file: what does not fit is read from the disk again whenever it is
asked for, so a larger model runs, slowly. The KV cache and buffers are written and must fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hybrimoe.dry_load import Buffers, LoadShape, dry_load
from hybrimoe.errors import HybrimoeError
from hybrimoe.gguf_header import GGML_TYPES
from hybrimoe.machine.machine import Machine
from hybrimoe.planning.work import ModelWork, moe_layers

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel
    from hybrimoe.planning.placement import LayerPlacement

# llama.cpp leaves so much of a card free when it fits a model by itself (`fit_params_target` in common/common.h).
VRAM_MARGIN_BYTES = 1 << 30
# The interpreter and its libraries; with a card also the staging buffers of copies. Assumed.
_PROCESS_BYTES = 256 << 20
_STAGING_BYTES = 256 << 20
_CTX_STEP = 256
_LEAST_CTX = 512
_LOG_STEP = (1 << 20) // 50


@dataclass(frozen=True)
class Setting:
    """What the user asked for; `n_ctx` 0 is the context that the model was trained with."""

    n_ctx: int = 0
    n_batch: int = 2048
    n_ubatch: int = 512
    flash_attn: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"

    def of_model(self, model: GgufModel) -> Setting:
        """With the context that llama.cpp would take, rounded up as it does."""
        n_ctx = self.n_ctx or model.n_ctx_train or 4096
        return replace(self, n_ctx=-(-n_ctx // _CTX_STEP) * _CTX_STEP)

    def load_shape(self) -> LoadShape:
        return LoadShape(
            self.n_ctx, self.n_batch, self.n_ubatch, 0, self.flash_attn, self.cache_type_k, self.cache_type_v
        )


@dataclass(frozen=True)
class Needs:
    """Bytes of everything. `dense_bytes` is all that is on the card where there is one: attention, shared experts,
    dense layers, norms, output; `embedding_bytes` and `router_bytes` stay in main memory."""

    expert_bytes: int
    shared_bytes: int
    router_bytes: int
    embedding_bytes: int
    dense_bytes: int
    buffers: Buffers
    exact: bool
    source: str
    tied_output: bool

    @property
    def weight_bytes(self) -> int:
        """All weights as the file holds them."""
        dense = self.dense_bytes - (self.embedding_bytes if self.tied_output else 0)
        return self.expert_bytes + self.router_bytes + self.embedding_bytes + dense

    @property
    def kv_bytes(self) -> int:
        return self.buffers.memory_bytes

    @property
    def compute_bytes(self) -> int:
        return self.buffers.all_compute_bytes + self.buffers.output_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the cards (0 without one) and in main memory. `n_slots` is per MoE layer, over all cards. `missing` is
    the share of the experts in main memory that finds no room there and comes from the disk."""

    vram_need: int
    vram_bytes: int
    margin_bytes: int
    cache_bytes: int
    n_slots: tuple[int, ...]
    ram_need: int
    ram_bytes: int
    fits_vram: bool
    fits_ram: bool
    reason: str = ""
    nearest: str = ""
    missing: float = 0.0

    @property
    def fits(self) -> bool:
        return self.fits_vram and self.fits_ram

    @property
    def runs(self) -> bool:
        """Whether it runs at all, if only from the disk."""
        return self.fits_vram and self.missing < 1.0


def measure_needs(model: GgufModel, setting: Setting) -> Needs:
    """Bytes of weights from the header, of buffers from llama.cpp; where it cannot be asked, an estimate that says so.

    Raises ModelError when llama.cpp knows the file, but refuses it.
    """
    from hybrimoe.errors import ModelError

    try:
        buffers = _unrounded(dry_load(model, setting.load_shape()), model, setting)
        exact, source = True, "llama.cpp's own dry run"
    except ModelError:
        raise
    except HybrimoeError as error:
        buffers, source = _estimated(model, setting)
        exact, source = False, f"{source}; {error.message}"
    embedding = sum(t.n_bytes for t in model.tensors if t.name.startswith("token_embd."))
    tied = not any(t.name == "output.weight" for t in model.tensors)
    return Needs(
        expert_bytes=model.expert_bytes,
        shared_bytes=model.shared_expert_bytes,
        router_bytes=model.router_bytes,
        embedding_bytes=embedding,
        # A model without an output matrix takes its embedding for that, in a copy of its own on the card.
        dense_bytes=model.dense_bytes - model.router_bytes - (0 if tied else embedding),
        buffers=buffers,
        exact=exact,
        source=source,
        tied_output=tied,
    )


def _kv_by_shape(model: GgufModel, setting: Setting) -> int:
    from hybrimoe.engine import KV_TYPES

    return model.kv.bytes_for(setting.n_ctx, KV_TYPES[setting.cache_type_k][1], KV_TYPES[setting.cache_type_v][1])


def _unrounded(buffers: Buffers, model: GgufModel, setting: Setting) -> Buffers:
    """llama.cpp logs hundredths of a MiB: where heads and context give the same size, theirs has no rounding."""
    by_shape = _kv_by_shape(model, setting)
    return replace(buffers, kv_bytes=by_shape) if abs(by_shape - buffers.kv_bytes) <= _LOG_STEP else buffers


def _estimated(model: GgufModel, setting: Setting) -> tuple[Buffers, str]:
    kv = _kv_by_shape(model, setting)
    widest = max(
        model.n_vocab,
        model.n_embd * 8 + max((4 * layer.n_experts_used * model.n_embd for layer in model.moe_layers), default=0),
    )
    recurrent = any(".ssm." in key or ".wkv." in key for key in model.metadata)
    source = "estimated: the KV cache by heads and context, compute buffers roughly"
    if recurrent:
        source += "; recurrent state is unknown and not counted"
    return Buffers(kv, 0, 4 * model.n_vocab, {"CPU": 4 * setting.n_ubatch * widest}), source


def plan_memory(model: GgufModel, needs: Needs, setting: Setting, machine: Machine) -> MemoryPlan:
    """Dense weights, KV cache and compute buffers on the card, what is left of it as slots; experts in main memory."""
    if machine.has_card:
        return _with_gpu(model, needs, setting, machine)
    need = needs.weight_bytes + needs.kv_bytes + needs.compute_bytes + _PROCESS_BYTES
    fits = need <= machine.ram_bytes
    missing = _missing(need, machine.ram_bytes, needs.expert_bytes)
    plan = MemoryPlan(
        0, 0, 0, 0, (0,) * len(moe_layers(model)), need, machine.ram_bytes, True, fits, missing=missing
    )  # fmt: skip
    if fits:
        return plan
    over = f"{_gib(need)} of main memory are needed, {_gib(machine.ram_bytes)} can be had"
    room = machine.ram_bytes - needs.weight_bytes - needs.compute_bytes - _PROCESS_BYTES
    return replace(plan, reason=over, nearest=_smaller_ctx(needs, setting, room) or _smaller_weights(model, need, plan))


def _missing(need: int, ram_bytes: int, expert_bytes: int) -> float:
    """Share of the experts that main memory has no room for; 1: not even all else fits."""
    return min(1.0, max(0, need - ram_bytes) / max(1, expert_bytes))


def _with_gpu(model: GgufModel, needs: Needs, setting: Setting, machine: Machine) -> MemoryPlan:
    vram = sum(machine.card_bytes)
    margin = VRAM_MARGIN_BYTES * len(machine.cards)
    fixed = needs.dense_bytes + needs.kv_bytes + needs.compute_bytes
    layers = moe_layers(model)
    room = max(0, vram - margin - fixed)
    slot_bytes = sum(layer.bytes_per_expert for layer in layers)
    n = room // slot_bytes if slot_bytes else 0
    slots = [min(layer.n_experts, n) for layer in layers]
    left = room - sum(s * layer.bytes_per_expert for s, layer in zip(slots, layers, strict=True))
    for i, layer in enumerate(layers):  # what is left of the last round, first layers first
        if slots[i] < layer.n_experts and layer.bytes_per_expert <= left:
            slots[i] += 1
            left -= layer.bytes_per_expert
    cache = sum(s * layer.bytes_per_expert for s, layer in zip(slots, layers, strict=True))
    # The file stays mapped, but pages of experts that are all on the card are never read again.
    all_resident = all(s == layer.n_experts for s, layer in zip(slots, layers, strict=True))
    ram_need = (0 if all_resident else needs.expert_bytes) + _host_bytes(needs)
    plan = MemoryPlan(
        vram_need=fixed + margin,
        vram_bytes=vram,
        margin_bytes=margin,
        cache_bytes=cache,
        n_slots=tuple(slots),
        ram_need=ram_need,
        ram_bytes=machine.ram_bytes,
        fits_vram=fixed + margin <= vram,
        fits_ram=ram_need <= machine.ram_bytes,
        missing=_missing(ram_need, machine.ram_bytes, needs.expert_bytes),
    )
    if not plan.fits_ram:
        over = f"{_gib(ram_need)} of main memory are needed for experts, {_gib(machine.ram_bytes)} can be had"
        return replace(plan, reason=over, nearest=_smaller_weights(model, ram_need, plan))
    if not plan.fits_vram:
        over = f"{_gib(plan.vram_need)} of card memory are needed, {_gib(vram)} can be had"
        rest = vram - margin - needs.dense_bytes - needs.compute_bytes
        nearest = _smaller_ctx(needs, setting, rest) or _fewer_gpu_layers(model, needs, vram - margin)
        return replace(plan, reason=over, nearest=nearest)
    return plan


def _host_bytes(needs: Needs) -> int:
    """What main memory holds beside experts where a card holds the dense weights."""
    return (
        needs.router_bytes + needs.embedding_bytes + needs.buffers.output_bytes + _PROCESS_BYTES + _STAGING_BYTES
    )  # fmt: skip


@dataclass(frozen=True)
class PlacedMemory:
    """What a placement of plain llama.cpp takes. Bytes; `missing` as in MemoryPlan."""

    vram_need: int
    ram_need: int
    fits_vram: bool
    missing: float


def placed_memory(work: ModelWork, needs: Needs, machine: Machine, place: LayerPlacement) -> PlacedMemory:
    """llama.cpp's own bytes for a placement: KV rows lie with their layer's dense weights."""
    layers = list(zip(work.layers, place.dense, place.experts, strict=True))
    dense = sum(layer.dense.n_bytes for layer, on_card, _ in layers if on_card)
    experts = sum(layer.moe.expert_bytes for layer, _, on_card in layers if on_card and layer.moe)
    share = sum(place.dense) / max(1, len(place.dense))
    vram = dense + experts + int(share * needs.kv_bytes) + (work.output.n_bytes if place.output else 0)
    vram += needs.compute_bytes if vram else 0
    margin = VRAM_MARGIN_BYTES * len(machine.cards) if vram else 0
    left = needs.expert_bytes - experts
    rest = needs.weight_bytes - needs.expert_bytes - dense - (work.output.n_bytes if place.output else 0)
    ram = left + max(0, rest) + int((1 - share) * needs.kv_bytes) + needs.buffers.output_bytes + _PROCESS_BYTES
    ram += _STAGING_BYTES if vram else needs.compute_bytes
    return PlacedMemory(
        vram + margin, ram, vram + margin <= sum(machine.card_bytes), _missing(ram, machine.ram_bytes, max(1, left))
    )


def check_context(
    model: GgufModel, n_ctx: int, cache_types: tuple[str, str], *, weights_are_copied: bool = False
) -> None:
    """The engine's guard without a card: what it refuses no plan calls running. llama.cpp is not asked, so the KV cache
    is a lower bound. `weights_are_copied`: nothing is mapped from the file.

    Raises DoesNotFitError.
    """
    from hybrimoe.engine import KV_TYPES
    from hybrimoe.errors import DoesNotFitError
    from hybrimoe.machine import host

    def kv_bytes(n: int) -> int:
        size = model.kv.bytes_for(n, KV_TYPES[cache_types[0]][1], KV_TYPES[cache_types[1]][1])
        # Layers with a sliding window keep only that; the file does not say which, but never more than 5 of 6 have one
        # (gemma's pattern).
        return size // 6 if model.kv.sliding_window else size

    # Weights are mapped from the file and give way under pressure; the KV cache is written and does not.
    available = host.memory().available_bytes - _PROCESS_BYTES
    if weights_are_copied:
        available -= model.total_bytes
    need = kv_bytes(n_ctx)
    if need <= available:
        return
    per_token = max(1, need // n_ctx)
    fitting = max(0, available) // per_token // _CTX_STEP * _CTX_STEP
    hint = f"use -c {fitting} or less" if fitting else "close other programs, or use a machine with more memory"
    raise DoesNotFitError(
        f"the KV cache for {n_ctx} tokens of context takes {need / 2**30:.1f} GiB, "
        f"{max(0, available) / 2**30:.1f} GiB of memory are free",
        hint,
    )


def _smaller_ctx(needs: Needs, setting: Setting, room: int) -> str:
    """The largest context whose KV cache takes at most `room`; empty where even a small one does not fit."""
    if needs.kv_bytes <= 0:
        return ""
    per_token = needs.buffers.kv_bytes / setting.n_ctx
    if per_token <= 0:
        return ""
    n_ctx = int((room - needs.buffers.recurrent_bytes) / per_token) // _CTX_STEP * _CTX_STEP
    return f"-c {n_ctx}" if _LEAST_CTX <= n_ctx < setting.n_ctx else ""


def _fewer_gpu_layers(model: GgufModel, needs: Needs, room: int) -> str:
    per_layer = (needs.dense_bytes + needs.kv_bytes) / max(1, model.n_layers)
    n = max(0, int((room - needs.compute_bytes) / per_layer)) if per_layer else 0
    return f"-ngl {min(n, model.n_layers)}"


def _smaller_weights(model: GgufModel, need: int, plan: MemoryPlan) -> str:
    """The quantisation whose experts would fit, by bits per weight."""
    other = need - model.expert_bytes
    n_weights = sum(t.n_elements for layer in moe_layers(model) for t in layer.expert_tensors)
    bits = 8 * max(0, plan.ram_bytes - other) / max(1, n_weights)
    now = 8 * model.expert_bytes / max(1, n_weights)
    names = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K", "IQ2_XXS", "IQ1_S")
    sizes = {t.name: 8 * t.block_bytes / t.block_elems for t in GGML_TYPES.values()}
    for name in names:
        if sizes[name] <= bits and sizes[name] < now:
            return f"experts in {name} ({sizes[name]:.2f} bits per weight; these have {now:.2f})"
    more = (need - plan.ram_bytes) / 2**30
    return f"a machine with {more:.0f} GiB more main memory; no quantisation is small enough"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
