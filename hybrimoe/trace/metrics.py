"""What a trace says about its model: does it cache well, can its experts be foreseen? No clock, no machine.

Formulas: SRP and SCH from arXiv 2505.16056 (moe-lrc); the path table from EdgeMoE (arXiv 2308.14352).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hybrimoe.native.core_replay import Trace, replay_cache, replay_recall

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hybrimoe.trace.format import TraceFile

__all__ = ["Metrics", "adjacent_overlap", "lookahead_recall", "measure", "reuse_distances", "sch", "srp", "working_set"]

_WINDOWS = (16, 64, 256)
_SRP_WINDOW = 16
# A cache of 2 x top-k slots is the sweet spot of moe-lrc.
_SLOTS_PER_TOP_K = 2
# Advice: hits beyond what any fixed choice of as many experts would have; below this the routing is near uniform.
_NEAR_UNIFORM = 0.05
_CACHES_WELL = 0.75


@dataclass(frozen=True)
class Metrics:
    """Figures of one trace; shares and rates are 0..1. Lists have one entry per MoE layer."""

    n_tokens: int
    srp: dict[int, float]  # window in tokens: segment routing best performance
    sch: float  # hit rate of a cache that knows the next 16 tokens
    sch_slots: int
    overlap: float  # experts that the token before used too, in the same layer
    overlap_uniform: float  # what independent uniform routing would give
    skew: float  # share of all activations that the busiest quarter of a layer's experts takes
    entropy: float  # of a layer's use, 1: uniform
    skew_per_layer: list[float]
    entropy_per_layer: list[float]
    reuse_median: float  # tokens until an expert is used again
    reuse_p90: float
    lookahead_recall: dict[int, dict[int, float]]  # distance: experts looked at: recall; empty: not recorded
    path_recall: dict[int, float]  # experts looked at: recall at distance 1, learned over the first half
    working_set: dict[int, float]  # window in tokens: different experts of a layer
    hits_lru: float  # at sch_slots
    hits_belady: float
    advice: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(trace: TraceFile) -> Metrics:
    """All metrics of a trace. The first half of the tokens is what the path table learns from."""
    import numpy as np

    core = trace.trace()
    top_k, n_expert = core.top_k, core.n_expert
    slots = min(n_expert, _SLOTS_PER_TOP_K * top_k)
    uses = _uses(core)
    share = uses / np.maximum(1, uses.sum(axis=1, keepdims=True))
    quarter = max(1, n_expert // 4)
    skew = np.sort(share, axis=1)[:, -quarter:].sum(axis=1)
    bits = -np.sum(np.where(share > 0, share * np.log2(np.where(share > 0, share, 1)), 0), axis=1)
    entropy = bits / math.log2(n_expert) if n_expert > 1 else np.zeros(len(bits))
    reuse = reuse_distances(core)
    best = sorted({top_k, min(n_expert, 2 * top_k), min(n_expert, max(1, n_expert // 4))})
    lru, belady = (replay_cache(core, name, slots).hit_rate for name in ("lru", "belady"))
    path: dict[int, float] = {}
    if core.n_layers > 1 and core.n_tokens > 1:
        found = replay_recall(core, "path", best, n_warm_tokens=core.n_tokens // 2)
        path = dict(zip(best, found, strict=True))
    return Metrics(
        n_tokens=core.n_tokens,
        srp={m: srp(core, m) for m in _WINDOWS},
        sch=sch(core, slots, _SRP_WINDOW),
        sch_slots=slots,
        overlap=adjacent_overlap(core),
        overlap_uniform=top_k / n_expert,
        skew=float(skew.mean()),
        entropy=float(entropy.mean()),
        skew_per_layer=[float(x) for x in skew],
        entropy_per_layer=[float(x) for x in entropy],
        reuse_median=float(np.median(reuse)) if len(reuse) else math.nan,
        reuse_p90=float(np.quantile(reuse, 0.9)) if len(reuse) else math.nan,
        lookahead_recall=lookahead_recall(trace, best),
        path_recall=path,
        working_set={m: working_set(core, m) for m in _WINDOWS},
        hits_lru=lru,
        hits_belady=belady,
        advice=_advice(slots, n_expert, lru, belady),
    )


def _advice(slots: int, n_expert: int, lru: float, belady: float) -> str:
    size = f"{slots} slots per layer (2 x top-k of {n_expert} experts)"
    reached = lru / belady if belady else 0.0
    if lru - slots / n_expert < _NEAR_UNIFORM:
        return f"near uniform: {size} hit {lru:.0%} with LRU, hardly more than chance: rely on CPU co-execution"
    if reached >= _CACHES_WELL:
        return f"caches well: {size} hit {lru:.0%} with LRU, {reached:.0%} of Belady"
    return f"caches fairly: {size} hit {lru:.0%} with LRU, {reached:.0%} of Belady: a better policy or prefetch may pay"


def _uses(trace: Trace) -> npt.NDArray[np.int64]:
    """Activations [n_layers, n_expert]."""
    import numpy as np

    out = np.zeros((trace.n_layers, trace.n_expert), np.int64)
    for layer in range(trace.n_layers):
        ids = trace.experts[:, layer].ravel()
        out[layer] = np.bincount(ids[ids >= 0], minlength=trace.n_expert)
    return out


def _one_hot(trace: Trace, tokens: slice) -> npt.NDArray[np.uint8]:
    """[tokens, n_layers, n_expert] 1 where an expert was used."""
    import numpy as np

    ids = trace.experts[tokens]
    out = np.zeros((len(ids), trace.n_layers, trace.n_expert + 1), np.uint8)
    np.put_along_axis(out, np.where(ids < 0, trace.n_expert, ids), 1, axis=2)
    return out[:, :, :-1]


def srp(trace: Trace, m: int) -> float:
    """Segment routing best performance in percent: how well a set of experts that is fixed for m tokens can serve them.

    SRP(m) = max over a of 2 * sum_{f >= a} f / sum (m * [f >= a] + f), f the activations of an expert in a window of m
    tokens, over all windows (within prompts, moved by one token), layers and experts. NaN if no prompt has m tokens.
    """
    import numpy as np

    histogram = np.zeros(m + 1, np.int64)
    for tokens in trace.prompts():
        if tokens.stop - tokens.start < m:
            continue
        summed = np.cumsum(_one_hot(trace, tokens), axis=0, dtype=np.int32)
        counts = summed[m - 1 :].copy()
        counts[1:] -= summed[:-m]
        histogram += np.bincount(counts.ravel(), minlength=m + 1)
    f = np.arange(m + 1)
    total = float((f * histogram).sum())
    if total == 0:
        return math.nan
    covered = np.cumsum((f * histogram)[::-1])[::-1][1:]
    chosen = np.cumsum(histogram[::-1])[::-1][1:]
    return float((100 * 2 * covered / (m * chosen + total)).max())


def sch(trace: Trace, n_slots: int, m: int) -> float:
    """Hit rate of a cache that admits every demanded expert and evicts the resident used least in the next m tokens.

    SCH(rho, m) of moe-lrc with n_slots = rho * top_k; ties go to the lowest id; starts with experts 0..n_slots-1.
    """
    import numpy as np

    n_tokens, n_layers, top_k = trace.experts.shape
    every = np.arange(n_layers)
    resident = np.zeros((n_layers, trace.n_expert), bool)
    resident[:, :n_slots] = True
    ahead = np.zeros((n_layers, trace.n_expert), np.int32)
    first = _one_hot(trace, slice(0, min(n_tokens, m)))
    ahead += first.sum(axis=0, dtype=np.int32)
    n_hits = n_queries = 0
    for token in range(n_tokens):
        now = _one_hot(trace, slice(token, token + 1))[0].astype(bool)
        ahead -= now
        if token + m < n_tokens:
            ahead += _one_hot(trace, slice(token + m, token + m + 1))[0]
        n_queries += int(now.sum())
        n_hits += int((now & resident).sum())
        missing = now & ~resident
        cost = np.where(resident & ~now, ahead, np.iinfo(np.int32).max)
        for _ in range(min(top_k, int(missing.sum(axis=1).max(initial=0)))):
            candidates = missing.any(axis=1)
            victim = cost.argmin(axis=1)
            wanted = missing.argmax(axis=1)
            # Fewer slots than top-k: what is left over is computed and not kept.
            possible = candidates & (cost[every, victim] < np.iinfo(np.int32).max)
            at = every[possible]
            resident[at, victim[possible]] = False
            cost[at, victim[possible]] = np.iinfo(np.int32).max
            resident[at, wanted[possible]] = True
            missing[every[candidates], wanted[candidates]] = False
    return n_hits / n_queries if n_queries else math.nan


def adjacent_overlap(trace: Trace) -> float:
    """Share of a token's experts that the token before it in the prompt used too, in the same layer."""
    import numpy as np

    same = asked = 0
    for tokens in trace.prompts():
        ids = trace.experts[tokens]
        before, now = ids[:-1], ids[1:]
        both = (before[:, :, :1] >= 0) & (now[:, :, :1] >= 0)
        same += int((np.any(now[:, :, :, None] == before[:, :, None, :], axis=3) & both).sum())
        asked += int(both.sum()) * trace.top_k
    return same / asked if asked else math.nan


