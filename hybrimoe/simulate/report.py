"""Rows of a simulation as table, markdown, CSV, JSON; and the sentence that says which size pays."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from hybrimoe.simulate.replay import Row

__all__ = ["FORMATS", "advice", "caption", "render", "table_cells"]

# A size pays while it still brings this share of what the largest one brings over the smallest.
_PAYS_SHARE = 0.9


def _json(rows: Sequence[Row]) -> str:
    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(
        [{name: clean(value) for name, value in asdict(row).items()} for row in rows], ensure_ascii=False, indent=1
    )


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, Row.names(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue().rstrip("\n")


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.2f} %"


def _megabytes(value: float | None, n_tokens: int) -> str:
    return "-" if value is None else f"{value / 1e6 / max(1, n_tokens):.2f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table; columns that no row fills are left out."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("trace", lambda r: r.trace if len({x.trace for x in rows}) > 1 else ""),
        ("policy", lambda r: r.policy),
        ("slots", lambda r: f"{r.n_slots} ({100 * r.cache_fraction:.0f} %)"),
        ("state", lambda r: "cold" if r.cold else "kept"),
        ("machine", lambda r: r.profile or "" if r.mode == "clock" else ""),
        ("schedule", lambda r: r.schedule or ""),
        ("prefetch", lambda r: r.prefetch or ""),
        ("queries", lambda r: str(r.queries)),
        ("hits", lambda r: str(r.hits)),
        ("hit rate", lambda r: _percent(r.hit_rate)),
        ("of Belady", lambda r: _percent(r.of_belady)),
        ("MB/token", lambda r: _megabytes(r.bytes_moved, r.n_tokens) if r.bytes_moved is not None else ""),
    ]
    if any(r.mode == "clock" for r in rows):
        columns += [
            ("ms/token", lambda r: _number(r.ms_per_token)),
            ("t/s", lambda r: _number(r.tokens_per_s, 1)),
            ("prefill", lambda r: _number(r.prefill_ms_per_token) if r.prefill_ms_per_token else ""),
            ("decode", lambda r: _number(r.decode_ms_per_token) if r.prefill_ms_per_token else ""),
            ("stall ms", lambda r: _number(r.stall_ms_per_token)),
            ("CPU/GPU/link busy", _busy),
            ("prefetch used/wasted MB", _prefetched),
            ("of limit", lambda r: _percent(r.of_limit)),
        ]
    cells = [[cell(row) for _, cell in columns] for row in rows]
    shown = [i for i, (name, _) in enumerate(columns) if any(r[i] for r in cells) and name not in _common(rows)]
    return [columns[i][0] for i in shown], [[line[i] for i in shown] for line in cells]


def _common(rows: Sequence[Row]) -> dict[str, str]:
    """What all rows share, to be said once; oracles have no machine and join in."""
    timed = [r for r in rows if r.mode == "clock"]
    found = {"state": {"cold cache for every prompt" if r.cold else "state kept across prompts" for r in rows}}
    for name, values in (
        ("machine", [r.profile for r in timed]),
        ("schedule", [r.schedule for r in timed]),
        ("prefetch", [r.prefetch for r in timed]),
    ):
        found[name] = {str(v) for v in values}
    return {name: next(iter(values)) for name, values in found.items() if len(values) == 1}


def caption(rows: Sequence[Row]) -> str:
    """What the table leaves out because it is the same in all rows."""
    r = rows[0]
    n_expert = round(r.n_slots / r.cache_fraction) if r.cache_fraction else None
    what = f"{r.model}, {r.n_tokens} tokens" + (f", {n_expert} experts per layer" if n_expert else "")
    parts = [what] if len({x.trace for x in rows}) == 1 else []
    for name, value in _common(rows).items():
        parts.append(value if name == "state" else f"{name} {value}")
    if any(x.mode == "clock" for x in rows):
        parts.append("times are simulated")
    return ", ".join(parts)


def _busy(r: Row) -> str:
    if r.cpu_busy is None or r.gpu_busy is None or r.link_busy is None:
        return "-"
    return " / ".join(f"{100 * x:.0f}" for x in (r.cpu_busy, r.gpu_busy, r.link_busy)) + " %"


def _prefetched(r: Row) -> str:
    if not r.prefetch_bytes or r.prefetch_useful_bytes is None or r.prefetch_wasted_bytes is None:
        return ""
    return f"{r.prefetch_useful_bytes / 1e6:.0f} / {r.prefetch_wasted_bytes / 1e6:.0f}"


def _markdown(rows: Sequence[Row]) -> str:
    head, cells = table_cells(rows)
    lines = [f"| {' | '.join(line)} |" for line in (head, *cells)]
    return "\n".join([caption(rows), "", lines[0], "|" + "---|" * len(head), *lines[1:]])


def _table(rows: Sequence[Row]) -> str:
    from hybrimoe.cli.report import table

    return f"{caption(rows)}\n\n{table(*table_cells(rows))}"


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    "table": _table,
    "json": _json,
    "csv": _csv,
    "md": _markdown,
}


def render(rows: Sequence[Row], form: str) -> str:
    """The rows in one of `FORMATS`."""
    return FORMATS[form](rows)


def advice(rows: Sequence[Row]) -> str:
    """Which size pays, and with which policy, in one sentence; empty where one size was tried."""
    timed = [r for r in rows if r.mode == "clock" and r.tokens_per_s]
    real = [r for r in timed or rows if not r.policy.startswith("belady")]
    if len({r.n_slots for r in real}) < 2 or len({r.trace for r in real}) > 1:
        return ""

    def value(r: Row) -> float:
        return float(r.tokens_per_s or 0.0) if timed else r.hit_rate

    best = {n: max((r for r in real if r.n_slots == n), key=value) for n in sorted({r.n_slots for r in real})}
    values = [value(r) for r in best.values()]
    least, most = min(values), max(values)
    enough = next(r for r in best.values() if value(r) >= least + _PAYS_SHARE * (most - least))
    size = f"{enough.n_slots} slots per layer ({100 * enough.cache_fraction:.0f} % of the experts)"
    how = f"{enough.policy}" + (f", {enough.schedule}, prefetch {enough.prefetch}" if timed else "")
    if timed:
        gain = f"{value(enough):.1f} t/s simulated, from {least:.1f} at {min(best)} slots"
        return f"{size} pay with {how}: {gain}; the best of all sizes is {most:.1f}"
    return f"{size} pay with {how}: {enough.hit_rate:.1%} of queries hit, {enough.of_belady:.0%} of Belady"
