"""The policy core: self-described policies, cost model, schedulers and expert cache, typed.

Replays of traces are in `core_replay`, the composed runtime is in `core_runtime`.

The same object code runs in the plug-in. Times are microseconds, rates bytes per microsecond (1 GB/s = 1,000), layers
are MoE layers counted from 0, devices are accelerators counted from 0 and `CPU` (-1). Every function raises
`CoreUsageError` for a value out of range or an unknown name, `CoreError` for other refusals (nothing has changed then),
and `PluginError` where the library is missing or of another version.
"""

from __future__ import annotations

import ctypes as ct
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybrimoe.native import core_abi as abi
from hybrimoe.native.core_abi import CoreError, CoreUsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "CPU",
    "Cache",
    "CoreError",
    "CoreUsageError",
    "Costs",
    "Curve",
    "Kind",
    "ParamInfo",
    "Placement",
    "Plan",
    "Policy",
    "PolicyInfo",
    "Scheduler",
    "SlotState",
    "WorkItem",
    "allocate_slots",
    "policies",
]

CPU = -1


class Kind(enum.IntEnum):
    """What a policy decides (hm_kind)."""

    SCHEDULER = 0
    EVICTION = 1
    ADMISSION = 2
    PREFETCH = 3
    ALLOCATION = 4


class SlotState(enum.IntEnum):
    """State of an expert in the cache (hm_slot_state)."""

    ABSENT = 0
    LOADING = 1
    RESIDENT = 2
    PINNED = 3


@dataclass(frozen=True)
class ParamInfo:
    """A parameter of a policy, described by the library itself."""

    name: str
    doc: str
    default: float
    min: float
    max: float
    integer: bool


@dataclass(frozen=True)
class PolicyInfo:
    """A policy, described by the library itself."""

    kind: Kind
    name: str
    doc: str
    source: str
    needs_scores: bool
    oracle: bool
    needs_costs: bool
    params: tuple[ParamInfo, ...]


def policies(kind: Kind) -> list[PolicyInfo]:
    """All policies of a kind, in the library's order (the default scheduler first)."""
    lib = abi.library()
    found = []
    for index in range(int(lib.hm_policy_count(int(kind)))):
        info = abi.PolicyInfoC()
        lib.hm_policy_describe(int(kind), index, ct.byref(info))
        params = []
        for number in range(info.n_params):
            p = abi.ParamInfoC()
            lib.hm_policy_param(int(kind), index, number, ct.byref(p))
            params.append(
                ParamInfo(p.name.decode(), p.doc.decode(), p.default_value, p.min_value, p.max_value, bool(p.integer))
            )
        found.append(
            PolicyInfo(
                kind,
                info.name.decode(),
                info.doc.decode(),
                info.source.decode(),
                bool(info.needs_scores),
                bool(info.oracle),
                bool(info.needs_costs),
                tuple(params),
            )
        )
    return found


