"""Whether a trace and a model belong together."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe.files import open_regular
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.format import ModelIdentity, TraceFile

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel

__all__ = ["check_same", "fingerprint", "identity_of"]

_PIECE_BYTES = 1 << 20


def fingerprint(path: Path) -> str:
    """SHA-256 of a model file's size, first and last MiB: enough to tell models apart, and quick for any size."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open_regular(path) as file:
        digest.update(file.read(_PIECE_BYTES))
        file.seek(max(0, size - _PIECE_BYTES))
        digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def identity_of(model: GgufModel) -> ModelIdentity:
    """The identity that a recording of this model carries. Raises TraceError for models whose layers differ."""
    layers = [layer for layer in model.moe_layers if not layer.predicts_ahead]
    if len({(layer.n_experts, layer.n_experts_used) for layer in layers}) != 1:
        raise TraceError(
            f"the layers of '{model.path.name}' differ in their number of experts", "such models cannot be traced yet"
        )
    sizes = {t.name: t.n_elements for layer in layers for t in layer.expert_tensors if t.name.endswith(".weight")}
    macs = [
        sum(n for name, n in sizes.items() if name.startswith(f"blk.{layer.index}.")) // layer.n_experts
        for layer in layers
    ]
    return ModelIdentity(
        model.name,
        n_layers=len(layers),
        n_expert=layers[0].n_experts,
        top_k=layers[0].n_experts_used,
        layers=tuple(layer.index for layer in layers),
        expert_bytes=tuple(layer.bytes_per_expert for layer in layers),
        dense_bytes=model.dense_bytes,
        expert_macs=tuple(macs),
        architecture=model.architecture,
        sha256=fingerprint(model.path),
    )


def check_same(trace: TraceFile, model: GgufModel) -> None:
    """Raises TraceError, saying what differs, where the trace is of another model."""
    ours, asked = trace.model, identity_of(model)
    for what, a, b in (
        ("MoE layers", ours.n_layers, asked.n_layers),
        ("experts", ours.n_expert, asked.n_expert),
        ("experts per token", ours.top_k, asked.top_k),
    ):
        if a != b:
            raise TraceError(
                f"the trace '{trace.path.name}' is of another model: '{ours.name}' has {a} {what}, "
                f"'{model.path.name}' {b}",
                "record one: hybrimoe trace record",
            )
    if ours.sha256 and ours.sha256 != asked.sha256:
        raise TraceError(
            f"the trace '{trace.path.name}' was recorded from another file than '{model.path.name}' ('{ours.name}')",
            "record one: hybrimoe trace record",
        )
