"""Which experts were asked for lately, from the plug-in's recording of routed experts."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from hybrimoe.trace.events import EventType, Note

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel
    from hybrimoe.native.trace_ring import Pass, TraceRing

__all__ = ["ExpertHeat", "heat_ring_bytes"]

# A token's routing counts half after so many more tokens.
_HALF_LIFE_TOKENS = 256.0
_MIN_RING_BYTES, _MAX_RING_BYTES = 4 << 20, 64 << 20


def heat_ring_bytes(model: GgufModel, n_ubatch: int) -> int:
    """Room for the largest pass and many small ones: ids, weights and devices of each row, without router scores."""
    row_bytes = sum(9 * layer.n_experts_used for layer in model.moe_layers)
    return max(_MIN_RING_BYTES, min(3 * n_ubatch * row_bytes, _MAX_RING_BYTES))


class ExpertHeat:
    """Counts of routed (layer, expert) pairs that fade with the tokens after them.

    Either reads a ring itself, whenever `matrix` is asked for, or is given what another reader of the ring has read
    (`add`). While nobody asks, the ring fills up, the plug-in drops passes, and nothing is computed here.
    """

    def __init__(self, model: GgufModel, ring: TraceRing) -> None:
        import numpy as np

        self._ring: TraceRing | None = ring
        self._facts = ring
        self._layers: list[int] = []
        self._top_k = {layer.index: layer.n_experts_used for layer in model.moe_layers}
        self._n_experts = max((layer.n_experts for layer in model.moe_layers), default=0)
        self._row = {layer.index: i for i, layer in enumerate(model.moe_layers)}
        self._counts = np.zeros((len(self._row), self._n_experts))
        self._lock = threading.Lock()

    def leave_ring_to_others(self) -> None:
        """A recorder reads the ring; it hands over what it reads with `add`."""
        self._ring = None

    def add(self, passes: list[Pass]) -> None:
        """Counts what was read. Thread-safe."""
        with self._lock:
            for one in passes:
                self._add(one)

    def matrix(self) -> list[list[float]]:
        """Per MoE layer, in the model's order, each expert's share of recent routing; 0 where there is none.

        A share of 1 / n_experts is the average.
        """
        with self._lock:
            if self._ring is not None:
                for one in self._ring.read():
                    self._add(one)
            sums = self._counts.sum(axis=1, keepdims=True)
            sums[sums == 0] = 1.0
            shares: list[list[float]] = (self._counts / sums).round(5).tolist()
            return shares

    def _add(self, one: Pass) -> None:
        import numpy as np

        n_tokens = 0
        for event in one.events[np.isin(one.events["type"], (EventType.LAYER, Note.ROUTED))]:
            layer = self._llama_layer(int(event["layer"]))
            if layer not in self._row or event["offset"] < 0:
                continue
            n_rows, first = int(event["n_rows"]), int(event["offset"])
            ids = one.ids[first : first + n_rows * self._top_k[layer]]
            ids = ids[(ids >= 0) & (ids < self._n_experts)]
            self._counts[self._row[layer]] += np.bincount(ids, minlength=self._n_experts)
            n_tokens = max(n_tokens, n_rows)
        self._counts *= 0.5 ** (n_tokens / _HALF_LIFE_TOKENS)

    def _llama_layer(self, index: int) -> int:
        """Events count the layers that run in the plug-in; which they are is known after the first pass."""
        if index >= len(self._layers):
            facts: dict[str, Any] = self._facts.describe()
            self._layers = [int(layer) for layer in facts.get("layers", ())]
        return self._layers[index] if index < len(self._layers) else -1
