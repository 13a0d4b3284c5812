"""From a recording to figures: time per layer and phase, who was busy, what limits, how good the predictions were."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrimoe.profiling.limits import critical_path, describe_limit
from hybrimoe.trace.events import Note, StepKind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hybrimoe.profiling.run import Facts
    from hybrimoe.trace.format import TraceFile

__all__ = ["PHASES", "Blocks", "Copies", "analyse", "blocks_of", "copies_of"]

PHASES: Mapping[str, StepKind] = {"prefill": StepKind.PREFILL, "decode": StepKind.DECODE}
# Columns of `Blocks.ends` (docs/trace-format.md, PHASES).
BEGIN, ROUTER, PLAN, LAUNCH, CPU, WAIT, MERGE, GPU = range(8)
_LAYER_TIMES = {
    "router_us": ROUTER,
    "plan_us": PLAN,
    "launch_us": LAUNCH,
    "cpu_us": CPU,
    "wait_us": WAIT,
    "merge_us": MERGE,
}


@dataclass
class Blocks:
    """Every layer's block of every step that was no warm-up, in order; arrays of equal length, times in us.

    `ends` [n, 8] are moments: begin, router, plan, launch, CPU, wait, merge, GPU. `step` counts the steps; `kind` is a
    StepKind. `copy_wait` is how much of the wait went by while a copy that the block needed was on the link.
    """

    layer: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int64]
    n_rows: npt.NDArray[np.int64]
    n_cpu: npt.NDArray[np.int64]
    n_gpu: npt.NDArray[np.int64]
    planned: npt.NDArray[np.bool_]
    gpu_is_known: npt.NDArray[np.bool_]
    ends: npt.NDArray[np.float64]
    gpu_busy: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.float64]
    copy_wait: npt.NDArray[np.float64]

    def of(self, kind: int) -> npt.NDArray[np.bool_]:
        chosen: npt.NDArray[np.bool_] = self.kind == kind
        return chosen

    def took(self, phase: int) -> npt.NDArray[np.float64]:
        """Microseconds of one phase of every block."""
        took: npt.NDArray[np.float64] = self.ends[:, phase] - self.ends[:, phase - 1]
        return took

    @property
    def observed(self) -> npt.NDArray[np.float64]:
        """From when the accelerators were started until all experts were computed, as the plug-in counts it."""
        observed: npt.NDArray[np.float64] = self.ends[:, WAIT] - self.ends[:, LAUNCH]
        return observed


@dataclass
class Copies:
    """Copies to accelerators that ended, in the order of their ends; times in us, `kind` as in TRANSFER events."""

    layer: npt.NDArray[np.int64]
    expert: npt.NDArray[np.int64]
    device: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int64]
    begin: npt.NDArray[np.float64]
    end: npt.NDArray[np.float64]
    n_bytes: npt.NDArray[np.float64]
    step: npt.NDArray[np.int64]
    step_kind: npt.NDArray[np.int64]


def _steps(events: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Step of each event (-1 before the first one), and kind and begin of each step."""
    import numpy as np

    is_step = events["type"] == Note.STEP
    return np.cumsum(is_step) - 1, events["a"][is_step].astype(np.int64), events["now_us"][is_step]


def copies_of(trace: TraceFile) -> Copies:
    """The copies of a recording; empty where there was no accelerator."""
    import numpy as np

    events = trace.events
    assert events is not None
    _, kinds, begins = _steps(events)
    issued = events[events["type"] == Note.TRANSFER]
    ended = events[events["type"] == Note.COPIED]
    order = np.argsort(issued["id"], kind="stable")
    at = np.searchsorted(issued["id"], ended["id"], sorter=order)
    known = at < len(issued)
    at, ended = order[at[known]] if len(issued) else at[:0], ended[known]
    same = issued["id"][at] == ended["id"]
    at, ended = at[same], ended[same]
    step = np.searchsorted(begins, ended["x"], side="right") - 1
    kind = np.where(step >= 0, kinds[step] if len(kinds) else -1, -1)
    kept = (step >= 0) & (kind != StepKind.WARM_UP)
    of = issued[at]
    return Copies(
        of["layer"][kept].astype(np.int64),
        of["a"][kept].astype(np.int64),
        of["b"][kept].astype(np.int64),
        of["c"][kept].astype(np.int64),
        ended["x"][kept],
        ended["y"][kept],
        ended["z"][kept],
        step[kept].astype(np.int64),
        kind[kept].astype(np.int64),
    )


