"""The runtime of the policy core: routing in, plan out; and its two replays."""

from __future__ import annotations

import ctypes as ct
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrimoe.native import core_abi as abi
from hybrimoe.native.core import (
    CoreUsageError,
    Costs,
    Handle,
    Placement,
    Policy,
    SlotState,
    as_policy,
    cache_config,
    pointer,
    rows_of,
)
from hybrimoe.native.core_replay import Trace

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "Decision",
    "EventLog",
    "EventType",
    "GuardLevel",
    "MachinePhase",
    "Runtime",
    "SimulatedRun",
    "Transfer",
    "TransferKind",
]


class TransferKind(enum.IntEnum):
    """Why an expert is copied (hm_transfer_kind)."""

    DEMAND = 0
    SCRATCH = 1
    ADMIT = 2
    PREFETCH = 3


class EventType(enum.IntEnum):
    """Events of a recorded run (hm_event_type)."""

    LAYER = 0
    COMPLETE = 1
    FAIL = 2
    PROMPT = 3
    LIMITS = 4
    RESIZE = 5
    COSTS = 6
    LAYER_DONE = 7
    LOAD = 8
    LOADED = 9
    TRIAL = 10


class GuardLevel(enum.IntEnum):
    """What the guard has given up, from nothing to all sharing within a layer."""

    FULL = 0
    NO_PREFETCH = 1
    NO_DEMAND_COPIES = 2
    FROZEN = 3
    STATIC_LAYERS = 4

    @property
    def label(self) -> str:
        """The name that the engine's state and log use."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class MachinePhase:
    """What is true of a machine from one token on (hm_machine_phase)."""

    from_token: int
    costs: Costs
    noise: float = 0.0  # standard deviation of the logarithm of every time
    outlier_share: float = 0.0  # of all times, that take `outlier_factor` times as long
    outlier_factor: float = 1.0
    waits_every_layers: int = 0  # an accelerator's batch waits in each so-manyth layer; 0: never
    waits_us: float = 0.0

    def to_c(self) -> abi.MachinePhaseC:
        """The structure for the library; valid as long as the costs live."""
        return abi.MachinePhaseC(
            self.from_token,
            self.costs.c,
            self.noise,
            self.outlier_share,
            self.outlier_factor,
            self.waits_every_layers,
            self.waits_us,
        )


@dataclass(frozen=True)
class Transfer:
    """A copy to issue; times are predictions on the caller's clock. `slot` -1: scratch."""

    id: int
    kind: TransferKind
    layer: int
    expert: int
    device: int
    slot: int
    evicted: tuple[int, int] | None
    bytes: float
    start_us: float
    end_us: float
    saved_us: float


@dataclass(frozen=True)
class Decision:
    """The plan of one layer. Placements and slots are per active expert, in order of first appearance."""

    placements: tuple[Placement, ...]
    slots: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    makespan_us: float
    n_hits: int
    n_misses: int
    n_late: int
    n_cpu: int
    n_gpu: int
    n_copies: int
    horizon: int


@dataclass(frozen=True)
class SimulatedRun:
    """A replay on the virtual clock: simulated times, never measured ones.

    `layers` has a row per step and layer that ran (fields as in hm_clock_layer).
    """

    total_us: float
    experts_us: float
    cpu_busy_us: float
    gpu_busy_us: float
    link_busy_us: float
    n_layers_run: int
    layers: npt.NDArray[Any]


