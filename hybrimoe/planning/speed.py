"""Expected tokens per second, from the costs of a machine and the policy core's own scheduler.

One token, and one batch of a prompt, are planned layer by layer as the engine would. What no header tells is how often
a slot holds the expert that is asked for. Bounds: with uniform routing a cache holding the share f of the experts hits
f of the queries; skewed routing is taken as 1 - (1 - f)^2, near what HybriMoE sec. IV-D reports (25 % cached: 36-53 %,
75 %: 83 % of the queries hit). The expectation is the middle of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrimoe.native.core import CPU, Costs, Scheduler, WorkItem
from hybrimoe.planning.machines import PlanMachine, moe_layers
from hybrimoe.planning.memory import Needs, Setting

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel

# A context that is in use: its KV rows are read with every token.
_USED_CTX = 2048
# How far a prediction may be off, by what it is based on.
_MEASURED_SPREAD, _ESTIMATED_SPREAD = 0.15, 0.30
# llama.cpp computes batches from here on on the card, copying weights there (GGML_OP_OFFLOAD_MIN_BATCH's default).
_STOCK_OFFLOAD_TOKENS = 32


@dataclass(frozen=True)
class Speed:
    """Tokens per second with a range, and what takes the time: `limit` is 'CPU', 'GPU', 'link' or 'DRAM'."""

    per_s: float
    low: float
    high: float
    limit: str
    experts_share: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens_per_s": round(self.per_s, 2),
            "low": round(self.low, 2),
            "high": round(self.high, 2),
            "limit": self.limit,
            "experts_share": round(self.experts_share, 3),
        }


@dataclass
class _Time:
    """Sums over a step, in microseconds; `busy` per resource."""

    total: float = 0.0
    experts: float = 0.0
    busy: dict[str, float] | None = None

    def add(self, us: float, busy: Mapping[str, float], *, experts: bool) -> None:
        self.total += us
        self.experts += us if experts else 0.0
        sums = self.busy = self.busy or {}
        for name, value in busy.items():
            sums[name] = sums.get(name, 0.0) + value

    @property
    def limit(self) -> str:
        return max(self.busy, key=lambda name: (self.busy or {})[name]) if self.busy else "CPU"


class SpeedModel:
    """Predictions for one model on one machine. `costs` is the cost section of a calibration."""

    def __init__(
        self, model: GgufModel, needs: Needs, setting: Setting, machine: PlanMachine, costs: Mapping[str, Any]
    ):
        self.model, self.needs, self.setting, self.machine = model, needs, setting, machine
        self.layers = moe_layers(model)
        self.section = costs
        self.costs = Costs.from_calibration(costs)
        self._schedulers = {name: Scheduler(name) for name in ("two-threshold", "cpu-only", "gpu-only")}
        self._cache: dict[tuple[Any, ...], tuple[float, dict[str, float]]] = {}

    def decode(self, n_slots: Sequence[int], *, stock: bool = False) -> Speed:
        """One token. `stock`: llama.cpp with the experts of as many whole layers on the card as `n_slots` has room
        for."""
        shares = [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0)] if not stock and any(n_slots) else [(0.5, 1.0)]
        times = [self._decode(n_slots, skew, stock) for skew, _ in shares]
        return self._speed(times, 1)

    def prefill(self, n_slots: Sequence[int], *, stock: bool = False) -> Speed:
        """One batch of `n_ubatch` tokens of a prompt."""
        return self._speed([self._prefill(n_slots, stock)], self.setting.n_ubatch)

    def _speed(self, times: list[_Time], n_tokens: int) -> Speed:
        spread = _MEASURED_SPREAD if self.machine.measured else _ESTIMATED_SPREAD
        rates = sorted(1e6 * n_tokens / t.total for t in times)
        middle = times[len(times) // 2]
        per_s = 1e6 * n_tokens / middle.total
        low, high = min(*rates, per_s) * (1 - spread), max(*rates, per_s) * (1 + spread)
        return Speed(per_s, low, high, middle.limit, middle.experts / middle.total)

    def _dense_decode(self, time: _Time) -> None:
        needs, machine = self.needs, self.machine
        kv_read = needs.kv_bytes * min(1.0, _USED_CTX / max(1, self.setting.n_ctx))
        us = (needs.dense_bytes + kv_read) / machine.dense_bytes_per_us + len(self.layers) * machine.step_us
        us += needs.buffers.n_graph_nodes * machine.node_us
        time.add(us, {"GPU" if machine.has_gpu else "DRAM": us}, experts=False)

    def _decode(self, n_slots: Sequence[int], skew: float, stock: bool) -> _Time:
        time = _Time()
        self._dense_decode(time)
        on_card = _whole_layers(self.layers, n_slots) if stock else 0
        for i, layer in enumerate(self.layers):
            k = layer.n_experts_used
            if stock:
                hits = float(k) if i < on_card else 0.0
            else:
                f = n_slots[i] / layer.n_experts
                hits = k * ((1 - skew) * f + skew * (1 - (1 - f) ** 2))
            policy = "cpu-only" if stock else "two-threshold"
            low = int(hits)
            for n_hits, weight in ((low, 1 - hits + low), (min(low + 1, k), hits - low)):
                if weight > 0:
                    us, busy = self._layer(i, policy, n_hits, k, 1)
                    time.add(us * weight, {n: v * weight for n, v in busy.items()}, experts=True)
        return time

    def _prefill(self, n_slots: Sequence[int], stock: bool) -> _Time:
        n = self.setting.n_ubatch
        time = _Time()
        dense_macs = sum(
            t.n_elements for t in self.model.tensors if "_exps." not in t.name and not t.name.startswith("token_embd")
        )
        us = n * dense_macs / self.machine.dense_macs_per_us + len(self.layers) * self.machine.step_us
        time.add(us, {"GPU" if self.machine.has_gpu else "CPU": us}, experts=False)
        on_card = _whole_layers(self.layers, n_slots) if stock else 0
        for i, layer in enumerate(self.layers):
            e, k = layer.n_experts, layer.n_experts_used
            n_active = max(1, round(e * (1 - (1 - k / e) ** n)))
            load = max(1, round(n * k / n_active))
            slots = (e if i < on_card else 0) if stock else n_slots[i]
            hits = min(n_active, round(n_active * slots / e))
            offload = stock and self.machine.has_gpu and n >= _STOCK_OFFLOAD_TOKENS
            policy = "gpu-only" if offload else "cpu-only" if stock else "two-threshold"
            us, busy = self._layer(i, policy, hits, n_active, load)
            time.add(us, busy, experts=True)
        return time

    def _layer(self, i: int, policy: str, n_hits: int, n_items: int, load: int) -> tuple[float, dict[str, float]]:
        key = (self.section["layer_class"][i], policy, n_hits, n_items, load)
        if key not in self._cache:
            items = [WorkItem(e, load, 0 if e < n_hits else CPU) for e in range(n_items)]
            # The core plans for at most 1024 experts a layer, llama.cpp's own limit.
            limits = [2**31 - 1] * self.costs.n_devices
            plan = self._schedulers[policy].plan(self.costs, items, layer=i, max_copies=limits)
            busy = {"CPU": plan.cpu_end_us, "DRAM": plan.dram_us}
            if self.costs.n_devices:
                busy |= {"GPU": sum(plan.gpu_end_us) - sum(plan.link_end_us), "link": max(plan.link_end_us)}
            if not self.machine.has_gpu:
                del busy["DRAM"]
            self._cache[key] = (plan.makespan_us, busy)
        return self._cache[key]


def _whole_layers(layers: Sequence[Any], n_slots: Sequence[int]) -> int:
    """Layers whose experts all fit where the slots are: what `-ncmoe` leaves on the card."""
    room = sum(n * layer.bytes_per_expert for n, layer in zip(n_slots, layers, strict=True))
    n = 0
    for layer in layers:
        room -= layer.n_experts * layer.bytes_per_expert
        if room < 0:
            break
        n += 1
    return n


def scaled(section: Mapping[str, Any], *, cpu: float = 1.0, link: float = 1.0, expert: float = 1.0) -> dict[str, Any]:
    """A cost section for other parts: `cpu` and `link` times as fast a memory and link, `expert` times the bytes."""

    def curve(data: Mapping[str, Any], factor: float) -> dict[str, Any]:
        if "points" not in data:
            # The fixed part reads the weights.
            return {"fixed_us": data["fixed_us"] * factor, "per_token_us": data["per_token_us"]}
        first = data["points"][0][1]
        return {"points": [[n, max(us - first * (1 - factor), first * factor)] for n, us in data["points"]]}

    ceiling = section["dram_bytes_per_us"]
    return {
        **section,
        "classes": [
            {
                **c,
                "expert_bytes": c["expert_bytes"] * expert,
                "cpu": curve(c["cpu"], expert / cpu),
                "gpu": [curve(g, expert) for g in c["gpu"]],
            }
            for c in section["classes"]
        ],
        "dram_bytes_per_us": None if ceiling is None else ceiling * cpu,
        "devices": [{**d, "bytes_per_us": d["bytes_per_us"] * link} for d in section["devices"]],
    }