def blocks_of(trace: TraceFile, copies: Copies) -> Blocks:
    """The blocks of a recording. Layers count from 0 over the MoE layers, as in the trace."""
    import numpy as np

    events = trace.events
    assert events is not None
    step, kinds, _ = _steps(events)
    chosen = (events["type"] == Note.PHASES) & (step >= 0)
    chosen[chosen] = kinds[step[chosen]] != StepKind.WARM_UP
    e, step = events[chosen], step[chosen]
    blocks = Blocks(
        e["layer"].astype(np.int64),
        step.astype(np.int64),
        kinds[step].astype(np.int64),
        e["n_rows"].astype(np.int64),
        e["a"].astype(np.int64),
        e["b"].astype(np.int64),
        (e["c"] & 1) != 0,
        (e["c"] & 2) != 0,
        e["gpu_ready_us"].astype(np.float64),
        e["y"].astype(np.float64),
        e["x"].astype(np.float64),
        np.zeros(len(e)),
    )
    _find_copy_waits(blocks, copies)
    return blocks


def _find_copy_waits(blocks: Blocks, copies: Copies) -> None:
    import numpy as np

    by_layer = {int(n): np.flatnonzero(copies.layer == n) for n in np.unique(copies.layer)}
    waits = blocks.took(WAIT)
    for i in np.flatnonzero(waits > 1.0):
        mine = by_layer.get(int(blocks.layer[i]))
        if mine is None:
            continue
        begin, end = blocks.ends[i, CPU], blocks.ends[i, WAIT]
        # Copies of one layer follow each other on the link, so their overlaps with the wait add up.
        overlap = np.minimum(copies.end[mine], end) - np.maximum(copies.begin[mine], begin)
        blocks.copy_wait[i] = min(float(np.maximum(overlap, 0.0).sum()), end - begin)


def analyse(trace: TraceFile, facts: Facts, about: Mapping[str, Any]) -> dict[str, Any]:
    """The profile as JSON-able data.

    Args:
        about: `model`, `machine`, `settings`, `dense_on` ('CPU' or 'GPU'), `expert_bytes` per MoE layer, and whatever
            else is to stand in the profile.
    """
    copies = copies_of(trace)
    blocks = blocks_of(trace, copies)
    layers = list(trace.model.layers or range(trace.model.n_layers))
    profile: dict[str, Any] = {
        "format": 1,
        **{name: value for name, value in about.items() if name != "expert_bytes"},
        "texts": [{"domain": r.domain, "n_prompt": r.n_prompt, "n_decode": len(r.decode_ns)} for r in facts.runs],
        "interrupted": facts.interrupted,
        "phases": {},
    }
    for name, kind in PHASES.items():
        made = _phase(name, int(kind), blocks, copies, facts, layers, about)
        if made is not None:
            profile["phases"][name] = made
    profile["prefetch"] = _prefetch(facts)
    profile["prediction"] = _prediction(facts, profile["phases"], about)
    profile["guard"] = facts.state.get("guard")
    profile["heat"] = heat_of(trace)
    profile["events"] = facts.events
    profile["verified"] = facts.verified
    return profile