@dataclass(frozen=True)
class Policy:
    """A policy by name, with the parameters that differ from their defaults."""

    name: str
    params: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Reads `name` or `name:param=value,param=value`, as the command line takes it."""
        name, _, rest = text.partition(":")
        params = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            try:
                params[key.strip()] = float(value)
            except ValueError:
                equals = ""
            if not equals:
                raise CoreUsageError(f"'{part}' in policy '{text}' is not parameter=number", "e.g. ema:alpha=0.1")
        return cls(name.strip(), params)

    def to_c(self) -> abi.PolicyC:
        """The structure for the library; it keeps its arrays alive."""
        rows = (abi.ParamC * len(self.params))(*(abi.ParamC(k.encode(), float(v)) for k, v in self.params.items()))
        return abi.PolicyC(self.name.encode(), rows, len(self.params))

    def __str__(self) -> str:
        return self.name + (":" + ",".join(f"{k}={v:g}" for k, v in self.params.items()) if self.params else "")


def as_policy(policy: Policy | str) -> Policy:
    """A policy from its object or its text."""
    return Policy.parse(policy) if isinstance(policy, str) else policy


class Handle:
    """Owns one opaque object of the library."""

    _destroy = ""

    def __init__(self) -> None:
        self._handle = ct.c_void_p()

    def __del__(self) -> None:
        # At interpreter exit the module may be gone before the object.
        if getattr(self, "_handle", None) and abi is not None:
            getattr(abi.library(), self._destroy)(self._handle)
            self._handle = ct.c_void_p()

    @property
    def c(self) -> ct.c_void_p:
        """The pointer, for calls into the library."""
        return self._handle


@dataclass(frozen=True)
class Curve:
    """Time of one expert over its tokens: affine, or linear between measured points `((n_tokens, us), ...)`."""

    fixed_us: float = math.nan
    per_token_us: float = math.nan
    points: tuple[tuple[float, float], ...] = ()

    def to_c(self) -> abi.CurveC:
        """The structure for the library; it keeps its arrays alive."""
        n = len(self.points)
        x = (ct.c_double * n)(*(p[0] for p in self.points))
        y = (ct.c_double * n)(*(p[1] for p in self.points))
        return abi.CurveC(self.fixed_us, self.per_token_us, n, x, y)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Curve:
        """Reads `{"fixed_us", "per_token_us"}` or `{"points": [[n_tokens, us], ...]}`."""
        if "points" in data:
            return cls(points=tuple((float(x), float(y)) for x, y in data["points"]))
        return cls(float(data["fixed_us"]), float(data["per_token_us"]))


class Costs(Handle):
    """Costs per layer class and device. Whatever is not set is unknown, and using it is an error."""

    _destroy = "hm_costs_destroy"

    def __init__(self, n_layers: int, n_devices: int, n_classes: int = 1) -> None:
        super().__init__()
        abi.call("hm_costs_create", n_layers, n_classes, n_devices, ct.byref(self._handle))
        self.n_layers, self.n_devices, self.n_classes = n_layers, n_devices, n_classes

    def set_layer_class(self, layer: int, cls: int) -> None:
        """Says of which class (shape and quantisation) a layer is; not needed with one class."""
        abi.call("hm_costs_set_layer_class", self.c, layer, cls)

    def set_bytes(self, expert_bytes: float, cls: int = 0) -> None:
        """Bytes of one expert, all its matrices."""
        abi.call("hm_costs_set_bytes", self.c, cls, expert_bytes)

    def set_cpu(self, curve: Curve, first_us: float, cls: int = 0) -> None:
        """Time of one expert on the CPU, and the extra of a layer's first one (HybriMoE sec. III)."""
        abi.call("hm_costs_set_cpu", self.c, cls, ct.byref(curve.to_c()), first_us)

    def set_gpu(self, device: int, curve: Curve, cls: int = 0) -> None:
        """Time of one expert on an accelerator."""
        abi.call("hm_costs_set_gpu", self.c, cls, device, ct.byref(curve.to_c()))

    def set_link(self, device: int, latency_us: float, bytes_per_us: float) -> None:
        """Latency and rate of host-to-device copies."""
        abi.call("hm_costs_set_link", self.c, device, latency_us, bytes_per_us)

    def set_step(self, device: int, step_us: float) -> None:
        """Fixed cost of a step in which the device (or `CPU`) has any expert."""
        abi.call("hm_costs_set_step", self.c, device, step_us)

    def set_dram(self, bytes_per_us: float) -> None:
        """What CPU reads and copies read together at most; `math.inf` if there is no shared ceiling."""
        abi.call("hm_costs_set_dram", self.c, bytes_per_us)

    def check(self) -> None:
        """Raises CoreError naming the first cost that is still unknown."""
        abi.call("hm_costs_check", self.c)

    @classmethod
    def simple(
        cls,
        n_layers: int,
        *,
        expert_bytes: float,
        cpu_us: float,
        gpu_us: float,
        copy_us: float,
        cpu_first_us: float = 0.0,
        dram_bytes_per_us: float = math.inf,
        n_devices: int = 1,
    ) -> Costs:
        """Every expert alike and no fixed costs: CPU time per token, GPU and copy time per expert."""
        costs = cls(n_layers, n_devices)
        costs.set_bytes(expert_bytes)
        costs.set_cpu(Curve(0.0, cpu_us), cpu_first_us)
        costs.set_step(CPU, 0.0)
        costs.set_dram(dram_bytes_per_us)
        for device in range(n_devices):
            costs.set_gpu(device, Curve(gpu_us, 0.0))
            costs.set_link(device, 0.0, expert_bytes / copy_us)
            costs.set_step(device, 0.0)
        return costs

    @classmethod
    def from_calibration(cls, data: Mapping[str, Any]) -> Costs:
        """Reads the cost section of a calibration.

        Args:
            data: `{"layer_class": [per layer], "classes": [{"expert_bytes", "cpu": curve, "cpu_first_us", "gpu":
                [curve per device]}], "cpu_step_us", "dram_bytes_per_us" (null: no ceiling), "devices": [{"latency_us",
                "bytes_per_us", "step_us"}]}`; a curve as in `Curve.from_dict`.

        Raises:
            CoreUsageError: a value is out of range, or of another type.
            CoreError: a cost is missing; it is named.
        """
        try:
            costs = cls(len(data["layer_class"]), len(data["devices"]), len(data["classes"]))
            for layer, number in enumerate(data["layer_class"]):
                costs.set_layer_class(layer, int(number))
            for number, one in enumerate(data["classes"]):
                costs.set_bytes(float(one["expert_bytes"]), number)
                costs.set_cpu(Curve.from_dict(one["cpu"]), float(one["cpu_first_us"]), number)
                for device, curve in enumerate(one["gpu"]):
                    costs.set_gpu(device, Curve.from_dict(curve), number)
            costs.set_step(CPU, float(data["cpu_step_us"]))
            ceiling = data["dram_bytes_per_us"]
            costs.set_dram(math.inf if ceiling is None else float(ceiling))
            for device, one in enumerate(data["devices"]):
                costs.set_link(device, float(one["latency_us"]), float(one["bytes_per_us"]))
                costs.set_step(device, float(one["step_us"]))
        except KeyError as error:
            missing = CoreError(f"the calibration lacks {error}", "run: hybrimoe probe")
            missing.code = abi.MISSING_COST
            raise missing from error
        except (TypeError, ValueError, OverflowError) as error:
            raise CoreUsageError(f"the calibration is malformed: {error}", "run: hybrimoe probe") from error
        costs.check()
        return costs


