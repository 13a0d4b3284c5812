"""Router weights from clusters of feed-forward inputs, and what is measured about routing.

k-means runs in the directions of the inputs that change least from one token to the next, so that experts follow what
a text is about rather than single tokens: neighbouring tokens then share experts, as they do in trained models, and a
cache of experts has something to hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["RoutingStats", "fit_router", "routing_stats"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

# Share of the mean variance added to covariances: directions that the corpus hardly shows stay out of the way.
_RIDGE = 1e-2
_N_BALANCE_STEPS = 60


@dataclass(frozen=True)
class RoutingStats:
    """Of one layer: `balance` is the largest over the mean expert load; `overlap` the mean share of a token's experts
    that the next token uses too; `chance` what independent draws with the measured loads would give."""

    balance: float
    overlap: float
    chance: float

    @property
    def overlap_over_chance(self) -> float:
        return self.overlap / self.chance


def routing_stats(logits: F32, top_k: int, neighbours: npt.NDArray[np.bool_]) -> RoutingStats:
    """`logits` are `[n_tokens, n_experts]`; `neighbours[i]`: tokens i and i + 1 stand side by side in one text."""
    chosen = _chosen(logits, top_k)
    load = chosen.mean(axis=0)
    first = np.flatnonzero(neighbours[:-1])
    overlap = (chosen[first] & chosen[first + 1]).sum(axis=1).mean() / top_k
    return RoutingStats(float(load.max() / load.mean()), float(overlap), float(np.square(load).sum() / top_k))


def _chosen(logits: npt.NDArray[Any], top_k: int) -> npt.NDArray[np.bool_]:
    chosen = np.zeros(logits.shape, dtype=bool)
    top = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
    np.put_along_axis(chosen, top, True, axis=1)
    return chosen


def fit_router(
    inputs: F32, neighbours: npt.NDArray[np.bool_], n_experts: int, top_k: int, settings: Mapping[str, Any], seed: int
) -> F32:
    """Router weights `[n_experts, n_embd]` for a layer whose feed-forward inputs are `[n_tokens, n_embd]`.

    `settings` is the recipe's table `router`.
    """
    rng = np.random.default_rng(seed)
    mean = inputs.mean(axis=0)
    centred = inputs - mean
    slow, constant = _directions(centred, mean, neighbours)
    best = None
    for n_directions in settings["directions"]:
        projection = slow[:, :n_directions]
        points = centred @ projection
        centres = _kmeans(points, n_experts, settings["n_kmeans_iterations"], rng)
        # The nearest centre has the largest value of x . c - |c|^2 / 2.
        weights = centres @ projection.T
        logits = inputs @ weights.T - weights @ mean - np.square(centres).sum(axis=1) / 2
        bias = _balancing_bias(logits, top_k) - weights @ mean - np.square(centres).sum(axis=1) / 2
        scale = settings["logit_deviation"] / (inputs @ weights.T + bias).std(axis=1).mean()
        # Architecture llama's router has no bias; a direction in which the inputs hardly vary carries it.
        router = np.asarray((weights + np.outer(bias, constant)) * scale, dtype=np.float32)
        stats = routing_stats(inputs @ router.T, top_k, neighbours)
        if best is None or stats.overlap_over_chance > best[0]:
            best = (stats.overlap_over_chance, router)
        if stats.overlap_over_chance >= settings["overlap_over_chance"]:
            return router
    assert best is not None
    return best[1]


def _directions(centred: F32, mean: F32, neighbours: npt.NDArray[np.bool_]) -> tuple[F32, F32]:
    """Slow directions `[n_embd, n]`, slowest first, in which inputs have variance 1; and a direction whose product with
    every input is nearly 1."""
    covariance = _covariance(centred)
    values, vectors = np.linalg.eigh(covariance)
    whiten = vectors / np.sqrt(values)
    first = np.flatnonzero(neighbours[:-1])
    steps = (centred[first + 1] - centred[first]) @ whiten
    _, slow = np.linalg.eigh(_covariance(steps))
    constant = vectors @ ((vectors.T @ mean) / values)
    return whiten @ slow, constant / (mean @ constant)


def _covariance(x: F32) -> F32:
    covariance = x.T @ x / np.float32(len(x))
    covariance[np.diag_indices_from(covariance)] += _RIDGE * np.trace(covariance) / len(covariance)
    return np.asarray(covariance, dtype=np.float32)


def _kmeans(points: F32, n: int, n_iterations: int, rng: np.random.Generator) -> F32:
    """Lloyd's algorithm; an empty cluster starts again at a random point."""
    centres: F32 = points[rng.choice(len(points), n, replace=len(points) < n)].copy()
    for _ in range(n_iterations):
        nearest = (points @ centres.T - np.square(centres).sum(axis=1) / 2).argmax(axis=1)
        member = np.zeros((len(points), n), dtype=np.float32)
        member[np.arange(len(points)), nearest] = 1
        sizes = member.sum(axis=0)
        centres = member.T @ points / np.maximum(sizes, 1)[:, None]
        for empty in np.flatnonzero(sizes == 0):
            centres[empty] = points[rng.integers(len(points))]
    return centres


def _balancing_bias(logits: F32, top_k: int) -> F32:
    """Added to the logits it makes all experts chosen about equally often: raise the rare, lower the frequent ones."""
    n_experts = logits.shape[1]
    share = top_k / n_experts
    bias = np.zeros(n_experts, dtype=np.float32)
    step = 0.25 * logits.std()
    for _ in range(_N_BALANCE_STEPS):
        load = _chosen(logits + bias, top_k).mean(axis=0)
        bias += np.asarray(step * np.clip((share - load) / share, -1, 1), dtype=np.float32)
        step *= 0.94
    return bias