class EventLog:
    """Events of a run, to be replayed in one call by `Runtime.replay`."""

    def __init__(self, n_expert: int) -> None:
        self.n_expert = n_expert
        self._events: list[abi.EventC] = []
        self._ids: list[int] = []
        self._weights: list[float] = []
        self._scores: list[float] = []
        self._lookahead: list[float] = []
        self._has_weights: bool | None = None

    def __len__(self) -> int:
        return len(self._events)

    def add(self, kind: EventType, **values: Any) -> None:
        """Appends an event other than a layer; values are the fields of hm_event."""
        self._events.append(abi.EventC(type=int(kind), scores_offset=-1, lookahead_offset=-1, **values))

    def add_layer(
        self,
        layer: int,
        ids: npt.ArrayLike,
        now_us: float,
        *,
        weights: npt.ArrayLike | None = None,
        scores: npt.ArrayLike | None = None,
        lookahead: npt.ArrayLike | None = None,
        cpu_ready_us: float = 0.0,
        gpu_ready_us: Sequence[float] = (),
        gap_us: float = 0.0,
        scratch: bool = False,
    ) -> None:
        """Appends a routed layer; arguments as of `Runtime.on_layer`, look-ahead [3, n_expert]. Weights must be given
        for all layers or for none."""
        import numpy as np

        rows, w, s = rows_of(ids, weights, scores, self.n_expert)
        if self._has_weights not in (None, w is not None):
            raise CoreUsageError("weights must be given for all layers of a log or for none")
        self._has_weights = w is not None
        event = abi.EventC(
            type=int(EventType.LAYER),
            layer=layer,
            n_rows=rows.shape[0],
            a=rows.shape[1],
            b=int(scratch),
            offset=len(self._ids),
            scores_offset=-1 if s is None else len(self._scores),
            lookahead_offset=-1 if lookahead is None else len(self._lookahead),
            now_us=now_us,
            cpu_ready_us=cpu_ready_us,
            gap_us=gap_us,
        )
        event.gpu_ready_us = type(event.gpu_ready_us)(*gpu_ready_us)
        self._events.append(event)
        self._ids.extend(rows.ravel().tolist())
        if w is not None:
            self._weights.extend(w.ravel().tolist())
        if s is not None:
            self._scores.extend(s.ravel().tolist())
        if lookahead is not None:
            ahead = np.asarray(lookahead, dtype=np.float32)
            if ahead.shape != (abi.MAX_LOOKAHEAD, self.n_expert):
                raise CoreUsageError(
                    f"look-ahead has shape {ahead.shape}, must be {(abi.MAX_LOOKAHEAD, self.n_expert)}"
                )
            self._lookahead.extend(ahead.ravel().tolist())

    def to_c(self) -> tuple[Any, abi.EventArraysC, list[Any]]:
        """Events, arrays, and what must stay alive during the call."""
        import numpy as np

        events = (abi.EventC * max(1, len(self._events)))(*self._events)
        ids = np.array(self._ids, dtype=np.int32)
        floats = [np.array(a, dtype=np.float32) for a in (self._weights, self._scores, self._lookahead)]
        arrays = abi.EventArraysC(
            pointer(ids),
            len(ids),
            pointer(floats[0]) if self._has_weights else None,
            pointer(floats[1]),
            len(floats[1]),
            pointer(floats[2]),
            len(floats[2]),
        )
        return events, arrays, [ids, *floats]