@dataclass
class WorkItem:
    """An active expert of the layer to plan. `device` holds it, or is loading it until `ready_us`; `CPU`: a miss."""

    expert: int
    n_tokens: int = 1
    device: int = CPU
    loading: bool = False
    may_copy: bool = True
    ready_us: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Who computes an expert, and when; a copied one is copied first."""

    expert: int
    device: int
    copied: bool
    start_us: float
    end_us: float
    copy_start_us: float
    copy_end_us: float

    @classmethod
    def from_c(cls, p: abi.PlacementC) -> Placement:
        """From the library's structure."""
        return cls(p.expert, p.device, bool(p.copied), p.start_us, p.end_us, p.copy_start_us, p.copy_end_us)


@dataclass(frozen=True)
class Plan:
    """One planned layer. Times count from its start; placements are in the order of the items."""

    placements: tuple[Placement, ...]
    makespan_us: float
    cpu_end_us: float
    gpu_end_us: tuple[float, ...]
    link_end_us: tuple[float, ...]
    dram_us: float
    n_cpu: int
    n_gpu: int
    n_copies: int


class Scheduler(Handle):
    """An intra-layer scheduler, e.g. `two-threshold` or `hybrimoe`."""

    _destroy = "hm_scheduler_destroy"

    def __init__(self, policy: Policy | str) -> None:
        super().__init__()
        abi.call("hm_scheduler_create", ct.byref(as_policy(policy).to_c()), ct.byref(self._handle))

    def plan(
        self,
        costs: Costs,
        items: Sequence[WorkItem],
        *,
        layer: int = 0,
        cpu_ready_us: float = 0.0,
        gpu_ready_us: Sequence[float] = (),
        link_ready_us: Sequence[float] = (),
        max_copies: Sequence[int] = (),
    ) -> Plan:
        """Plans one layer of 1..1024 active experts; ready times and copy limits are per device (absent: 0, none)."""
        rows = (abi.WorkItemC * max(1, len(items)))(
            *(abi.WorkItemC(i.expert, i.n_tokens, i.device, i.loading, i.may_copy, i.ready_us) for i in items)
        )
        limits = [*max_copies, *([2**31 - 1] * (abi.MAX_DEVICES - len(max_copies)))]
        problem = abi.ProblemC(layer, len(items), rows, cpu_ready_us)
        problem.gpu_ready_us = type(problem.gpu_ready_us)(*gpu_ready_us)
        problem.link_ready_us = type(problem.link_ready_us)(*link_ready_us)
        problem.max_copies = type(problem.max_copies)(*limits)
        placements = (abi.PlacementC * max(1, len(items)))()
        out = abi.PlanC(0, placements)
        abi.call("hm_scheduler_plan", self.c, costs.c, ct.byref(problem), ct.byref(out))
        n = costs.n_devices
        return Plan(
            tuple(Placement.from_c(p) for p in placements[: out.n_placements]),
            out.makespan_us,
            out.cpu_end_us,
            tuple(out.gpu_end_us[:n]),
            tuple(out.link_end_us[:n]),
            out.dram_us,
            out.n_cpu,
            out.n_gpu,
            out.n_copies,
        )


