"""Import of route CSVs, one row per routed expert: `turn,phase,step,layer,slot,expert,weight,...`.

As BigMoeOnEdge writes them: phase 0 prefill, 1 decode; step the token's position; slot the rank of the expert. Lines
that begin with '#' hold static facts: `# model=... n_expert=... n_expert_used=...` and `# layer=N expert_bytes=...`. A
layer that a token did not run (the last one of a prompt computes its last token only) has no rows.
"""

from __future__ import annotations

import math
import re
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
    read_text,
    rows,
)

_COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert")
_SMALL = re.compile(r"[0-9]{1,15}")
_FACT = re.compile(r"(\w+)=(\S+)")


def fits(start: bytes) -> bool:
    return set(_COLUMNS) <= set(header_of(start))


def load(paths: Sequence[Path], options: ImportOptions) -> Imported:
    import numpy as np

    if len(paths) > 1:
        raise UsageError("a route CSV is a whole trace: its turns are the prompts", "import them one by one")
    path = paths[0]
    text = read_text(path)
    facts, sizes = _facts(text)
    # (turn, step): phase; (turn, step, layer): {slot: (expert, weight)}
    phases: dict[tuple[int, int], int] = {}
    cells: dict[tuple[int, int, int], dict[int, tuple[int, float]]] = {}
    for line, row in rows(text, path, _COLUMNS):
        turn, phase, step, layer, slot, expert = (integer(path, line, row, name) for name in _COLUMNS)
        if phase > 1:
            raise bad_line(path, line, f"phase {phase} is neither 0 (prefill) nor 1 (decode)")
        cell = cells.setdefault((turn, step, layer), {})
        if slot in cell:
            raise bad_line(path, line, f"turn {turn}, step {step}, layer {layer} has slot {slot} twice")
        try:
            weight = float(row.get("weight", "nan"))
        except ValueError:
            raise bad_line(path, line, f"'{row['weight']}' is no weight") from None
        cell[slot] = (expert, weight)
        phases[turn, step] = phase
    if not cells:
        raise TraceError(f"'{path}' has no rows")
    top_k = options.top_k or int(facts.get("n_expert_used", 0)) or max(len(cell) for cell in cells.values())
    layers = sorted({layer for _, _, layer in cells})
    tokens = sorted(phases)
    token_at, layer_at = {t: i for i, t in enumerate(tokens)}, {layer: i for i, layer in enumerate(layers)}
    check_size(path, len(tokens), len(layers), top_k, sum(len(cell) for cell in cells.values()))
    experts = np.full((len(tokens), len(layers), top_k), -1, np.int32)
    weights = np.zeros(experts.shape, np.float32)
    for (turn, step, layer), cell in cells.items():
        if sorted(cell) != list(range(top_k)):
            raise TraceError(f"'{path}': turn {turn}, step {step}, layer {layer} has {len(cell)} of {top_k} experts")
        at = token_at[turn, step], layer_at[layer]
        experts[at] = [cell[k][0] for k in range(top_k)]
        weights[at] = [cell[k][1] for k in range(top_k)]
    turns = sorted({turn for turn, _ in tokens})
    notes: list[str] = []
    known = not any(math.isnan(w) for cell in cells.values() for _, w in cell.values())
    if not known:
        notes.append("some router weights are unknown (nan), so none are kept")
    return Imported(
        identity(
            options,
            experts,
            layers,
            notes,
            name=Path(facts.get("model", path.stem)).stem,
            n_expert=int(facts.get("n_expert", 0)),
            expert_bytes=[sizes[layer] for layer in layers] if all(sizes.get(layer) for layer in layers) else (),
        ),
        experts,
        np.array([turns.index(turn) for turn, _ in tokens], np.int32),
        np.array([phases[token] for token in tokens], np.uint8),
        weights if known else None,
        {"format": "route-csv", "file": path.name},
        notes,
    )


def _facts(text: str) -> tuple[dict[str, str], dict[int, int]]:
    """Facts of the comment lines, and bytes of an expert per layer."""
    facts: dict[str, str] = {}
    sizes: dict[int, int] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            found = dict(_FACT.findall(line))
            if _SMALL.fullmatch(found.get("layer", "")) and _SMALL.fullmatch(found.get("expert_bytes", "")):
                sizes[int(found["layer"])] = int(found["expert_bytes"])
            else:
                facts.update(found)
    return {k: v for k, v in facts.items() if k not in ("n_expert", "n_expert_used") or _SMALL.fullmatch(v)}, sizes
