"""What a model's layers ask for, from its header: bytes to read, multiplications, rows of the KV cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hybrimoe.machine.rates import ExpertShape, dot_ns

if TYPE_CHECKING:
    from hybrimoe.dry_load import Buffers
    from hybrimoe.gguf_model import GgufModel, MoeLayer, TensorInfo
    from hybrimoe.planning.memory import Setting

__all__ = ["LayerWork", "ModelWork", "moe_layers"]

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# Nodes of one layer in llama.cpp's decode graphs, where it could not be asked (counted on its own dry runs): ordinary,
# latent and recurrent layers.
_NODES = {"attention": 60, "latent": 75, "recurrent": 105}
# Share of the layers that see the whole context where the others have a sliding window (llama.cpp's `set_swa_pattern`
# of each model: every second, sixth, fourth layer); the file does not say.
_FULL_SHARES = {"gpt-oss": 1 / 2, "gemma3": 1 / 6, "gemma3n": 1 / 5, "gemma4": 1 / 6, "llama4": 1 / 4, "cohere2": 1 / 4}
_USUAL_FULL_SHARE = 1 / 2


def moe_layers(model: GgufModel) -> list[MoeLayer]:
    """Layers whose experts run in ordinary decoding."""
    return [layer for layer in model.moe_layers if not layer.predicts_ahead]


@dataclass(frozen=True)
class Dense:
    """Weights that every token reads: bytes, multiplications per token, `dot_ns` of them on a CPU."""

    n_bytes: int = 0
    n_macs: int = 0
    cpu_ns: float = 0.0

    @classmethod
    def of(cls, tensors: Sequence[TensorInfo]) -> Dense:
        matrices = [t for t in tensors if len(t.shape) > 1]
        return cls(
            sum(t.n_bytes for t in tensors),
            sum(t.n_elements for t in matrices),
            sum(dot_ns(t.type_name, t.shape[0], t.n_elements / t.shape[0]) for t in matrices),
        )

    def __add__(self, other: Dense) -> Dense:
        return Dense(self.n_bytes + other.n_bytes, self.n_macs + other.n_macs, self.cpu_ns + other.cpu_ns)


@dataclass(frozen=True)
class LayerWork:
    """One layer. `kind` is attention, latent or recurrent; `expert` None in a dense layer."""

    index: int
    kind: str
    dense: Dense
    moe: MoeLayer | None
    expert: ExpertShape | None
    n_nodes: float


class ModelWork:
    """A model's work with a setting; `buffers` are llama.cpp's answer."""

    def __init__(self, model: GgufModel, setting: Setting, buffers: Buffers):
        self.model, self.setting, self.buffers = model, setting, buffers
        self.n_embd = model.n_embd
        ahead = {layer.index for layer in model.moe_layers if layer.predicts_ahead}
        by_layer: dict[int, list[TensorInfo]] = {}
        rest: list[TensorInfo] = []
        for tensor in model.tensors:
            match = _BLOCK.fullmatch(tensor.name)
            if match is None:
                rest.append(tensor)
            elif int(match[1]) not in ahead and "_exps." not in tensor.name and "_chexps." not in tensor.name:
                by_layer.setdefault(int(match[1]), []).append(tensor)
        tied = not any(t.name == "output.weight" for t in rest)
        self.output = Dense.of([t for t in rest if tied or not t.name.startswith("token_embd.")])
        moe = {layer.index: layer for layer in moe_layers(model)}
        kinds = {i: _kind(tensors) for i, tensors in by_layer.items()}
        known = buffers.n_graph_nodes
        scale = known / max(1, sum(_NODES[kind] for kind in kinds.values())) if known else 1.0
        self.layers = [
            LayerWork(
                i,
                kinds[i],
                Dense.of(tensors),
                moe.get(i),
                ExpertShape.of_layer(moe[i]) if i in moe else None,
                _NODES[kinds[i]] * scale,
            )
            for i, tensors in sorted(by_layer.items())
        ]

    @property
    def n_nodes(self) -> float:
        return sum(layer.n_nodes for layer in self.layers)

    @cached_property
    def _row_bytes(self) -> float:
        """KV rows of one token in all layers that cache."""
        from hybrimoe.engine import KV_TYPES

        if not self.model.kv.sliding_window:
            return self.buffers.kv_bytes / self.setting.n_ctx

        kv = self.model.kv
        return kv.bytes_for(1 << 20, KV_TYPES[self.setting.cache_type_k][1], KV_TYPES[self.setting.cache_type_v][1]) / (
            1 << 20
        )

    @cached_property
    def full_share(self) -> float:
        """Share of the caching layers that keep the whole context; the others have a sliding window."""
        if not self.model.kv.sliding_window:
            return 1.0
        return _FULL_SHARES.get(self.model.architecture, _USUAL_FULL_SHARE)

    def _seen(self, depth: float) -> float:
        """Tokens that an average caching layer looks at, `depth` tokens in."""
        window = self.model.kv.sliding_window
        near = min(depth, window) if window else depth
        return self.full_share * depth + (1 - self.full_share) * near

    def kv_read_bytes(self, depth: float) -> float:
        """What one token reads of cache and recurrent state (which is also written)."""
        return self._row_bytes * self._seen(depth) + 2 * self.buffers.recurrent_bytes

    def attention_macs(self, n_tokens: float, depth: float) -> float:
        """Multiplications of `n_tokens` queries with keys and values, `depth` tokens being there already."""
        kv = self.model.kv
        n_layers = sum(1 for layer in self.layers if layer.kind != "recurrent")
        values = kv.value_length or kv.key_length
        return n_layers * n_tokens * self._seen(depth + n_tokens / 2) * kv.n_head * (kv.key_length + values)


def _kind(tensors: Sequence[TensorInfo]) -> str:
    names = [t.name for t in tensors]
    if any(".ssm_" in name or ".time_mix" in name for name in names):
        return "recurrent"
    return "latent" if any(".attn_kv_a" in name for name in names) else "attention"
