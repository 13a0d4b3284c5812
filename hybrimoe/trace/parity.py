"""A live recording replayed: the recorded events drive a fresh runtime, whose decisions must be the engine's.

The simulator never reads recorded hits: routing, completions, cost updates, resizes and guard steps go in, decisions
come out, and only then are they compared with the counters that the engine wrote when it closed the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import UsageError
from hybrimoe.native import core_abi as abi
from hybrimoe.native.core import Costs, Policy
from hybrimoe.native.core_runtime import EventLog, EventType, Runtime
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.events import FIRST_NOTE, Note, StepKind

if TYPE_CHECKING:
    from hybrimoe.trace.format import TraceFile

__all__ = ["Parity", "RecordedLog", "make_runtime", "replay_recorded", "run_of"]


@dataclass(frozen=True)
class Parity:
    """Counters of the engine and of the replay, and the times of both. `equal`: every compared counter agrees."""

    n_events: int
    engine: Mapping[str, Any] | None
    replay: Mapping[str, Any]
    different: tuple[str, ...]
    measured_ms_per_token: float | None
    simulated_ms_per_token: float
    error: float | None  # (simulated - measured) / measured

    @property
    def equal(self) -> bool:
        return self.engine is not None and not self.different


class RecordedLog(EventLog):
    """The recorded events as the core's replay takes them."""

    def __init__(self, trace: TraceFile) -> None:
        import numpy as np

        super().__init__(trace.model.n_expert)
        assert trace.events is not None
        self._rows = trace.events[trace.events["type"] < FIRST_NOTE]
        self._top_k = trace.model.top_k
        self._arrays = trace.event_arrays
        if len(self._rows) and self._rows["type"].max() > max(EventType):
            raise TraceError(
                f"the trace '{trace.path.name}' has events of kind {self._rows['type'].max()}, unknown to this version",
                "update hybrimoe",
            )
        self._ids = np.ascontiguousarray(self._arrays["ids"], dtype=np.int32)  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self._rows)

    def to_c(self) -> tuple[Any, abi.EventArraysC, list[Any]]:
        import numpy as np

        from hybrimoe.native.core import pointer

        events = np.zeros(max(1, len(self._rows)), dtype=np.dtype(abi.EventC))
        if len(self._rows):
            for name in events.dtype.names or ():
                events[name] = self._rows[name]
        floats = {
            n: np.ascontiguousarray(self._arrays.get(n, ()), np.float32) for n in ("weights", "scores", "lookahead")
        }
        arrays = abi.EventArraysC(
            pointer(self._ids),  # type: ignore[arg-type]
            len(self._ids),
            pointer(floats["weights"]) if len(floats["weights"]) else None,
            pointer(floats["scores"]),
            len(floats["scores"]),
            pointer(floats["lookahead"]),
            len(floats["lookahead"]),
        )
        address = (abi.EventC * len(events)).from_address(events.ctypes.data)
        return address, arrays, [events, self._ids, floats]


# Names of `Runtime`'s arguments in a head's `run`, with their defaults; `n_slots` and `costs` have none.
_RUN = {
    "eviction": "lru",
    "admission": "always",
    "schedule": "two-threshold",
    "prefetch": "none",
    "pooled": False,
    "max_window_layers": 1,
    "pay_back": True,
    "preload": False,
}


def run_of(costs: Mapping[str, Any], n_slots: Any, **options: Any) -> dict[str, Any]:
    """The `run` of a head, for the recorder: how its runtime was made. Options are those of `Runtime`."""
    unknown = set(options) - set(_RUN)
    if unknown:
        raise UsageError(f"a recorded run has no option '{sorted(unknown)[0]}'")
    given = {k: str(v) if isinstance(v, Policy) else v for k, v in options.items()}
    return {**_RUN, **given, "n_slots": n_slots, "costs": dict(costs)}


def make_runtime(trace: TraceFile) -> Runtime:
    """A fresh runtime made as the recorded one was."""
    if trace.run is None or trace.events is None:
        raise UsageError(
            f"'{trace.path.name}' is no live recording: it has no events", "record one: hybrimoe chat --trace FILE"
        )
    run = {**_RUN, **trace.run}
    try:
        costs = Costs.from_calibration(run["costs"])
        return Runtime(
            costs, trace.model.n_expert, trace.model.top_k, run["n_slots"], **{name: run[name] for name in _RUN}
        )
    except KeyError as error:
        raise TraceError(
            f"the trace '{trace.path.name}' does not say the {error} of its run", "record it again"
        ) from error


def _n_unplanned(trace: TraceFile) -> int:
    """Tokens of steps whose first layer was not planned."""
    assert trace.events is not None
    routed = trace.events[(trace.events["type"] == Note.ROUTED) & (trace.events["layer"] == 0)]
    return int(routed["n_rows"].sum())


def replay_recorded(trace: TraceFile) -> Parity:
    """Replays a live recording and compares. Raises CoreError naming the event that does not fit."""
    runtime = make_runtime(trace)
    assert trace.events is not None
    n_lost = int(trace.events["a"][trace.events["type"] == Note.DROPPED].sum())
    n_lost = max(n_lost, int((trace.counters or {}).get("n_passes_dropped", 0)))
    if n_lost:
        raise TraceError(
            f"the trace '{trace.path.name}' cannot be replayed: it lacks {n_lost} steps for which there was no room",
            "record again with a smaller -ub; its routing can still be simulated without --recorded",
        )
    log = RecordedLog(trace)
    n_done = runtime.replay(log, [Costs.from_calibration(costs) for costs in trace.costs])
    ours = {**runtime.stats(), "cache": runtime.cache_stats()}
    engine = trace.counters
    different = tuple(name for name in ours if engine is not None and name in engine and engine[name] != ours[name])
    measured = trace.events[(trace.events["type"] == Note.MEASURED) & (trace.events["a"] == 0)]
    layers = trace.events[trace.events["type"] == EventType.LAYER]
    warm_up = trace.events[(trace.events["type"] == Note.STEP) & (trace.events["a"] == StepKind.WARM_UP)]
    # Steps of the warm-up are planned and measured as well, but for the one that learns the layers.
    n = max(1, trace.n_tokens + int(warm_up["n_rows"].sum()) - _n_unplanned(trace))
    gaps_us = float(layers["gap_us"].sum())
    simulated_ms = (float(ours["makespan_us"]) + gaps_us) / n / 1e3
    measured_ms: float | None = None
    if len(measured):
        # CPU and devices work at the same time: the layer took as long as the slower of them, and the waits in it.
        busy = sum(max(float(m["x"]), float(m["y"])) for m in measured)
        measured_ms = (busy + gaps_us) / n / 1e3
    error = (simulated_ms - measured_ms) / measured_ms if measured_ms else None
    return Parity(n_done, engine, ours, different, measured_ms, simulated_ms, error)
