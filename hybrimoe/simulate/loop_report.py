"""A closed loop as table and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from hybrimoe.simulate.closed_loop import WINDOW, ClosedLoop, Window

__all__ = ["FORMATS", "render"]

# More windows than this are folded where neighbours say the same.
_MOST_ROWS = 24
_SAME = 0.02  # of the ratios
_HEAD = ["tokens", "us/token", "to oracle", "to plain", "trying", "guard", "trials", "experts on GPU"]
_BELIEVED = ["cpu", "gpu", "link", "dram"]


def _says_the_same(windows: Sequence[Window]) -> bool:
    ratios = ([w.to_oracle for w in windows], [w.to_plain for w in windows])
    return len({w.guard for w in windows}) == 1 and all(max(r) - min(r) <= _SAME for r in ratios)


def _rows(windows: Sequence[Window]) -> list[list[Window]]:
    rows: list[list[Window]] = []
    for window in windows:
        if rows and len(windows) > _MOST_ROWS and _says_the_same([*rows[-1], window]):
            rows[-1].append(window)
        else:
            rows.append([window])
    return rows


def _cells(row: Sequence[Window], n_tokens: int) -> list[str]:
    begin, end = row[0].first_token, min(n_tokens, row[-1].first_token + WINDOW)
    times = [w.us_per_token * (min(n_tokens, w.first_token + WINDOW) - w.first_token) for w in row]
    trying = sum(w.trying * us for w, us in zip(row, times, strict=True)) / sum(times) if sum(times) else 0.0
    believed = row[-1].believed
    return [
        f"{begin}-{end - 1}",
        f"{sum(times) / (end - begin):.0f}",
        f"{max(w.to_oracle for w in row):.3f}",
        f"{max(w.to_plain for w in row):.3f}",
        f"{100 * trying:.2f}",
        row[0].guard,
        str(sum(w.n_trials for w in row)),
        f"{sum(w.experts_gpu for w in row) / (end - begin):.1f}",
        *(f"{value:.2f}" for value in (believed.cpu, believed.gpu, believed.link, believed.dram)),
    ]


def _table(loop: ClosedLoop) -> str:
    from hybrimoe.cli.report import table

    rows = _rows(loop.windows)
    lines = [
        f"{loop.model}, {loop.n_tokens} tokens, {loop.n_slots} slots per layer, {loop.policy}; times are simulated, "
        "every token is replayed as decode",
        "trying: % of the time; experts on GPU: per token; cpu, gpu, link, dram: a time as believed at the row's end, "
        "over the true one",
    ]
    if len(rows) < len(loop.windows):
        lines.append("windows that say the same share a row: means of their times, the worst of their ratios")
    lines += ["", table([*_HEAD, *_BELIEVED], [_cells(row, loop.n_tokens) for row in rows]), ""]
    return "\n".join([*lines, f"worst to oracle in the last third: {loop.worst_to_oracle_last_third:.3f}"])


def _json(loop: ClosedLoop) -> str:
    from hybrimoe.cli.trace import without_nan

    return json.dumps(without_nan(loop.to_json()), ensure_ascii=False, indent=1)


FORMATS: dict[str, Callable[[ClosedLoop], str]] = {"table": _table, "json": _json}


def render(loop: ClosedLoop, form: str) -> str:
    """The windows in one of `FORMATS`."""
    return FORMATS[form](loop)
