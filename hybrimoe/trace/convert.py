"""Writes traces: imports and parts of traces as trace files, and traces in formats that other tools read."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hybrimoe.errors import HybrimoeError, UsageError
from hybrimoe.files import open_target
from hybrimoe.trace.files import replacing
from hybrimoe.trace.format import TraceFile
from hybrimoe.trace.writer import TraceWriter

if TYPE_CHECKING:
    from hybrimoe.trace.importers import Imported

__all__ = ["OPTIONAL", "write", "write_imported"]

OPTIONAL = ("weights", "scores", "lookahead", "device", "time_us", "bytes")
_STEP_TOKENS = 256


def write_imported(found: Imported, path: Path, progress: Callable[[float], None] = lambda share: None) -> None:
    """Writes an import as a trace file; nothing is left behind when it fails."""
    with TraceWriter(path, found.model, source=found.source, temporary=True) as writer:
        for tokens in _steps(len(found.experts), progress):
            writer.append_tokens(
                found.experts[tokens],
                prompt=found.prompt[tokens],
                is_decode=None if found.is_decode is None else found.is_decode[tokens],
                weights=None if found.weights is None else found.weights[tokens],
            )
    _check(writer)


def write(
    trace: TraceFile,
    path: Path,
    *,
    without: Collection[str] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Writes a trace as `path`'s suffix says: `.trace`, `.npz` (the importer's layout) or `.csv` (route CSV).

    Events stay in `.trace` files only, and only in whole ones. Nothing is left behind when it fails.

    Raises:
        UsageError: the suffix is none of these.
        HybrimoeError: the file cannot be written.
    """
    writers = {".trace": _write_trace, ".npz": _write_npz, ".csv": _write_csv}
    if path.suffix not in writers:
        raise UsageError(f"'{path.name}' ends in no known format", f"known are {', '.join(writers)}")
    writers[path.suffix](trace, path, frozenset(without), progress)


def _steps(n: int, progress: Callable[[float], None]) -> Iterator[slice]:
    for first in range(0, n, _STEP_TOKENS):
        yield slice(first, min(n, first + _STEP_TOKENS))
        progress(min(1.0, (first + _STEP_TOKENS) / n))


def _check(writer: TraceWriter) -> None:
    if writer.failure:
        raise HybrimoeError(writer.failure, "free some disk space, or choose another folder")


def _prompt_numbers(trace: TraceFile) -> Any:
    import numpy as np

    return np.repeat(np.arange(trace.n_prompts, dtype=np.int32), np.diff(trace.prompt_offsets))


def _write_trace(trace: TraceFile, path: Path, without: frozenset[str], progress: Callable[[float], None]) -> None:
    prompt = _prompt_numbers(trace)
    kept = {n: getattr(trace, n) for n in OPTIONAL if n not in without and getattr(trace, n) is not None}
    with TraceWriter(path, trace.model, source=trace.source, run=trace.run, temporary=True) as writer:
        for tokens in _steps(trace.n_tokens, progress):
            writer.append_tokens(
                trace.experts[tokens],
                prompt=prompt[tokens],
                is_decode=None if trace.is_decode is None else trace.is_decode[tokens],
                **{name: array[tokens] for name, array in kept.items()},
            )
        if trace.events is not None and "events" not in without:
            for costs in trace.costs:
                writer.append_costs(costs)
            writer.append_events(trace.events, **trace.event_arrays)
        writer.close(trace.counters)
    _check(writer)


def _write_npz(trace: TraceFile, path: Path, without: frozenset[str], _progress: Callable[[float], None]) -> None:
    import numpy as np

    m = trace.model
    # An unsigned byte has no room for a mark beside 256 experts.
    ids = trace.experts.astype(np.int16)
    if m.n_expert <= 255:
        ids = np.where(trace.experts < 0, 255, trace.experts).astype(np.uint8)
    arrays: dict[str, Any] = {
        "experts": ids,
        "prompt_offsets": trace.prompt_offsets,
        "n_expert": m.n_expert,
        "first_layer": m.layers[0] if m.layers else 0,
        "model": m.name,
    }
    if m.knows_bytes:
        arrays["expert_bytes"] = m.expert_bytes[0]
    if trace.is_decode is not None:
        arrays["is_decode"] = trace.is_decode
    for name in ("weights", "scores", "lookahead"):
        if name not in without and getattr(trace, name) is not None:
            arrays[name] = getattr(trace, name)
    with replacing(path) as temporary, open_target(temporary) as file:
        np.savez_compressed(file, **arrays)


def _write_csv(trace: TraceFile, path: Path, _without: frozenset[str], progress: Callable[[float], None]) -> None:
    m = trace.model
    layers = m.layers or tuple(range(m.n_layers))
    prompt = _prompt_numbers(trace)
    with replacing(path) as temporary, io.TextIOWrapper(open_target(temporary), "utf-8", newline="") as file:
        _write_facts(file, trace, layers)
        out = csv.writer(file)
        out.writerow(("turn", "phase", "step", "layer", "slot", "expert", "weight"))
        for tokens in _steps(trace.n_tokens, progress):
            for token in range(tokens.start, tokens.stop):
                phase = 0 if trace.is_decode is None else int(trace.is_decode[token])
                step = token - int(trace.prompt_offsets[prompt[token]])
                for at, layer in enumerate(layers):
                    ids = trace.experts[token, at]
                    if ids[0] < 0:
                        continue
                    weights = ["nan"] * m.top_k if trace.weights is None else trace.weights[token, at].tolist()
                    for slot, (expert, weight) in enumerate(zip(ids.tolist(), weights, strict=True)):
                        out.writerow((prompt[token], phase, step, layer, slot, expert, weight))


def _write_facts(file: IO[str], trace: TraceFile, layers: tuple[int, ...]) -> None:
    m = trace.model
    name = "_".join(m.name.split())
    file.write(f"# model={name} n_layer={m.n_layers} n_expert={m.n_expert} n_expert_used={m.top_k}\n")
    if m.knows_bytes:
        file.writelines(
            f"# layer={layer} expert_bytes={size}\n" for layer, size in zip(layers, m.expert_bytes, strict=True)
        )