def reuse_distances(trace: Trace) -> npt.NDArray[np.int64]:
    """Tokens from each use of an expert to its next one, in its layer, within prompts."""
    import numpy as np

    prompt = np.repeat(np.arange(len(trace.prompt_offsets) - 1), np.diff(trace.prompt_offsets))
    token = np.arange(trace.n_tokens)
    parts = [np.zeros(0, np.int64)]
    for layer in range(trace.n_layers):
        ids = trace.experts[:, layer]
        keys = (prompt[:, None] * trace.n_expert + ids)[ids >= 0]
        at = np.broadcast_to(token[:, None], ids.shape)[ids >= 0]
        order = np.lexsort((at, keys))
        again = np.diff(keys[order]) == 0
        parts.append(np.diff(at[order])[again])
    return np.concatenate(parts)


def working_set(trace: Trace, m: int) -> float:
    """Mean number of different experts of a layer in a window of m tokens (side by side); NaN if none is as long."""
    import numpy as np

    counts: list[float] = []
    for tokens in trace.prompts():
        for start in range(tokens.start, tokens.stop - m + 1, m):
            counts.append(float(_one_hot(trace, slice(start, start + m)).any(axis=0).sum(axis=1).mean()))
    return float(np.mean(counts)) if counts else math.nan


def lookahead_recall(trace: TraceFile, n_best: Sequence[int]) -> dict[int, dict[int, float]]:
    """Share of the experts used at distance 1, 2, 3 among the n best that the look-ahead gate predicted."""
    import numpy as np

    if trace.lookahead is None:
        return {}
    out: dict[int, dict[int, float]] = {}
    for distance in range(1, trace.lookahead.shape[2] + 1):
        if distance >= trace.model.n_layers:
            break
        scores = trace.lookahead[:, :-distance, distance - 1]
        used = trace.experts[:, distance:]
        # Predictions of a layer that did not run, or beyond the last layer, are all zero.
        known = (used[:, :, 0] >= 0) & (scores.max(axis=2) > 0)
        if not known.any():
            continue
        order = np.argsort(-scores[known], axis=1, kind="stable")
        rank = np.argsort(order, axis=1, kind="stable")
        ranks = np.take_along_axis(rank, used[known], axis=1)
        out[distance] = {n: float((ranks < n).mean()) for n in n_best}
    return out


