"""One replay: a trace, a policy, a size, and perhaps a machine. Everything that decides is the core's own code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import UsageError
from hybrimoe.native.core import Costs, Kind, Policy
from hybrimoe.native.core_replay import Trace, replay_cache
from hybrimoe.native.core_runtime import Runtime, TransferKind
from hybrimoe.simulate.grid import Point, describe

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hybrimoe.trace.format import TraceFile

__all__ = ["Loaded", "Row", "machine_costs", "make_lookahead", "replay", "steps_of"]

# Look-ahead arrays of float32; beyond this a trace should be cut into fewer prompts.
_MAX_LOOKAHEAD_BYTES = 3 << 30


@dataclass(frozen=True)
class Row:
    """Result of one replay. Times are simulated; None where the replay has no clock, or the trace does not know.

    Counts are over the whole replay; `bytes_moved` are copies to devices, whatever for.
    """

    trace: str
    model: str
    policy: str
    n_slots: int
    size: str
    cache_fraction: float
    cache_bytes: int | None
    mode: str  # event-atomic or clock
    cold: bool
    admission: str
    n_tokens: int
    queries: int
    hits: int
    hit_rate: float
    loads: int
    bytes_moved: float | None
    belady_hits: int
    of_belady: float
    profile: str | None = None
    schedule: str | None = None
    prefetch: str | None = None
    lookahead: str | None = None
    ms_per_token: float | None = None
    tokens_per_s: float | None = None
    prefill_ms_per_token: float | None = None
    decode_ms_per_token: float | None = None
    gap_us: float | None = None
    stall_ms_per_token: float | None = None
    cpu_busy: float | None = None
    gpu_busy: float | None = None
    link_busy: float | None = None
    experts_cpu: int | None = None
    experts_gpu: int | None = None
    demand_bytes: float | None = None
    admit_bytes: float | None = None
    prefetch_bytes: float | None = None
    prefetch_useful_bytes: float | None = None
    prefetch_wasted_bytes: float | None = None
    prefetch_switches: int | None = None
    limit_ms_per_token: float | None = None  # of a decoded token
    of_limit: float | None = None

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]


class Loaded:
    """A trace ready to be replayed many times; what the oracles reach is computed once per size."""

    def __init__(self, trace: TraceFile) -> None:
        self.trace = trace
        self.core = trace.trace()
        self._oracles: dict[tuple[str, int, bool], int] = {}

    def oracle_hits(self, name: str, n_slots: int, cold: bool) -> int:
        key = name, n_slots, cold
        if key not in self._oracles:
            self._oracles[key] = replay_cache(self.core, name, n_slots, cold=cold).n_hits
        return self._oracles[key]


def replay(point: Point, loaded: Loaded) -> Row:
    """Runs one point. The same point and trace give the same row, whatever runs beside.

    Raises:
        UsageError: the policy needs scores or look-ahead that the trace does not have.
        CoreError: what the core refuses.
    """
    trace = loaded.trace
    info = describe(Kind.EVICTION, Policy.parse(point.policy).name)
    if info.needs_scores and trace.scores is None and trace.weights is None:
        raise UsageError(
            f"--cache-policy {info.name} needs router scores, and '{trace.path.name}' has none",
            "record them: hybrimoe trace record",
        )
    return _event_atomic(point, loaded) if point.machine is None or info.oracle else _clock(point, loaded)


def _common(point: Point, trace: TraceFile) -> dict[str, Any]:
    m = trace.model
    return {
        "trace": trace.path.name,
        "model": m.name,
        "policy": point.policy,
        "n_slots": point.n_slots,
        "size": point.size,
        "cache_fraction": point.n_slots / m.n_expert,
        "cache_bytes": point.n_slots * sum(m.expert_bytes) if m.knows_bytes else None,
        "cold": point.cold,
        "admission": point.admission,
        "n_tokens": trace.n_tokens,
    }


def _event_atomic(point: Point, loaded: Loaded) -> Row:
    trace, core = loaded.trace, loaded.core
    costs = None
    if describe(Kind.ADMISSION, Policy.parse(point.admission).name).needs_costs:
        if point.machine is None:
            raise UsageError(f"--admission {point.admission} needs a machine", "--profile NAME")
        costs = machine_costs(point.machine, trace)[0]
    result = replay_cache(core, point.policy, point.n_slots, cold=point.cold, admission=point.admission, costs=costs)
    belady = _belady_hits(point, loaded)
    # Loads per layer are not counted apart; layers of different sizes are moved in proportion to their misses.
    moved: float | None = None
    if trace.model.knows_bytes:
        misses = [q - h for q, h in zip(result.queries_per_layer, result.hits_per_layer, strict=True)]
        share = result.n_loads / max(1, sum(misses))
        moved = share * sum(n * b for n, b in zip(misses, trace.model.expert_bytes, strict=True))
    return Row(
        **_common(point, trace),
        mode="event-atomic",
        queries=result.n_queries,
        hits=result.n_hits,
        hit_rate=result.hit_rate,
        loads=result.n_loads,
        bytes_moved=moved,
        belady_hits=belady,
        of_belady=result.n_hits / belady if belady else math.nan,
        profile=point.machine.partition("@")[0] if point.machine else None,
    )


def _belady_hits(point: Point, loaded: Loaded) -> int:
    # A policy that may refuse a miss is compared with the oracle that may refuse as well.
    bypass = point.admission != "always" or Policy.parse(point.policy).name in ("static", "belady-bypass")
    return loaded.oracle_hits("belady-bypass" if bypass else "belady", point.n_slots, point.cold)


def machine_costs(machine: str, trace: TraceFile) -> tuple[Costs, float | None]:
    """Costs of the trace's model on a machine (preset, machine file or calibration), and the gap between layers.

    The gap is None where the trace does not know the bytes of the model's dense weights.
    """
    from hybrimoe.machine.files import open_machine

    found = open_machine(machine)
    return found.costs(trace.model).costs(), found.gap_us(trace.model)


def steps_of(trace: TraceFile, n_ubatch: int) -> npt.NDArray[np.int64]:
    """[n_steps + 1] tokens of each step: prompt tokens in steps of `n_ubatch`, decoded ones alone.

    A trace that does not say which is which is replayed as decode, token by token.
    """
    import numpy as np

    if trace.is_decode is None:
        return np.arange(trace.n_tokens + 1, dtype=np.int64)
    offsets = [0]
    bounds = set(trace.prompt_offsets.tolist())
    for token in range(1, trace.n_tokens + 1):
        first = offsets[-1]
        begins = token in bounds or token == trace.n_tokens
        phase_ends = begins or trace.is_decode[token] or trace.is_decode[token - 1]
        if phase_ends or token - first >= n_ubatch:
            offsets.append(token)
    return np.array(offsets, dtype=np.int64)


def make_lookahead(trace: TraceFile, kind: str) -> npt.NDArray[np.float32] | None:
    """Scores [n_tokens, n_layers, 3, n_expert] of the next three layers.

    Args:
        kind: `recorded`; `perfect`: the true experts of the coming layers; `recall=R`: each of them is foreseen with
            probability R, and a wrong expert otherwise (a fixed seed: the same every time).

    Raises:
        UsageError: another kind, or the arrays would not fit into memory.
    """
    import numpy as np

    if kind == "recorded":
        return trace.lookahead
    recall = 1.0
    if kind != "perfect":
        name, _, value = kind.partition("=")
        try:
            recall = float(value)
        except ValueError:
            recall = math.nan
        if name != "recall" or not 0 <= recall <= 1:
            raise UsageError(f"--lookahead: '{kind}' is not known", "recorded, perfect, or recall=0.8")
    n, layers, top_k = trace.experts.shape
    n_expert = trace.model.n_expert
    if n * layers * 3 * n_expert * 4 > _MAX_LOOKAHEAD_BYTES:
        raise UsageError(f"look-ahead for {n} tokens takes too much memory", "use fewer prompts: --prompts N")
    rng = np.random.default_rng(0)
    out = np.zeros((n, layers, 3, n_expert + 1), np.float32)
    for distance in range(1, min(4, layers)):
        ids = trace.experts[:, distance:]
        wrong = rng.random(ids.shape) >= recall
        other = rng.integers(0, n_expert, ids.shape)
        chosen = np.where(wrong, other, ids)
        chosen = np.where(ids < 0, n_expert, chosen)
        # The router's own order: the first expert has the largest score.
        scores = np.broadcast_to(np.linspace(1.0, 0.5, top_k, dtype=np.float32) / top_k, ids.shape)
        np.put_along_axis(out[:, : layers - distance, distance - 1], chosen, scores, axis=2)
    return np.ascontiguousarray(out[..., :-1])


@dataclass
class _Totals:
    """Sums over the runs of a clock replay (one run, or one per prompt when cold)."""

    total_us: float = 0.0
    cpu_us: float = 0.0
    gpu_us: float = 0.0
    link_us: float = 0.0
    prefill_us: float = 0.0
    decode_us: float = 0.0
    n_prefill: int = 0
    n_decode: int = 0

    def add(self, run: Any, steps: npt.NDArray[np.int64], gap_us: float) -> None:
        import numpy as np

        self.total_us += run.total_us
        self.cpu_us += run.cpu_busy_us
        self.gpu_us += run.gpu_busy_us
        self.link_us += run.link_busy_us
        per_step = np.bincount(run.layers["step"], run.layers["makespan_us"] + gap_us, minlength=len(steps) - 1)
        sizes = np.diff(steps)
        several = sizes > 1
        self.prefill_us += float(per_step[several].sum())
        self.decode_us += float(per_step[~several].sum())
        self.n_prefill += int(sizes[several].sum())
        self.n_decode += int((~several).sum())


def _runs(point: Point, core: Trace) -> list[tuple[int, int, Trace]]:
    """(first token, last token, trace) of each run: everything, or one prompt after the other from a cold cache."""
    if not point.cold:
        return [(0, core.n_tokens, core)]
    runs = []
    for tokens in core.prompts():
        if tokens.stop > tokens.start:
            part = Trace(
                core.experts[tokens],
                core.n_expert,
                weights=None if core.weights is None else core.weights[tokens],
                scores=None if core.scores is None else core.scores[tokens],
            )
            runs.append((tokens.start, tokens.stop, part))
    return runs


def _clock(point: Point, loaded: Loaded) -> Row:
    import numpy as np

    trace, core = loaded.trace, loaded.core
    assert point.machine is not None
    costs, known_gap_us = machine_costs(point.machine, trace)
    gap_us = point.gap_us if point.gap_us is not None else known_gap_us or 0.0
    lookahead = _lookahead_for(point, trace)
    steps = steps_of(trace, point.n_ubatch)
    totals, stats, cache = _Totals(), [], []
    for first, last, part in _runs(point, core):
        here = steps[np.searchsorted(steps, first) : np.searchsorted(steps, last) + 1] - first
        runtime = Runtime(
            costs,
            core.n_expert,
            core.top_k,
            point.n_slots if costs.n_devices else [],
            eviction=point.policy,
            admission=point.admission,
            schedule=point.schedule,
            prefetch=point.prefetch,
            max_window_layers=point.max_window_layers,
            pay_back=point.pay_back,
            preload=True,
        )
        ahead = None if lookahead is None else lookahead[first:last]
        run = runtime.simulate(part, step_offsets=here, gap_us=gap_us, lookahead=ahead)
        totals.add(run, here, gap_us)
        stats.append(runtime.stats())
        cache.append(runtime.cache_stats())
    return _clock_row(point, loaded, gap_us, totals, _sum(stats), _sum(cache))


def _lookahead_for(point: Point, trace: TraceFile) -> npt.NDArray[np.float32] | None:
    info = describe(Kind.PREFETCH, Policy.parse(point.prefetch).name)
    if not info.needs_scores:
        return None
    lookahead = make_lookahead(trace, point.lookahead)
    if lookahead is None:
        raise UsageError(
            f"--prefetch {info.name} needs look-ahead scores, and '{trace.path.name}' has none",
            "record them, or assume some: --lookahead perfect or --lookahead recall=0.8",
        )
    return lookahead


def _sum(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums of counters; lists item by item."""
    out: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [p[name] for p in parts]
        out[name] = [sum(v) for v in zip(*values, strict=True)] if isinstance(value, list) else sum(values)
    return out