def cache_config(
    n_layers: int,
    n_expert: int,
    top_k: int,
    n_slots: int | Sequence[int] | Sequence[Sequence[int]],
    *,
    pooled: bool = False,
    class_of_layer: Sequence[int] | None = None,
) -> abi.CacheConfigC:
    """The library's cache configuration. `n_slots`: per layer, or [n_layers], or [n_devices, n_layers]."""
    rows: list[list[int]]
    if isinstance(n_slots, int):
        rows = [[n_slots] * n_layers]
    else:
        # An empty list is no device at all.
        rows = [list(row) for row in n_slots if not isinstance(row, int)]
        if n_slots and not rows:
            rows = [[n for n in n_slots if isinstance(n, int)]]
    for row in rows:
        if len(row) != n_layers:
            raise CoreUsageError(f"{len(row)} slot counts given for {n_layers} layers")
    flat = [int(n) for row in rows for n in row]
    slots = (ct.c_int32 * max(1, len(flat)))(*flat)
    classes = (ct.c_int32 * n_layers)(*class_of_layer) if class_of_layer is not None else None
    return abi.CacheConfigC(n_layers, n_expert, top_k, len(rows), pooled, slots, classes)


def pointer(array: npt.NDArray[Any] | None) -> int | None:
    """Address of a contiguous array; the caller keeps it alive for the call."""
    return None if array is None else int(array.ctypes.data)


def rows_of(
    ids: npt.ArrayLike, weights: npt.ArrayLike | None, scores: npt.ArrayLike | None, n_expert: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None, npt.NDArray[np.float32] | None]:
    """Routing of one step as contiguous arrays [n_rows, top_k], [n_rows, top_k], [n_rows, n_expert]."""
    import numpy as np

    rows = np.atleast_2d(np.ascontiguousarray(ids, dtype=np.int32))
    w = None if weights is None else np.atleast_2d(np.ascontiguousarray(weights, dtype=np.float32))
    s = None if scores is None else np.atleast_2d(np.ascontiguousarray(scores, dtype=np.float32))
    if w is not None and w.shape != rows.shape:
        raise CoreUsageError(f"weights have shape {w.shape}, ids {rows.shape}")
    if s is not None and s.shape != (rows.shape[0], n_expert):
        raise CoreUsageError(f"scores have shape {s.shape}, must be {(rows.shape[0], n_expert)}")
    return rows, w, s


