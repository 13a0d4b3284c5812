"""Routing traces, and their replay against one policy of the core (no clock, no costs)."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybrimoe.native import core_abi as abi
from hybrimoe.native.core import CoreUsageError, Costs, Policy, as_policy, cache_config, pointer

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["ReplayResult", "Trace", "replay_cache", "replay_recall"]


class Trace:
    """Routing of a whole run, for replays.

    Args:
        experts: ids, integer [n_tokens, n_layers, top_k]; -1 (or 255 in an unsigned byte array) where the layer did not
            run.
        n_expert: experts per layer.
        weights: router weights of the chosen experts, the same shape, or None.
        scores: softmax router scores [n_tokens, n_layers, n_expert], or None.
        prompt_offsets: [n_prompts + 1] first token of each prompt, from 0 to n_tokens; None: one prompt.
    """

    def __init__(
        self,
        experts: npt.ArrayLike,
        n_expert: int,
        *,
        weights: npt.ArrayLike | None = None,
        scores: npt.ArrayLike | None = None,
        prompt_offsets: npt.ArrayLike | None = None,
    ) -> None:
        import numpy as np

        given = np.asarray(experts)
        if given.ndim != 3 or given.dtype.kind not in "iu":
            raise CoreUsageError(
                f"experts must be integers [n_tokens, n_layers, top_k], not {given.dtype}{given.shape}"
            )
        self.experts = np.ascontiguousarray(given, dtype=np.int32)
        if given.dtype == np.uint8 and n_expert <= 255:
            self.experts[self.experts == 255] = -1
        self.n_tokens, self.n_layers, self.top_k = self.experts.shape
        self.n_expert = n_expert
        self.weights = None if weights is None else np.ascontiguousarray(weights, dtype=np.float32)
        self.scores = None if scores is None else np.ascontiguousarray(scores, dtype=np.float32)
        if self.weights is not None and self.weights.shape != self.experts.shape:
            raise CoreUsageError(f"weights have shape {self.weights.shape}, experts {self.experts.shape}")
        if self.scores is not None and self.scores.shape != (self.n_tokens, self.n_layers, n_expert):
            raise CoreUsageError(f"scores have shape {self.scores.shape}, must be [n_tokens, n_layers, n_expert]")
        offsets = [0, self.n_tokens] if prompt_offsets is None else prompt_offsets
        self.prompt_offsets = np.ascontiguousarray(offsets, dtype=np.int64)
        if self.prompt_offsets.ndim != 1 or len(self.prompt_offsets) < 2:
            raise CoreUsageError("prompt_offsets must have n_prompts + 1 entries")

    def head(self, n_prompts: int) -> Trace:
        """The first prompts alone."""
        offsets = self.prompt_offsets[: n_prompts + 1]
        n = int(offsets[-1])
        return Trace(
            self.experts[:n],
            self.n_expert,
            weights=None if self.weights is None else self.weights[:n],
            scores=None if self.scores is None else self.scores[:n],
            prompt_offsets=offsets,
        )

    def prompts(self) -> Iterator[slice]:
        """Token ranges of the prompts."""
        for first, last in zip(self.prompt_offsets[:-1], self.prompt_offsets[1:], strict=True):
            yield slice(int(first), int(last))

    def to_c(self) -> abi.TraceC:
        """The structure for the library; valid as long as this object lives."""
        return abi.TraceC(
            self.n_layers,
            self.n_expert,
            self.top_k,
            self.n_tokens,
            len(self.prompt_offsets) - 1,
            pointer(self.experts),
            pointer(self.weights),
            pointer(self.scores),
            pointer(self.prompt_offsets),
        )


@dataclass(frozen=True)
class ReplayResult:
    """Counts of one replay; hits and queries also per layer."""

    n_queries: int
    n_hits: int
    n_loads: int
    n_evictions: int
    hits_per_layer: tuple[int, ...]
    queries_per_layer: tuple[int, ...]

    @property
    def hit_rate(self) -> float:
        """Hits per query, 0..1."""
        return self.n_hits / self.n_queries if self.n_queries else 0.0


def replay_cache(
    trace: Trace,
    eviction: Policy | str,
    n_slots: int | Sequence[int] | Sequence[Sequence[int]],
    *,
    cold: bool = False,
    preload: bool = True,
    resident: npt.ArrayLike | None = None,
    admission: Policy | str = "always",
    pooled: bool = False,
    costs: Costs | None = None,
) -> ReplayResult:
    """Event-atomic replay of one eviction policy (no clock, no costs).

    Of a step's experts all are looked up before any is admitted; misses are admitted in the order listed; a victim is
    never one of the step's own experts (except for `belady-bypass`, which may also refuse them).

    Args:
        n_slots: per layer, or [n_layers], or [n_devices, n_layers].
        cold: every prompt from a cold cache and fresh statistics; else state is kept across prompts.
        preload: caches start with experts 0..n_slots-1 of their layers; else empty.
        resident: [n_layers, n_expert] start with these instead.
        admission: `always`, `second-use`, or `pays` (needs costs).
        pooled: one pool over all layers.
    """
    import numpy as np

    config = cache_config(trace.n_layers, trace.n_expert, trace.top_k, n_slots, pooled=pooled)
    start = None if resident is None else np.ascontiguousarray(resident, dtype=np.uint8)
    if start is not None and start.shape != (trace.n_layers, trace.n_expert):
        raise CoreUsageError(f"resident has shape {start.shape}, must be {(trace.n_layers, trace.n_expert)}")
    out = abi.ReplayResultC()
    hits = np.zeros(trace.n_layers, dtype=np.int64)
    queries = np.zeros(trace.n_layers, dtype=np.int64)
    abi.call(
        "hm_replay_cache",
        ct.byref(trace.to_c()),
        ct.byref(abi.ReplayOptionsC(cold, preload, pointer(start))),
        ct.byref(config),
        ct.byref(as_policy(eviction).to_c()),
        ct.byref(as_policy(admission).to_c()),
        None if costs is None else costs.c,
        ct.byref(out),
        pointer(hits),
        pointer(queries),
    )
    return ReplayResult(
        out.n_queries, out.n_hits, out.n_loads, out.n_evictions, tuple(map(int, hits)), tuple(map(int, queries))
    )


def replay_recall(
    trace: Trace, prefetch: Policy | str, n_best: Sequence[int], *, distance: int = 1, n_warm_tokens: int = 0
) -> list[float]:
    """Recall of a prefetcher that predicts from ids (`path`, `eam`): share of the experts used `distance` layers on
    that were among the n best predicted. The first `n_warm_tokens` are learned from, but not counted."""
    best = (ct.c_int32 * max(1, len(n_best)))(*n_best)
    recall = (ct.c_double * max(1, len(n_best)))()
    arguments = (ct.byref(as_policy(prefetch).to_c()), distance, n_warm_tokens, best, len(n_best), recall)
    abi.call("hm_replay_recall", ct.byref(trace.to_c()), *arguments)
    return list(recall)[: len(n_best)]