def _phase(
    name: str,
    kind: int,
    blocks: Blocks,
    copies: Copies,
    facts: Facts,
    layers: list[int],
    about: Mapping[str, Any],
) -> dict[str, Any] | None:
    chosen = blocks.of(kind)
    is_decode = name == "decode"
    walls_us = [ns / 1e3 for r in facts.runs for ns in (r.decode_ns if is_decode else [r.prompt_ns])]
    n_tokens = len(walls_us) if is_decode else sum(r.n_prompt for r in facts.runs)
    if not chosen.any() or not n_tokens:
        return None
    wall_us = sum(walls_us)
    sums = _sums(facts.counts[name].values())
    experts_us = float((blocks.ends[chosen, MERGE] - blocks.ends[chosen, BEGIN]).sum())
    times = {
        "dense_us": max(0.0, wall_us - experts_us),
        "router_us": float(blocks.took(ROUTER)[chosen].sum()),
        "plan_us": float(blocks.took(PLAN)[chosen].sum()),
        "launch_us": float(blocks.took(LAUNCH)[chosen].sum()),
        "cpu_us": float(blocks.took(CPU)[chosen].sum()),
        "wait_us": float(blocks.took(WAIT)[chosen].sum()),
        "copy_wait_us": float(blocks.copy_wait[chosen].sum()),
        "merge_us": float(blocks.took(MERGE)[chosen].sum()),
        "gpu_busy_us": float(blocks.gpu_busy[chosen].sum()),
    }
    mine = copies.step_kind == kind
    link_us = float((copies.end[mine] - copies.begin[mine]).sum())
    n_devices = max(1, len(about["devices"]))
    path = critical_path(times, computes_inside_launch=about["devices_are_cpus"])
    dense_on = about["dense_on"]
    computing = sum(times[n] for n in ("router_us", "plan_us", "merge_us", "cpu_us"))
    if not about["devices_are_cpus"]:
        computing += times["launch_us"]
    busy = {
        "CPU": (computing + (times["dense_us"] if dense_on == "CPU" else 0.0)) / wall_us,
        "GPU": (times["gpu_busy_us"] / n_devices + (times["dense_us"] if dense_on == "GPU" else 0.0)) / wall_us,
        "link": link_us / n_devices / wall_us,
    }
    has_device = bool(about["devices"])
    if not has_device:
        del busy["GPU"], busy["link"]
    queries = sums["n_hits"] + sums["n_misses"]
    result: dict[str, Any] = {
        "n_tokens": n_tokens,
        "n_steps": len({int(s) for s in blocks.step[chosen]}),
        "wall_ms": wall_us / 1e3,
        "tokens_per_s": 1e6 * n_tokens / wall_us,
        "ms_per_token": wall_us / n_tokens / 1e3,
        "median_ms_per_token": statistics.median(walls_us) / 1e3 if is_decode else None,
        "time_us_per_token": {n: us / n_tokens for n, us in times.items()},
        "critical_us_per_token": {n: us / n_tokens for n, us in path.items()},
        "busy": {n: min(1.0, share) for n, share in busy.items()},
        "gpu_time_is_measured": bool(blocks.gpu_is_known[chosen & (blocks.n_gpu > 0)].all()),
        "experts": {
            **{n: round(v) for n, v in sums.items()},
            "hit_rate": sums["n_hits"] / queries if queries else None,
            "gpu_share": sums["n_experts_gpu"] / max(1.0, sums["n_experts_gpu"] + sums["n_experts_cpu"]),
            "h2d_bytes_per_token": sums["h2d_bytes"] / n_tokens,
            "cpu_bytes_per_s": _cpu_bytes(facts, name, layers, about) / max(1e-9, times["cpu_us"]) * 1e6,
        },
        "layers": _layers(kind, blocks, copies, facts.counts[name], layers),
    }
    result["limit"] = describe_limit(name, path, result, dense_on, [d["label"] for d in about["devices"]])
    return result


def _sums(layers: Any) -> dict[str, float]:
    from hybrimoe.profiling.run import COUNTS

    sums = dict.fromkeys(COUNTS, 0.0)
    for counts in layers:
        for name in sums:
            sums[name] += counts[name]
    return sums