class Cache(Handle):
    """The expert cache: slots with states absent, loading, resident, pinned, and an eviction policy."""

    _destroy = "hm_cache_destroy"

    def __init__(
        self,
        n_layers: int,
        n_expert: int,
        top_k: int,
        n_slots: int | Sequence[int] | Sequence[Sequence[int]],
        eviction: Policy | str = "lru",
        *,
        pooled: bool = False,
        class_of_layer: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        config = cache_config(n_layers, n_expert, top_k, n_slots, pooled=pooled, class_of_layer=class_of_layer)
        abi.call("hm_cache_create", ct.byref(config), ct.byref(as_policy(eviction).to_c()), ct.byref(self._handle))
        self.n_layers, self.n_expert, self.top_k = n_layers, n_expert, top_k

    def lookup(self, layer: int, expert: int) -> tuple[SlotState, int, int]:
        """State, device and slot of an expert (slot -1: absent)."""
        state, device, slot = ct.c_int32(), ct.c_int32(), ct.c_int32()
        abi.call("hm_cache_lookup", self.c, layer, expert, ct.byref(state), ct.byref(device), ct.byref(slot))
        return SlotState(state.value), device.value, slot.value

    def begin_step(
        self,
        layer: int,
        ids: npt.ArrayLike,
        *,
        weights: npt.ArrayLike | None = None,
        scores: npt.ArrayLike | None = None,
    ) -> None:
        """Routing of one layer, [n_rows, top_k]: counts hits and misses, and protects the experts until `end_step`."""
        rows, w, s = rows_of(ids, weights, scores, self.n_expert)
        step = abi.StepC(layer, rows.shape[0], rows.shape[1], pointer(rows), pointer(w), pointer(s))
        abi.call("hm_cache_begin_step", self.c, ct.byref(step))

    def end_step(self) -> None:
        """The layer was computed: its experts may be evicted again."""
        abi.library().hm_cache_end_step(self.c)

    def begin_prompt(self) -> None:
        """A new request begins (policies that keep statistics per request)."""
        abi.library().hm_cache_begin_prompt(self.c)

    def begin_load(
        self, layer: int, expert: int, device: int = 0, *, speculative: bool = False
    ) -> tuple[int, tuple[int, int] | None]:
        """Takes a free slot or evicts one victim, atomically. Returns the slot and the evicted (layer, expert)."""
        slot, v_layer, v_expert = ct.c_int32(), ct.c_int32(), ct.c_int32()
        pointers = (ct.byref(slot), ct.byref(v_layer), ct.byref(v_expert))
        abi.call("hm_cache_begin_load", self.c, layer, expert, device, speculative, *pointers)
        return slot.value, None if v_layer.value < 0 else (v_layer.value, v_expert.value)

    def complete_load(self, layer: int, expert: int) -> None:
        """The copy ended: loading becomes resident."""
        abi.call("hm_cache_complete_load", self.c, layer, expert)

    def fail_load(self, layer: int, expert: int) -> None:
        """The copy failed: the slot is free, as if the load had never begun."""
        abi.call("hm_cache_fail_load", self.c, layer, expert)

    def pin(self, layer: int, expert: int, pinned: bool = True) -> None:
        """Pins a resident expert, or releases a pinned one."""
        abi.call("hm_cache_pin", self.c, layer, expert, pinned)

    def resize(self, layer: int, n_slots: int, device: int = 0) -> list[tuple[int, int, int, int]]:
        """Changes a pool's size, keeping the best experts; returns moves (layer, expert, from slot, to slot)."""
        capacity = self.n_layers * self.n_expert
        moves, n = (abi.SlotMoveC * capacity)(), ct.c_int32()
        abi.call("hm_cache_resize", self.c, layer, device, n_slots, moves, capacity, ct.byref(n))
        return [(m.layer, m.expert, m.from_slot, m.to_slot) for m in moves[: n.value]]

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        out = abi.CacheStatsC()
        abi.library().hm_cache_get_stats(self.c, ct.byref(out))
        return {name: int(getattr(out, name)) for name in abi.CACHE_STATS}

    def verify(self) -> None:
        """Raises CoreError if an invariant does not hold (tests)."""
        abi.call("hm_cache_verify", self.c)


def allocate_slots(
    policy: Policy | str, n_layers: int, n_expert: int, n_total: int, demand: Sequence[float] | None = None
) -> list[int]:
    """Slots per layer out of a total: `even`, `shallow`, or `proportional` to a demand per layer."""
    out = (ct.c_int32 * max(1, n_layers))()
    if demand is not None and len(demand) != n_layers:
        raise CoreUsageError(f"{len(demand)} demands given for {n_layers} layers")
    given = None if demand is None else (ct.c_double * n_layers)(*demand)
    abi.call("hm_allocate_slots", ct.byref(as_policy(policy).to_c()), n_layers, n_expert, n_total, given, out)
    return list(out)[:n_layers]
