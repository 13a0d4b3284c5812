"""From samples to costs: robust fits (the policy core's), with their residuals, and a reason where they are no good."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe.native.core_calibration import Fit, fit_costs

# A typical error beyond this says that the machine was busy, or that the model of its cost is wrong.
MOST_MEDIAN_ERROR = 0.25


class BadFitError(ValueError):
    """Samples that no cost model fits; the text says why."""


def fit_link(samples: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float] | None:
    """Latency and rate of copies of one kind; None where there are none. Raises BadFitError."""
    rows, times = [], []
    for one in samples:
        if one["kind"] == kind:
            for us in one["us"]:
                rows.append((1.0, float(one["n_bytes"])))
                times.append(us)
    if not rows:
        return None
    fit = _checked(fit_costs(rows, times), f"copies ({kind})")
    if fit.params[1] <= 0:
        raise BadFitError(f"copies ({kind}) take no longer for more bytes")
    return {"latency_us": fit.params[0], "bytes_per_us": 1 / fit.params[1], **_residuals(fit)}


def fit_experts(samples: Sequence[Mapping[str, Any]], what: str) -> dict[str, Any]:
    """A batch's fixed cost and an expert's curve over tokens. Samples: `n_active`, `n_tokens`, `us`.

    An empty batch (`n_active` 0) tells the cost of a step from the extra of the first expert. Raises BadFitError.
    """
    single = [(s["n_active"], us) for s in samples if s["n_tokens"] == 1 and s["n_active"] > 0 for us in s["us"]]
    fit = _checked(fit_costs([(1.0, float(a)) for a, _ in single], [us for _, us in single]), what)
    fixed_us, one_us = fit.params
    if one_us <= 0:
        raise BadFitError(f"{what} take no longer for more experts")
    empty = [us for s in samples if s["n_active"] == 0 for us in s["us"]]
    step_us = min(statistics.median(empty), fixed_us) if empty else fixed_us
    points = [[1.0, one_us]]
    spread = []
    for n_tokens in sorted({s["n_tokens"] for s in samples if s["n_tokens"] > 1}):
        times = [
            (us - fixed_us) / s["n_active"]
            for s in samples
            if s["n_tokens"] == n_tokens and s["n_active"] > 0
            for us in s["us"]
        ]
        us = statistics.median(times)
        spread.append(statistics.median(abs(t / us - 1) for t in times) if us > 0 else 1.0)
        # More tokens never cost less: what falls is noise.
        points.append([float(n_tokens), max(us, points[-1][1])])
    if spread and statistics.median(spread) > MOST_MEDIAN_ERROR:
        raise BadFitError(f"{what} vary by {statistics.median(spread):.0%} from run to run")
    return {"step_us": step_us, "first_us": fixed_us - step_us, "points": points, **_residuals(fit)}


def _checked(fit: Fit, what: str) -> Fit:
    if fit.median_error > MOST_MEDIAN_ERROR:
        raise BadFitError(f"{what} differ from their fit by {fit.median_error:.0%}")
    return fit


def _residuals(fit: Fit) -> dict[str, float]:
    return {"median_error": fit.median_error, "p90_error": fit.p90_error, "n_outliers": fit.n_outliers}


def best_read_rate(samples: Sequence[Mapping[str, float]]) -> tuple[int, float]:
    """(threads, bytes per microsecond) of the fastest reads."""
    best = max(samples, key=lambda s: s["bytes_per_us"])
    return int(best["n_threads"]), float(best["bytes_per_us"])


def fit_all(samples: Mapping[str, Any]) -> dict[str, Any]:
    """The whole probe. A device without a good fit is None, with its reason in `reasons`.

    Raises BadFitError when the CPU's own samples fit nothing: then there is no cost model at all.
    """
    reasons = list(samples["failures"])
    cpu = []
    for one in samples["cpu"]:
        threads = sorted({s["n_threads"] for s in one["samples"]})
        by_threads = {}
        for n in threads:
            mine = [s for s in one["samples"] if s["n_threads"] == n]
            by_threads[str(n)] = fit_experts(mine, f"experts on {n} CPU threads")
            times = [us / s["n_nodes"] for s in one["nodes"] if s["n_threads"] == n for us in s["us"]]
            by_threads[str(n)]["node_us"] = statistics.median(times)
            rates = [s["n_bytes"] / us for s in one["dense"] if s["n_threads"] == n for us in s["us"]]
            by_threads[str(n)]["dense_bytes_per_us"] = statistics.median(rates)
        cpu.append({"shape": one["shape"], "by_threads": by_threads})
    devices = []
    for one in samples["devices"]:
        try:
            devices.append(None if one is None else _fit_device(one))
        except BadFitError as error:
            reasons.append(str(error))
            devices.append(None)
    disk = samples["disk"]
    return {
        "cpu": cpu,
        "devices": devices,
        "read_bytes_per_us": {str(int(s["n_threads"])): s["bytes_per_us"] for s in samples["read"]},
        "disk_bytes_per_us": None if disk is None else disk["n_bytes"] / disk["us"],
        "reasons": reasons,
    }


def _fit_device(one: Mapping[str, Any]) -> dict[str, Any]:
    copies = {kind: fit_link(one["copies"], kind) for kind in ("h2d_pinned", "h2d_pageable", "d2h_pinned")}
    together = one["together"]
    return {
        "device": one["device"],
        "copies": copies,
        "sync_us": statistics.median(one["sync_us"]),
        "dram_bytes_per_us": together["read_bytes_per_us"] + together["copy_bytes_per_us"],
        "experts": [{"shape": e["shape"], **fit_experts(e["samples"], "experts on the card")} for e in one["experts"]],
    }