class Runtime(Handle):
    """Cost model, scheduler, cache, admission and prefetch composed: the object that the engine drives.

    Args:
        n_slots: per layer, or [n_layers], or [n_devices, n_layers]; an empty list for no device.
        max_window_layers: 1: idle-time copies end before the next layer begins, so they never delay a demanded one.
            More: they may take so many layers while no copies were demanded for a whole token.
        pay_back: switch prefetch off while it does not pay, and on trial again later.
        preload: start with experts 0.. resident.
    """

    _destroy = "hm_runtime_destroy"

    def __init__(
        self,
        costs: Costs,
        n_expert: int,
        top_k: int,
        n_slots: int | Sequence[int] | Sequence[Sequence[int]],
        *,
        eviction: Policy | str = "lru",
        admission: Policy | str = "always",
        schedule: Policy | str = "two-threshold",
        prefetch: Policy | str = "none",
        pooled: bool = False,
        max_window_layers: int = 1,
        pay_back: bool = True,
        preload: bool = False,
    ) -> None:
        super().__init__()
        config = abi.RuntimeConfigC(
            cache_config(costs.n_layers, n_expert, top_k, n_slots, pooled=pooled),
            *(as_policy(p).to_c() for p in (eviction, admission, schedule, prefetch)),
            max_window_layers,
            pay_back,
            preload,
        )
        abi.call("hm_runtime_create", ct.byref(config), costs.c, ct.byref(self._handle))
        self.n_layers, self.n_expert, self.top_k = costs.n_layers, n_expert, top_k

    def on_layer(
        self,
        layer: int,
        ids: npt.ArrayLike,
        now_us: float,
        *,
        weights: npt.ArrayLike | None = None,
        scores: npt.ArrayLike | None = None,
        lookahead: Sequence[npt.ArrayLike | None] = (),
        cpu_ready_us: float = 0.0,
        gpu_ready_us: Sequence[float] = (),
        gap_us: float = 0.0,
        scratch: bool = False,
    ) -> Decision:
        """Plans and commits one layer.

        Args:
            ids: chosen experts [n_rows, top_k] (or [top_k]).
            now_us: the caller's clock; it never goes back.
            lookahead: router scores [n_expert] of the next one, two, three layers, summed over the rows.
            gpu_ready_us: per device, when it is free, from now (shared experts).
            gap_us: time from the end of this layer's experts to the next layer's event.
            scratch: demanded copies may stream through scratch slots (prefill).
        """
        import numpy as np

        rows, w, s = rows_of(ids, weights, scores, self.n_expert)
        ahead = [None if a is None else np.ascontiguousarray(a, dtype=np.float32) for a in lookahead]
        for a in ahead:
            if a is not None and a.shape != (self.n_expert,):
                raise CoreUsageError(f"look-ahead scores have shape {a.shape}, must be {(self.n_expert,)}")
        event = abi.LayerEventC(layer, rows.shape[0], rows.shape[1], scratch, pointer(rows), pointer(w), pointer(s))
        event.lookahead = type(event.lookahead)(*(pointer(a) for a in ahead[: abi.MAX_LOOKAHEAD]))
        event.cpu_ready_us, event.gap_us = cpu_ready_us, gap_us
        event.gpu_ready_us = type(event.gpu_ready_us)(*gpu_ready_us)
        out = abi.DecisionC()
        abi.call("hm_runtime_on_layer", self.c, ct.byref(event), now_us, ct.byref(out))
        return Decision(
            tuple(Placement.from_c(p) for p in out.placements[: out.n_items]),
            tuple(out.slots[: out.n_items]),
            tuple(
                Transfer(
                    t.id,
                    TransferKind(t.kind),
                    t.layer,
                    t.expert,
                    t.device,
                    t.slot,
                    None if t.evicted_layer < 0 else (t.evicted_layer, t.evicted_expert),
                    t.bytes,
                    t.start_us,
                    t.end_us,
                    t.saved_us,
                )
                for t in out.transfers[: out.n_transfers]
            ),
            out.makespan_us,
            out.n_hits,
            out.n_misses,
            out.n_late,
            out.n_cpu,
            out.n_gpu,
            out.n_copies,
            out.horizon,
        )

    def on_layer_done(self) -> None:
        """The layer was computed: its experts may be evicted. Implied by the next `on_layer`."""
        abi.library().hm_runtime_on_layer_done(self.c)

    def on_complete(self, transfer_id: int, now_us: float) -> None:
        """A copy ended."""
        abi.call("hm_runtime_on_complete", self.c, transfer_id, now_us)

    def on_fail(self, transfer_id: int, now_us: float) -> None:
        """A copy failed; its slot is free again."""
        abi.call("hm_runtime_on_fail", self.c, transfer_id, now_us)

    def begin_prompt(self) -> None:
        """A new request begins."""
        abi.library().hm_runtime_begin_prompt(self.c)

    def set_limits(self, *, prefetch: bool = True, demand_copies: bool = True, admission: bool = True) -> None:
        """The guard's steps: no prefetch, no demanded copies, a frozen cache."""
        abi.library().hm_runtime_set_limits(self.c, prefetch, demand_copies, admission)

    def set_costs(self, costs: Costs) -> None:
        """New measured costs, of the same layers and devices."""
        abi.call("hm_runtime_set_costs", self.c, costs.c)

    def resize(self, layer: int, n_slots: int, device: int = 0) -> list[tuple[int, int, int, int]]:
        """Changes a pool's size; returns moves (layer, expert, from slot, to slot)."""
        capacity = self.n_layers * self.n_expert
        moves, n = (abi.SlotMoveC * capacity)(), ct.c_int32()
        abi.call("hm_runtime_resize", self.c, layer, device, n_slots, moves, capacity, ct.byref(n))
        return [(m.layer, m.expert, m.from_slot, m.to_slot) for m in moves[: n.value]]

    def lookup(self, layer: int, expert: int) -> tuple[SlotState, int, int]:
        """State, device and slot of an expert."""
        state, device, slot = ct.c_int32(), ct.c_int32(), ct.c_int32()
        abi.call("hm_runtime_lookup", self.c, layer, expert, ct.byref(state), ct.byref(device), ct.byref(slot))
        return SlotState(state.value), device.value, slot.value

    def warm(self, layer: int, expert: int, device: int = 0) -> int:
        """Declares an expert resident (a warm start); returns the slot to fill."""
        slot = ct.c_int32()
        abi.call("hm_runtime_warm", self.c, layer, expert, device, ct.byref(slot))
        return slot.value

    def stats(self) -> dict[str, Any]:
        """Counters since the start; `n_transfers` and `bytes` are per TransferKind, `decision_hash` covers every
        decision."""
        out = abi.RuntimeStatsC()
        abi.library().hm_runtime_get_stats(self.c, ct.byref(out))
        names = [field[0] for field in abi.RuntimeStatsC._fields_]
        return {n: list(v) if isinstance(v := getattr(out, n), ct.Array) else v for n in names}

    def cache_stats(self) -> dict[str, int]:
        """Counters of the cache."""
        out = abi.CacheStatsC()
        abi.library().hm_runtime_get_cache_stats(self.c, ct.byref(out))
        return {name: int(getattr(out, name)) for name in abi.CACHE_STATS}

    def replay(self, log: EventLog, costs: Sequence[Costs] = ()) -> int:
        """Replays recorded events in one call; returns their number. COSTS events index `costs`."""
        events, arrays, keep = log.to_c()
        handles = (ct.c_void_p * max(1, len(costs)))(*(c.c for c in costs))
        done = ct.c_int64()
        try:
            abi.call(
                "hm_runtime_replay_events",
                self.c,
                events,
                len(log),
                ct.byref(arrays),
                handles,
                len(costs),
                ct.byref(done),
            )
        except abi.CoreError as error:
            error.message = f"event {done.value}: {error.message}"
            raise
        del keep
        return done.value

    def simulate(
        self,
        trace: Trace,
        *,
        step_offsets: npt.ArrayLike | None = None,
        gap_us: float = 0.0,
        shared_us: float = 0.0,
        scratch: bool = True,
        lookahead: npt.ArrayLike | None = None,
        keep_layers: bool = True,
    ) -> SimulatedRun:
        """Drives this (fresh) runtime over a trace on a virtual clock; copies take what the cost model says.

        Args:
            step_offsets: [n_steps + 1] tokens of each step; None: one token per step (decode).
            gap_us: attention and all else between two MoE layers.
            shared_us: shared experts, first on device 0 in every layer.
            lookahead: router scores [n_tokens, n_layers, 3, n_expert] for the next three layers.
        """
        import numpy as np

        given = np.arange(trace.n_tokens + 1) if step_offsets is None else step_offsets
        offsets: npt.NDArray[np.int64] = np.ascontiguousarray(given, dtype=np.int64)
        ahead = None if lookahead is None else np.ascontiguousarray(lookahead, dtype=np.float32)
        want = (trace.n_tokens, trace.n_layers, abi.MAX_LOOKAHEAD, trace.n_expert)
        if ahead is not None and ahead.shape != want:
            raise CoreUsageError(f"look-ahead has shape {ahead.shape}, must be {want}")
        options = abi.ClockOptionsC(pointer(offsets), len(offsets) - 1, gap_us, shared_us, scratch, pointer(ahead))
        capacity = (len(offsets) - 1) * trace.n_layers if keep_layers else 0
        rows = np.zeros(capacity, dtype=np.dtype(abi.ClockLayerC))
        out = abi.ClockResultC()
        abi.call(
            "hm_runtime_replay_clock",
            self.c,
            ct.byref(trace.to_c()),
            ct.byref(options),
            pointer(rows) if capacity else None,
            capacity,
            ct.byref(out),
        )
        totals = (out.total_us, out.experts_us, out.cpu_busy_us, out.gpu_busy_us, out.link_busy_us)
        return SimulatedRun(*totals, out.n_layers_run, rows[: min(capacity, out.n_layers_run)])

    def closed_loop(
        self,
        trace: Trace,
        phases: Sequence[MachinePhase],
        n_tokens: int,
        *,
        gap_us: float = 0.0,
        overhead_us: float = 0.0,
        seed: int = 1,
        live: bool = True,
        guard: bool = True,
        trials: bool = True,
        is_told: bool = False,
    ) -> npt.NDArray[Any]:
        """Drives this (fresh) runtime with its governor over a trace: it decides by the costs that it was made with and
        by what it learns, and a virtual machine executes at each phase's costs. Every token is one decoded token.

        Args:
            phases: what is true, in order, the first from token 0 on.
            n_tokens: the trace is repeated until there are so many.
            overhead_us: per layer, of what no plan changes.
            live: costs follow timings; without it nothing is tried either.
            is_told: the runtime is told each phase's costs (the oracle).

        Returns:
            [n_tokens] rows with the fields of hm_loop_token. Times are simulated.
        """
        import numpy as np

        c_phases = (abi.MachinePhaseC * max(1, len(phases)))(*(p.to_c() for p in phases))
        options = abi.LoopOptionsC(
            c_phases, len(phases), n_tokens, gap_us, overhead_us, seed, live, guard, trials, is_told
        )
        rows = np.zeros(n_tokens, dtype=np.dtype(abi.LoopTokenC))
        abi.call("hm_runtime_closed_loop", self.c, ct.byref(trace.to_c()), ct.byref(options), pointer(rows))
        return rows