def _clock_row(
    point: Point,
    loaded: Loaded,
    gap_us: float,
    totals: _Totals,
    stats: dict[str, Any],
    cache: dict[str, Any],
) -> Row:
    from hybrimoe.simulate.limits import limit_us_per_token

    trace, core = loaded.trace, loaded.core
    n = core.n_tokens
    queries = stats["n_hits"] + stats["n_misses"]
    # Steps of several tokens ask for an expert once, so the oracle's hits per query are compared, not its counts.
    belady = _belady_hits(point, loaded)
    asked = int((core.experts >= 0).sum())
    rate = stats["n_hits"] / max(1, queries)
    ms = totals.total_us / n / 1e3
    decode_ms = totals.decode_us / totals.n_decode / 1e3 if totals.n_decode else None
    limit_us = limit_us_per_token(point, loaded, gap_us)
    kinds = stats["bytes"]
    return Row(
        **_common(point, trace),
        mode="clock",
        queries=queries,
        hits=stats["n_hits"],
        hit_rate=rate,
        loads=cache["n_loads"],
        bytes_moved=float(sum(kinds)),
        belady_hits=belady,
        of_belady=rate / (belady / asked) if belady else math.nan,
        profile=point.machine.partition("@")[0] if point.machine else None,
        schedule=point.schedule,
        prefetch=point.prefetch,
        lookahead=point.lookahead if point.prefetch != "none" else None,
        ms_per_token=ms,
        tokens_per_s=1e3 / ms if ms else math.nan,
        prefill_ms_per_token=totals.prefill_us / totals.n_prefill / 1e3 if totals.n_prefill else None,
        decode_ms_per_token=decode_ms,
        gap_us=gap_us,
        stall_ms_per_token=stats["stall_us"] / n / 1e3,
        cpu_busy=totals.cpu_us / totals.total_us,
        gpu_busy=totals.gpu_us / totals.total_us,
        link_busy=totals.link_us / totals.total_us,
        experts_cpu=stats["n_cpu"],
        experts_gpu=stats["n_gpu"],
        demand_bytes=kinds[TransferKind.DEMAND] + kinds[TransferKind.SCRATCH],
        admit_bytes=kinds[TransferKind.ADMIT],
        prefetch_bytes=kinds[TransferKind.PREFETCH],
        prefetch_useful_bytes=stats["prefetch_useful_bytes"],
        prefetch_wasted_bytes=stats["prefetch_wasted_bytes"],
        prefetch_switches=stats["n_prefetch_switches"],
        limit_ms_per_token=limit_us / 1e3,
        of_limit=limit_us / 1e3 / decode_ms if decode_ms else None,
    )