def lines(metrics: Metrics) -> list[str]:
    """The metrics for people."""

    def rates(found: Mapping[int, float]) -> str:
        return ", ".join(f"@{n} {x:.3f}" for n, x in found.items())

    def windows(found: Mapping[int, float], word: str) -> str:
        return ", ".join(f"{x:.1f} {word} {m} tokens" for m, x in found.items() if not math.isnan(x)) or "too short"

    text = [
        f"segment routing (SRP)  {windows(metrics.srp, 'over')}",
        f"foreseeing cache (SCH) {metrics.sch:.1%} of queries hit with {metrics.sch_slots} slots per layer",
        f"overlap                {metrics.overlap:.1%} of a token's experts were the last token's "
        f"({metrics.overlap_uniform:.1%} by chance)",
        f"skew                   the busiest quarter of the experts takes {metrics.skew:.1%}; "
        f"entropy {metrics.entropy:.3f} of uniform",
        f"reuse                  after {metrics.reuse_median:.0f} tokens (median), {metrics.reuse_p90:.0f} (p90)",
        f"working set            {windows(metrics.working_set, 'experts of a layer in')}",
    ]
    if metrics.path_recall:
        text.append(f"path table recall      {rates(metrics.path_recall)} at distance 1")
    for distance, found in metrics.lookahead_recall.items():
        text.append(f"look-ahead recall      {rates(found)} at distance {distance}")
    if not metrics.lookahead_recall:
        text.append("look-ahead recall      not recorded")
    return [
        *text,
        f"cache                  LRU {metrics.hits_lru:.1%}, Belady {metrics.hits_belady:.1%}",
        metrics.advice,
    ]
