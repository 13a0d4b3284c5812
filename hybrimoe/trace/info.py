"""A trace in a few lines, or as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.trace.format import TraceFile

__all__ = ["lines", "summary"]


def summary(trace: TraceFile) -> dict[str, Any]:
    """What the file holds, JSON-able. `layers_missing` counts, per MoE layer, tokens that did not run it."""
    import numpy as np

    events: dict[str, int] = {}
    if trace.events is not None:
        kinds, counts = np.unique(trace.events["type"], return_counts=True)
        events = {_kind_name(int(k)): int(n) for k, n in zip(kinds, counts, strict=True)}
    names = ("weights", "scores", "lookahead", "is_decode", "device", "time_us", "bytes")
    decode = trace.is_decode
    return {
        "path": str(trace.path),
        "file_bytes": trace.file_bytes,
        "complete": trace.complete,
        "n_blocks": trace.n_blocks,
        "model": asdict(trace.model),
        "source": dict(trace.source),
        "n_tokens": trace.n_tokens,
        "n_decode_tokens": None if decode is None else int(decode.sum()),
        "n_prompts": trace.n_prompts,
        "prompt_tokens": np.diff(trace.prompt_offsets).tolist(),
        "arrays": [name for name in names if getattr(trace, name) is not None],
        "layers_missing": (trace.experts[:, :, 0] < 0).sum(axis=0).tolist(),
        "events": events,
        "counters": None if trace.counters is None else dict(trace.counters),
    }


def _kind_name(kind: int) -> str:
    from hybrimoe.trace.events import FIRST_NOTE, EventType, Note

    try:
        return (Note(kind) if kind >= FIRST_NOTE else EventType(kind)).name.lower()
    except ValueError:
        return f"kind {kind}"


def lines(trace: TraceFile) -> list[str]:
    """The same for people."""
    s, m = summary(trace), trace.model
    sizes = sorted(set(m.expert_bytes))
    per_expert = f", {' or '.join(f'{b / 1e6:.1f} MB' for b in sizes)} each" if m.knows_bytes else ""
    missing = [(layer, n) for layer, n in enumerate(s["layers_missing"]) if n]
    held = " and ".join(filter(None, [", ".join(s["arrays"])])) or "expert ids only"
    phase = "phase unknown" if s["n_decode_tokens"] is None else f"{s['n_decode_tokens']} decoded"
    text = [
        f"model    {m.name}: {m.n_layers} MoE layers, {m.n_expert} experts{per_expert}, top-{m.top_k}",
        f"tokens   {trace.n_tokens} ({phase}) of {trace.n_prompts} prompts",
        f"holds    {held}",
        f"file     {s['file_bytes'] / 1e6:.2f} MB, {s['file_bytes'] / max(1, trace.n_tokens):.0f} bytes per token, "
        f"{s['n_blocks']} blocks{'' if trace.complete else ', not closed'}",
    ]
    if trace.source:
        text.append("source   " + ", ".join(f"{k} {v}" for k, v in trace.source.items()))
    if missing:
        text.append("missing  " + ", ".join(f"layer {layer}: {n} tokens" for layer, n in missing))
    if s["events"]:
        text.append("events   " + ", ".join(f"{n} {name}" for name, n in s["events"].items()))
    return text
