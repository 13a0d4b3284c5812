"""What the cost model said about an engine's decode steps, and what they took, layer by layer.

With accelerators the plug-in sums what each step's plan predicted. On the CPU alone nothing is planned: the kept
calibration of this machine tells what the experts of one token take there.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybrimoe.errors import HybrimoeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hybrimoe.engine import Engine
    from hybrimoe.native.plugin import LayerCounters

__all__ = ["LayerPrediction", "median_error", "predictions"]


@dataclass(frozen=True)
class LayerPrediction:
    """One MoE layer (llama.cpp's index): means over its decode steps since the counters were reset."""

    layer: int
    n_steps: int
    predicted_us: float
    observed_us: float

    @property
    def error(self) -> float:
        """(predicted - observed) / observed"""
        return self.predicted_us / self.observed_us - 1.0


def predictions(engine: Engine) -> list[LayerPrediction]:
    """Layers in order; empty before the first decode step and where no costs are known."""
    counters = [c for c in engine.counters() if c.n_decode and c.decode_us > 0]
    if not counters:
        return []
    if any(c.predicted_us > 0 for c in counters):
        return [_of(c, c.predicted_us / c.n_decode) for c in counters if c.predicted_us > 0]
    by_layer = _cpu_only_us(engine)
    return [_of(c, by_layer[c.layer]) for c in counters if c.layer in by_layer]


def median_error(layers: Sequence[LayerPrediction]) -> float:
    """Of the layers' absolute errors, as a share; for one layer or more."""
    return statistics.median(abs(layer.error) for layer in layers)


def _of(c: LayerCounters, predicted_us: float) -> LayerPrediction:
    return LayerPrediction(c.layer, c.n_decode, predicted_us, c.decode_us / c.n_decode)


def _cpu_only_us(engine: Engine) -> dict[int, float]:
    """Per layer what one token's experts take, from this machine's calibration; empty without one that holds here."""
    from hybrimoe import calibration

    n_threads, _ = engine.options.threads()
    path = engine.options.experts.calibration or calibration.default_path()
    try:
        section = calibration.load_matching(path, engine.info, n_threads).cost_section(engine.info, n_threads, ())
    except HybrimoeError:
        return {}
    layers = [layer for layer in engine.info.moe_layers if not layer.predicts_ahead]
    times = {}
    for layer, cls in zip(layers, section["layer_class"], strict=True):
        costs = section["classes"][cls]
        one_us = costs["cpu"]["points"][0][1]
        times[layer.index] = section["cpu_step_us"] + costs["cpu_first_us"] + layer.n_experts_used * one_us
    return times