def _cpu_bytes(facts: Facts, phase: str, layers: list[int], about: Mapping[str, Any]) -> float:
    """Bytes of expert weights that the CPU read, each expert once for each step that used it."""
    sizes = dict(zip(layers, about["expert_bytes"], strict=False))
    return float(sum(c["n_experts_cpu"] * sizes.get(layer, 0) for layer, c in facts.counts[phase].items()))


def _layers(
    kind: int,
    blocks: Blocks,
    copies: Copies,
    counts: Mapping[int, Mapping[str, float]],
    layers: list[int],
) -> list[dict[str, Any]]:
    """Means per block of each layer, and its counts."""
    import numpy as np

    found = []
    for number, index in enumerate(layers):
        chosen = blocks.of(kind) & (blocks.layer == number)
        if not chosen.any():
            continue
        mine = (copies.layer == number) & (copies.step_kind == kind)
        n = int(chosen.sum())
        c = counts.get(index, {})
        queries = c.get("n_hits", 0.0) + c.get("n_misses", 0.0)
        on_gpu = chosen & (blocks.n_gpu > 0)
        planned = chosen & blocks.planned
        found.append(
            {
                "layer": index,
                "n_blocks": n,
                **{name: float(blocks.took(column)[chosen].mean()) for name, column in _LAYER_TIMES.items()},
                "gpu_us": float((blocks.ends[on_gpu, GPU] - blocks.ends[on_gpu, PLAN]).sum()) / n,
                "copies_us": float((copies.end[mine] - copies.begin[mine]).sum()) / n,
                "total_us": float((blocks.ends[chosen, MERGE] - blocks.ends[chosen, BEGIN]).mean()),
                "predicted_us": float(blocks.predicted[planned].mean()) if planned.any() else None,
                "observed_us": float(np.mean(blocks.observed[chosen])),
                "hit_rate": c["n_hits"] / queries if queries else None,
                **{k: round(c.get(k, 0.0)) for k in ("n_experts_cpu", "n_experts_gpu", "n_evictions", "h2d_bytes")},
            }
        )
    return found


def _prefetch(facts: Facts) -> dict[str, float]:
    issued = sum(c["n_prefetched"] for phase in facts.counts.values() for c in phase.values())
    return {"n_issued": issued, **facts.stats}


def _prediction(facts: Facts, phases: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Decode: what the plans or the calibration said of each layer's experts, and what they took."""
    rows = facts.predictions
    if about["devices_are_cpus"] and "decode" in phases:
        # The plug-in's own counters begin when the accelerators are started: for such devices, when they are done.
        rows = [
            {
                "layer": layer["layer"],
                "n_steps": layer["n_blocks"],
                "predicted_us": layer["predicted_us"],
                "observed_us": layer["launch_us"] + layer["observed_us"],
            }
            for layer in phases["decode"]["layers"]
            if layer["predicted_us"]
        ]
    if not rows:
        return None
    return {
        "median_error": statistics.median(abs(p["predicted_us"] / p["observed_us"] - 1.0) for p in rows),
        "token_predicted_us": sum(p["predicted_us"] for p in rows),
        "token_observed_us": sum(p["observed_us"] for p in rows),
        "layers": rows,
    }


def heat_of(trace: TraceFile) -> dict[str, list[list[int]]]:
    """How often each expert was asked for, [layer][expert], in prefill and decode."""
    import numpy as np

    m = trace.model
    is_decode = trace.is_decode if trace.is_decode is not None else np.ones(trace.n_tokens, np.uint8)
    heat = {}
    for name, wanted in (("prefill", 0), ("decode", 1)):
        chosen = trace.experts[is_decode == wanted]
        rows = []
        for layer in range(m.n_layers):
            ids = chosen[:, layer].reshape(-1)
            rows.append(np.bincount(ids[ids >= 0], minlength=m.n_expert).tolist())
        heat[name] = rows
    return heat
