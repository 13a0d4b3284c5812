"""Import of MoE-Beyond's CSV files (arXiv 2508.17137): `Layer ID,Batch Number,Token,Activated Expert IDs`.

One file is one prompt, layer by layer, its tokens in order. Prompts of a batch are told apart by the batch number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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

_COLUMNS = ("layer id", "batch number", "activated expert ids")


def fits(start: bytes) -> bool:
    return set(_COLUMNS) <= set(header_of(start))


def load(paths: Sequence[Path], options: ImportOptions) -> Imported:
    import numpy as np

    prompts: list[dict[int, list[list[int]]]] = []
    top_k = 0
    for path in paths:
        here: dict[int, dict[int, list[list[int]]]] = {}
        for line, row in rows(read_text(path), path, _COLUMNS):
            ids = integers(path, line, row["activated expert ids"])
            top_k = top_k or len(ids)
            if len(ids) != top_k:
                raise bad_line(path, line, f"{len(ids)} experts, earlier rows have {top_k}")
            batch = here.setdefault(integer(path, line, row, "batch number"), {})
            batch.setdefault(integer(path, line, row, "layer id"), []).append(ids)
        if not here:
            raise TraceError(f"'{path}' has no rows")
        for number, by_layer in here.items():
            sizes = {len(tokens) for tokens in by_layer.values()}
            if len(sizes) > 1:
                raise TraceError(f"'{path}': batch {number} has {sorted(sizes)} tokens in different layers")
            prompts.append(by_layer)
    layers = sorted(prompts[0])
    for number, prompt in enumerate(prompts):
        if sorted(prompt) != layers:
            raise TraceError(f"prompt {number} has layers {sorted(prompt)}, the first has {layers}")
    n_tokens = sum(len(p[layers[0]]) for p in prompts)
    check_size(paths[0], n_tokens, len(layers), top_k, n_tokens * len(layers) * top_k)
    experts = np.concatenate([np.array([p[layer] for layer in layers], np.int32).swapaxes(0, 1) for p in prompts])
    lengths = [len(p[layers[0]]) for p in prompts]
    notes: list[str] = []
    return Imported(
        identity(options, experts, layers, notes, name=paths[0].stem),
        experts,
        np.repeat(np.arange(len(prompts), dtype=np.int32), lengths),
        source={"format": "moe-beyond", "file": paths[0].name, "n_files": len(paths)},
        notes=notes,
    )
