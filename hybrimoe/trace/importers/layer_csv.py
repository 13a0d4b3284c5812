"""Import of plain CSVs with the columns `layer,expert` in the order of routing.

A row is one expert, or all experts of one token (`52 40 85`). The layer number falls where the next step begins. A
layer with more rows than top-k holds several tokens (a prompt, layer by layer); one with fewer tokens than its step, as
the last layer of a prompt, belongs to the step's last tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybrimoe.errors import UsageError
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.importers.common import (
    Imported,
    ImportOptions,
    bad_line,
    check_size,
    header_of,
    identity,
    integer,
    integers,
    read_text,
    rows,
)

_LAYER = ("layer", "layer_id")
_EXPERT = ("expert", "expert_id", "experts", "expert_ids")


def fits(start: bytes) -> bool:
    names = header_of(start)
    return any(n in names for n in _LAYER) and any(n in names for n in _EXPERT)


def load(paths: Sequence[Path], options: ImportOptions) -> Imported:
    import numpy as np

    notes: list[str] = []
    steps: list[tuple[int, Path, int, dict[int, list[int]]]] = []  # prompt, file, line, layer: ids
    top_k = options.top_k or 0
    for number, path in enumerate(paths):
        text = read_text(path)
        names = header_of(text[: 1 << 16].encode())
        layer_name, expert_name = (next((n for n in c if n in names), c[0]) for c in (_LAYER, _EXPERT))
        last = 1 << 31
        for line, row in rows(text, path, (layer_name, expert_name)):
            layer = integer(path, line, row, layer_name)
            ids = integers(path, line, row[expert_name])
            if len(ids) > 1 and top_k not in (0, len(ids)):
                raise bad_line(path, line, f"{len(ids)} experts, earlier rows have {top_k}")
            top_k = len(ids) if len(ids) > 1 else top_k
            if layer < last:
                steps.append((number, path, line, {}))
            last = layer
            steps[-1][3].setdefault(layer, []).extend(ids)
    if not steps:
        raise TraceError(f"'{paths[0]}' has no rows")
    if not top_k:
        top_k = min(len(ids) for step in steps for ids in step[3].values())
        notes.append(f"top-k is not in the file: {top_k} assumed, the fewest rows of a layer; --top-k says")
    layers = sorted({layer for step in steps for layer in step[3]})
    if len(layers) == 1 and options.top_k is None and len(steps) == 1:
        raise UsageError("with a single layer the rows do not say where a token ends", "give --top-k")
    n_tokens = sum(-(-max(len(ids) for ids in step[3].values()) // top_k) for step in steps)
    check_size(paths[0], n_tokens, len(layers), top_k, sum(len(ids) for s in steps for ids in s[3].values()))
    at = {layer: i for i, layer in enumerate(layers)}
    parts, prompts = [], []
    for prompt, path, line, found in steps:
        for layer, ids in found.items():
            if len(ids) % top_k:
                raise bad_line(path, line, f"{len(ids)} experts in layer {layer} from here, top-k is {top_k}")
        n = max(len(ids) for ids in found.values()) // top_k
        part = np.full((n, len(layers), top_k), -1, np.int32)
        for layer, ids in found.items():
            part[n - len(ids) // top_k :, at[layer]] = np.array(ids, np.int32).reshape(-1, top_k)
        parts.append(part)
        prompts += [prompt] * n
    experts = np.concatenate(parts)
    return Imported(
        identity(options, experts, layers, notes, name=paths[0].stem),
        experts,
        np.array(prompts, np.int32),
        source={"format": "layer-csv", "file": paths[0].name, "n_files": len(paths)},
        notes=notes,
    )
