"""Expected tokens per second: the terms of one token, and of a prompt's batches, for a placement on a machine.

Plain llama.cpp is priced term by term (`hybrimoe.machine.rates`). For ours the policy core's own scheduler plans each
layer's experts on the machine's cost table; the rest are the same terms. What no header tells is how often a slot holds
the expert that is asked for. Bounds: with uniform routing a cache holding the share f of the experts hits f of the
queries; skewed routing is taken as 1 - (1 - f)^2, near what HybriMoE sec. IV-D reports (25 % cached: 36-53 %, 75 %:
83 % of the queries hit). The expectation is the middle of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe.machine import rates
from hybrimoe.machine.constants import CONSTANTS, Constants
from hybrimoe.machine.costs import CostTable
from hybrimoe.machine.machine import Machine
from hybrimoe.machine.parts import Card
from hybrimoe.native.core import CPU, Scheduler, WorkItem
from hybrimoe.planning.placement import LayerPlacement
from hybrimoe.planning.work import LayerWork, ModelWork

__all__ = ["Speed", "SpeedModel", "Term"]

# llama.cpp computes batches from here on on the card, copying weights there (GGML_OP_OFFLOAD_MIN_BATCH's default).
_STOCK_OFFLOAD_TOKENS = 32
# After a probe: how far the machine's own speed moves (docs/cost-model.md, "Validation").
_MEASURED_SPREAD = 0.15


@dataclass(frozen=True)
class Kind:
    """A kind of term: the resource that it takes, the standard deviation of the logarithm of its error, and what would
    narrow it. `part`: of the machine, whose assumption widens it."""

    resource: str
    sigma: float
    narrows: str
    part: str = ""


# Standard deviations: spread of the public measurements around each term (tools/fit_field.py), where it can be told
# apart; the others are judged.
KINDS = {
    "card weights": Kind("GPU", 0.12, "gpu-gbs="),
    "card kernels": Kind("GPU", 0.40, "hybrimoe probe on that machine", "cpu"),
    "KV cache": Kind("GPU", 0.30, "--depth"),
    "KV cache on the CPU": Kind("DRAM", 0.30, "--depth", "ram"),
    "handover": Kind("CPU", 0.70, "hybrimoe probe on that machine", "cpu"),
    "CPU experts": Kind("CPU", 0.35, "ram-gbs=, or hybrimoe probe on that machine", "ram"),
    "CPU weights": Kind("DRAM", 0.30, "ram-gbs=, or hybrimoe probe on that machine", "ram"),
    "CPU kernels": Kind("CPU", 0.50, "hybrimoe probe on that machine", "cpu"),
    "copies": Kind("link", 0.36, "link-gbs=", "link"),
    "card products": Kind("GPU", 0.50, "hybrimoe probe on that machine"),
    "activations": Kind("GPU", 0.60, "hybrimoe probe on that machine"),
    "attention": Kind("GPU", 0.50, "--depth"),
    "CPU products": Kind("CPU", 0.50, "hybrimoe probe on that machine", "cpu"),
    "disk": Kind("disk", 0.60, "disk-gbs="),
    "token": Kind("CPU", 0.50, ""),
    "experts": Kind("CPU", 0.30, "hybrimoe probe on that machine", "ram"),
    "the rest": Kind("CPU", 0.30, "hybrimoe probe on that machine"),
}
# Versions, settings and systems that nobody describes; and what the range holds: 80 % of a normal distribution.
_COMMON_SIGMA, _ASSUMED_FACTOR, _QUANTILE = 0.11, 1.4, 1.28


@dataclass(frozen=True)
class Term:
    """One kind of work in a step, in microseconds."""

    name: str
    us: float
    resource: str


@dataclass(frozen=True)
class Speed:
    """Tokens per second with a range, and what takes the time: `limit` is 'CPU', 'GPU', 'link', 'DRAM' or 'disk'.
    `widest` names the term that widens the range most, `narrows` what would tell more."""

    per_s: float
    low: float
    high: float
    limit: str
    experts_share: float
    terms: tuple[Term, ...] = ()
    widest: str = ""
    narrows: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens_per_s": round(self.per_s, 2),
            "low": round(self.low, 2),
            "high": round(self.high, 2),
            "limit": self.limit,
            "experts_share": round(self.experts_share, 3),
            "widest": self.widest,
            "narrows": self.narrows,
            "terms_us": {term.name: round(term.us, 1) for term in self.terms},
        }


class SpeedModel:
    """Predictions for one model on one machine; `depth` tokens are in the context already. `dram_factor`: what a probed
    machine's dense weights would be read faster in another memory.

    Raises CalibrationError where a probe does not price the model.
    """

    def __init__(
        self,
        work: ModelWork,
        machine: Machine,
        depth: float = 0,
        constants: Constants = CONSTANTS,
        *,
        dram_factor: float = 1.0,
    ):
        self.work, self.machine, self.depth, self.k = work, machine, depth, constants
        self._dram_factor = dram_factor
        self.moe = [layer for layer in work.layers if layer.moe is not None]
        self._table: CostTable | None = None
        self._costs: Any = None
        self._scheduler = Scheduler("two-threshold")
        self._planned: dict[tuple[Any, ...], tuple[float, dict[str, float]]] = {}
        total = sum(machine.card_bytes)
        self._shares = [(card, card.memory_bytes / total) for card in machine.cards] if total else []

    # --- llama.cpp ---

    def stock_decode(self, place: LayerPlacement, missing: float = 0.0) -> Speed:
        """One token of plain llama.cpp. `missing`: share of the experts in main memory that must come from the disk."""
        terms = self._measured_decode(place) if self.machine.is_measured else self._decode(place)
        on_cpu = [layer for layer, card in zip(self.work.layers, place.experts, strict=True) if layer.moe and not card]
        return self._speed([*terms, *self._disk(on_cpu, 1, missing)], 1)

    def stock_prefill(self, place: LayerPlacement, n_prompt: int, missing: float = 0.0) -> Speed:
        """A prompt of `n_prompt` tokens in plain llama.cpp, in batches of `n_ubatch`."""
        on_cpu = [layer for layer, card in zip(self.work.layers, place.experts, strict=True) if layer.moe and not card]

        def batch(n: int, depth: float) -> list[Term]:
            return [*self._prefill(place, n, depth), *self._disk(on_cpu, n, missing)]

        return self._batches(n_prompt, batch)

    def _decode(self, place: LayerPlacement) -> list[Term]:
        work, machine, k = self.work, self.machine, self.k
        card, cpu = _Sum(), _Sum()
        n_layers_card = 0
        n_handed = 0
        cpu_experts = cpu_nodes = 0.0
        for layer, dense_on_card, experts_on_card in zip(work.layers, place.dense, place.experts, strict=True):
            (card if dense_on_card else cpu).add(layer.dense.n_bytes, layer.dense.cpu_ns)
            n_layers_card += dense_on_card
            nodes = layer.n_nodes
            if layer.moe is not None and layer.expert is not None:
                used = layer.moe.n_experts_used
                if experts_on_card:
                    card.add(used * layer.expert.n_bytes)
                else:
                    cpu_experts += used * rates.cpu_expert_us(layer.expert, 1, machine.cpu, machine.ram, k)
                    if dense_on_card:
                        n_handed += 1
                        nodes -= k.expert_nodes
            if dense_on_card:
                card.nodes += nodes
            else:
                cpu_nodes += nodes
        (card if place.output else cpu).add(work.output.n_bytes, work.output.cpu_ns)
        kv_card = n_layers_card / max(1, len(work.layers))
        kv_bytes = work.kv_read_bytes(self.depth)
        terms = [_term("token", k.token_us)]
        if self._shares:
            split = n_handed > 0 or n_layers_card < len(work.layers)
            terms += [
                _term("card weights", self._mix(lambda c: card.n_bytes / rates.card_bytes_per_us(c, k))),
                _term(
                    "card kernels",
                    self._mix(lambda c: rates.card_nodes_us(card.nodes, c, machine.cpu, split=split, k=k)),
                ),
                _term("KV cache", self._mix(lambda c: kv_card * kv_bytes / rates.card_bytes_per_us(c, k))),
                _term("handover", n_handed * rates.handover_us(machine.cpu, k)),
            ]
        dram = rates.dram_bytes_per_us(machine.cpu, machine.ram, k)
        return [
            *terms,
            _term("CPU experts", cpu_experts),
            _term("CPU weights", rates.cpu_us(cpu.n_bytes, cpu.ns, 1, machine.cpu, machine.ram, k)),
            _term("KV cache on the CPU", (1 - kv_card) * kv_bytes / dram),
            _term("CPU kernels", rates.cpu_nodes_us(cpu_nodes, machine.cpu, k)),
        ]

    def _measured_decode(self, place: LayerPlacement) -> list[Term]:
        table = self.table
        experts = 0.0
        on_card = [card for layer, card in zip(self.work.layers, place.experts, strict=True) if layer.moe]
        for i, (layer, card) in enumerate(zip(self.moe, on_card, strict=True)):
            assert layer.moe is not None
            used = layer.moe.n_experts_used
            if card and table.devices:
                experts += table.devices[0].step_us + used * table.one_token_us(i, 0)
            else:
                first = table.classes[table.layer_class[i]].cpu_first_us
                experts += table.cpu_step_us + first + used * table.one_token_us(i)
        resource = "GPU" if all(on_card) and table.devices else "CPU"
        return [self._measured_rest(), Term("experts", experts, resource)]

    def _prefill(self, place: LayerPlacement, n: int, depth: float) -> list[Term]:
        """One batch of `n` tokens."""
        terms = self._prompt_rest(place, n, depth)
        machine, k = self.machine, self.k
        copies = products = reads = cpu = 0.0
        offload = n >= _STOCK_OFFLOAD_TOKENS
        on_cards = [card for layer, card in zip(self.work.layers, place.experts, strict=True) if layer.moe]
        link = self._link_bytes_per_us()
        for i, (layer, on_card) in enumerate(zip(self.moe, on_cards, strict=True)):
            assert layer.expert is not None
            n_active, load = self._active(layer, n)
            shape = layer.expert
            if not self._shares or not (on_card or (offload and place.any_dense)):
                if machine.is_measured:
                    cpu += n_active * _on_curve(self.table.classes[self.table.layer_class[i]].cpu, load)
                else:
                    cpu += n_active * rates.cpu_expert_us(shape, load, machine.cpu, machine.ram, k)
                continue
            copies += 0.0 if on_card else n_active * shape.n_bytes / link
            if machine.is_measured and self.table.devices:
                products += n_active * _on_curve(self.table.classes[self.table.layer_class[i]].gpu[0], load)
                continue
            for card, share in self._shares:
                reads += share * n_active * shape.n_bytes / rates.card_bytes_per_us(card, k)
                products += share * n_active * rates.card_products_us(shape.n_macs, load, card, k)
        return [
            *terms, _term("card weights", reads), _term("card products", products), _term("copies", copies),
            _term("CPU experts", cpu),
        ]  # fmt: skip

    def _link_bytes_per_us(self) -> float:
        """Copies of plain llama.cpp, whose weights are mapped from the file."""
        if not self._shares:
            return math.inf
        if self.machine.is_measured and self.table.devices:
            return self.table.devices[0].bytes_per_us
        return self.machine.link_bytes_per_us(pinned=False)

    # --- ours ---

    def decode(self, n_slots: Sequence[int], missing: float = 0.0) -> Speed:
        """One token of ours, with [n_moe_layers] slots."""
        rest = [self._measured_rest()] if self.machine.is_measured else self._our_rest()
        disk = self._disk(self.moe, 1, missing)
        by_skew = []
        for skew in (0.0, 0.5, 1.0) if any(n_slots) else (0.5,):
            experts = self._our_experts(n_slots, skew)
            by_skew.append(self._speed([*rest, *experts, *disk], 1))
        middle = by_skew[len(by_skew) // 2]
        return Speed(
            middle.per_s, min(s.low for s in by_skew), max(s.high for s in by_skew), middle.limit, middle.experts_share,
            middle.terms, middle.widest, middle.narrows,
        )  # fmt: skip

    def prefill(self, n_slots: Sequence[int], n_prompt: int, missing: float = 0.0) -> Speed:
        """A prompt of ours."""
        on_card = bool(self._shares)
        n_layers = len(self.work.layers)
        place = LayerPlacement((on_card,) * n_layers, (on_card,) * n_layers, on_card)

        def batch(n: int, depth: float) -> list[Term]:
            experts: dict[str, float] = {}
            total = 0.0
            for i, layer in enumerate(self.moe):
                assert layer.moe is not None
                active, load = self._active(layer, n)
                n_active = max(1, round(active))
                hits = min(n_active, round(n_active * n_slots[i] / layer.moe.n_experts))
                us, busy = self._plan(i, hits, n_active, max(1, round(load)))
                total += us
                _accumulate(experts, busy, 1.0)
            return [
                *self._prompt_rest(place, n, depth),
                Term("experts", total, max(experts, key=lambda name: experts[name]) if experts else "CPU"),
                *self._disk(self.moe, n, missing),
            ]

        return self._batches(n_prompt, batch)

    def _our_rest(self) -> list[Term]:
        """All but the experts of one token; each layer's experts are a call of the plug-in."""
        work, machine, k = self.work, self.machine, self.k
        dense = work.output
        for layer in work.layers:
            dense += layer.dense
        nodes = work.n_nodes - k.expert_nodes * len(self.moe)
        kv_bytes = work.kv_read_bytes(self.depth)
        if not self._shares:
            return [
                _term("token", k.token_us),
                _term("CPU weights", rates.cpu_us(dense.n_bytes, dense.cpu_ns, 1, machine.cpu, machine.ram, k)),
                _term("KV cache on the CPU", kv_bytes / rates.dram_bytes_per_us(machine.cpu, machine.ram, k)),
                _term("CPU kernels", rates.cpu_nodes_us(nodes, machine.cpu, k)),
            ]
        return [
            _term("token", k.token_us),
            _term("card weights", self._mix(lambda c: dense.n_bytes / rates.card_bytes_per_us(c, k))),
            _term("card kernels", self._mix(lambda c: rates.card_nodes_us(nodes, c, machine.cpu, split=True, k=k))),
            _term("KV cache", self._mix(lambda c: kv_bytes / rates.card_bytes_per_us(c, k))),
        ]

    def _our_experts(self, n_slots: Sequence[int], skew: float) -> list[Term]:
        total, busy_sum = 0.0, {"CPU": 0.0}
        for i, layer in enumerate(self.moe):
            assert layer.moe is not None
            used = layer.moe.n_experts_used
            f = n_slots[i] / layer.moe.n_experts
            hits = used * ((1 - skew) * f + skew * (1 - (1 - f) ** 2))
            low = int(hits)
            for n_hits, weight in ((low, 1 - hits + low), (min(low + 1, used), hits - low)):
                if weight > 0:
                    us, busy = self._plan(i, n_hits, used, 1)
                    total += us * weight
                    _accumulate(busy_sum, busy, weight)
        return [Term("experts", total, max(busy_sum, key=lambda name: busy_sum[name]))]

    def _plan(self, i: int, n_hits: int, n_items: int, load: int) -> tuple[float, dict[str, float]]:
        """(makespan, busy microseconds by resource) of one layer, as the engine's default scheduler plans it."""
        key = (self.table.layer_class[i], n_hits, n_items, load)
        if key not in self._planned:
            if self._costs is None:
                self._costs = self.table.costs()
            items = [WorkItem(e, load, 0 if e < n_hits else CPU) for e in range(n_items)]
            limits = [2**31 - 1] * self._costs.n_devices
            plan = self._scheduler.plan(self._costs, items, layer=i, max_copies=limits)
            busy = {"CPU": plan.cpu_end_us}
            if self._costs.n_devices:
                busy |= {"GPU": sum(plan.gpu_end_us) - sum(plan.link_end_us), "link": max(plan.link_end_us)}
                busy["DRAM"] = plan.dram_us
            self._planned[key] = (plan.makespan_us, busy)
        return self._planned[key]

    # --- both ---

    @property
    def table(self) -> CostTable:
        if self._table is None:
            self._table = self.machine.costs(self.work.model)
        return self._table

    def _mix(self, us: Callable[[Card], float]) -> float:
        """Over unequal cards, which hold layers in proportion to their memory and compute in turn."""
        return sum(share * us(card) for card, share in self._shares)

    def _active(self, layer: LayerWork, n: int) -> tuple[float, float]:
        """(experts that a batch asks for, tokens of each)."""
        assert layer.moe is not None
        e, used = layer.moe.n_experts, layer.moe.n_experts_used
        share = rates.active_share(n, used, e, self.k)
        return share * e, n * used / (share * e)

    def _measured_rest(self) -> Term:
        """All but the experts of one token, by this machine's probe."""
        calibration, work = self.machine.calibration, self.work
        assert calibration is not None
        dense = work.output.n_bytes + sum(layer.dense.n_bytes for layer in work.layers)
        faster = 1.0 if self.machine.has_card else self._dram_factor
        us = (dense + work.kv_read_bytes(self.depth)) / calibration.dense_bytes_per_us() / faster
        us += len(self.moe) * calibration.step_us() + work.buffers.n_graph_nodes * calibration.node_us()
        return Term("the rest", us, "GPU" if self.machine.has_card else "DRAM")

    def _prompt_rest(self, place: LayerPlacement, n: int, depth: float) -> list[Term]:
        """All but the experts of a batch of `n` tokens."""
        work, machine, k = self.work, self.machine, self.k
        macs = sum(layer.dense.n_macs for layer in work.layers)
        pairs = work.attention_macs(n, depth)
        if machine.calibration is not None:
            us = (n * macs + pairs) / machine.calibration.dense_macs_per_us()
            us += len(self.moe) * machine.calibration.step_us()
            return [Term("the rest", us, "GPU" if machine.has_card else "CPU")]
        terms: list[Term] = [_term("token", k.token_us)]
        # From 32 tokens on the card computes layers that lie in main memory too, with their weights copied.
        offload = bool(self._shares) and n >= _STOCK_OFFLOAD_TOKENS and place.any_dense
        on_card = [card or offload for card in place.dense]
        share = sum(on_card) / max(1, len(on_card)) if self._shares else 0.0
        dense_bytes = sum(layer.dense.n_bytes for layer in work.layers)
        dense_ns = sum(layer.dense.cpu_ns for layer in work.layers)
        if share:
            copied = sum(layer.dense.n_bytes for layer, card in zip(work.layers, place.dense, strict=True) if not card)
            terms += [
                _term("card weights", self._mix(lambda c: share * dense_bytes / rates.card_bytes_per_us(c, k))),
                _term("card products", self._mix(lambda c: share * rates.card_dense_products_us(macs, n, c, k))),
                _term("activations", self._mix(
                    lambda c: share * rates.card_activations_us(work.n_nodes, n, work.n_embd, c, k))),
                _term("card kernels", self._mix(
                    lambda c: rates.card_nodes_us(share * work.n_nodes, c, machine.cpu, split=True, k=k))),
                _term("attention", self._mix(lambda c: share * rates.card_attention_us(pairs, c, k))),
                _term("copies", copied / self._link_bytes_per_us()),
            ]  # fmt: skip
        if share < 1:
            ns = dense_ns + work.attention_macs(1, depth + n / 2) * rates.dot_ns("F16", 128, 1) / 128
            rest = 1 - share
            terms += [
                _term("CPU products", rates.cpu_us(rest * dense_bytes, rest * ns, n, machine.cpu, machine.ram, k)),
                _term("CPU kernels", rates.cpu_nodes_us(rest * work.n_nodes, machine.cpu, k)),
            ]
        return terms

    def _disk(self, layers: Sequence[LayerWork], n: int, missing: float) -> list[Term]:
        """Experts that main memory has no room for are read from the disk whenever they are asked for."""
        if missing <= 0:
            return []
        n_bytes = 0.0
        for layer in layers:
            assert layer.expert is not None and layer.moe is not None
            active = float(layer.moe.n_experts_used) if n == 1 else self._active(layer, n)[0]
            n_bytes += active * layer.expert.n_bytes
        return [_term("disk", missing * n_bytes / self.machine.disk_rate)]

    def _batches(self, n_prompt: int, batch: Callable[[int, float], list[Term]]) -> Speed:
        """A prompt in batches of `n_ubatch`, the last one smaller."""
        n_ubatch = min(self.work.setting.n_ubatch, n_prompt)
        n_whole, n_last = divmod(n_prompt, n_ubatch)
        whole_tokens = n_whole * n_ubatch
        sums: dict[tuple[str, str], float] = {}
        # Attention is linear in the depth, so the middle batch stands for all.
        parts = [(n_whole, batch(n_ubatch, self.depth + (whole_tokens - n_ubatch) / 2))]
        if n_last:
            parts.append((1, batch(n_last, self.depth + whole_tokens)))
        for count, terms in parts:
            for term in terms:
                key = (term.name, term.resource)
                sums[key] = sums.get(key, 0.0) + count * term.us
        return self._speed([Term(name, us, resource) for (name, resource), us in sums.items()], n_prompt)

    def _speed(self, terms: Sequence[Term], n_tokens: int) -> Speed:
        merged: dict[tuple[str, str], float] = {}
        for term in terms:
            if term.us > 0:
                key = (term.name, term.resource)
                merged[key] = merged.get(key, 0.0) + term.us
        terms = [Term(name, us, resource) for (name, resource), us in merged.items()]
        total = sum(term.us for term in terms)
        if not total > 0 or not math.isfinite(total):
            raise ArithmeticError("a step takes no time")
        per_s = 1e6 * n_tokens / total
        by_resource: dict[str, float] = {}
        for term in terms:
            by_resource[term.resource] = by_resource.get(term.resource, 0.0) + term.us
        limit = max(by_resource, key=lambda name: by_resource[name])
        experts = sum(t.us for t in terms if t.name in ("experts", "CPU experts", "copies")) / total
        if self.machine.is_measured and "disk" not in by_resource:
            low, high = per_s * (1 - _MEASURED_SPREAD), per_s * (1 + _MEASURED_SPREAD)
            return Speed(per_s, low, high, limit, experts, tuple(terms))
        widths = {term.name: term.us / total * self._sigma(term.name) for term in terms}
        sigma = math.sqrt(_COMMON_SIGMA**2 + sum(w * w for w in widths.values()))
        factor = math.exp(_QUANTILE * sigma)
        widest = max(widths, key=lambda name: widths[name])
        return Speed(
            per_s, per_s / factor, per_s * factor, limit, experts, tuple(terms), widest, KINDS[widest].narrows
        )  # fmt: skip

    def _sigma(self, name: str) -> float:
        kind = KINDS[name]
        return kind.sigma * (_ASSUMED_FACTOR if kind.part in self.machine.assumed else 1.0)


class _Sum:
    """Weights in one place."""

    def __init__(self) -> None:
        self.n_bytes = self.ns = self.nodes = 0.0

    def add(self, n_bytes: float, ns: float = 0.0) -> None:
        self.n_bytes += n_bytes
        self.ns += ns


def _term(name: str, us: float) -> Term:
    return Term(name, us, KINDS[name].resource)


def _accumulate(sums: dict[str, float], values: dict[str, float], weight: float) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value * weight


def _on_curve(points: Sequence[tuple[float, float]], n: float) -> float:
    """Straight lines between points and beyond, as the core draws them."""
    if len(points) == 1:
        return points[0][1] * n / points[0][0]
    i = next((i for i in range(1, len(points)) if n <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (n - x0) / (x1 - x0)
