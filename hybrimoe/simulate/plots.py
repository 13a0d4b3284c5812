"""Pictures of a simulation, and one self-contained HTML page with all of them."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import HybrimoeError
from hybrimoe.native.core import Kind, Policy
from hybrimoe.native.core_runtime import GuardLevel
from hybrimoe.simulate.grid import Point, describe
from hybrimoe.simulate.replay import Row
from hybrimoe.simulate.report import advice, table_cells
from hybrimoe.simulate.timeline import layer_timeline, residency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrimoe.simulate.closed_loop import ClosedLoop, MachineChanges, Phase
    from hybrimoe.trace.format import TraceFile

__all__ = ["closed_loop_figure", "figures", "html_page", "png"]

_DPI = 110


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HybrimoeError("pictures need matplotlib, which is not installed", "pip install matplotlib") from error
    # No pyplot: it keeps global state and looks for a display.
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def png(figure: Figure) -> bytes:
    """The picture as PNG, without the date, so that the same rows give the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": "hybrimoe"})
    return out.getvalue()


def figures(rows: Sequence[Row], points: Sequence[Point], trace: TraceFile) -> list[tuple[str, Figure]]:
    """(title, picture): hit rate over size, speed over size, a layer's timeline, residency.

    Args:
        rows: of the first trace; `points` beside them.
    """
    found = [("Hit rate over cache size", _over_size(rows, "hit_rate", "hit rate, %", 100.0))]
    if any(r.mode == "clock" for r in rows):
        timed = [r for r in rows if r.mode == "clock"]
        found.append(
            ("Simulated speed over cache size", _over_size(timed, "tokens_per_s", "tokens per second (simulated)", 1.0))
        )
    middle = sorted({r.n_slots for r in rows if r.n_slots})
    if not middle:
        return found
    n_slots = middle[len(middle) // 2]
    pairs = [(r, p) for r, p in zip(rows, points, strict=True) if r.n_slots == n_slots]
    clocked = [(r, p) for r, p in pairs if r.mode == "clock"]
    if clocked:
        point = max(clocked, key=lambda pair: pair[0].tokens_per_s or 0.0)[1]
        token, layer, bars = layer_timeline(point, trace)
        if bars:
            what = f"{point.policy}, {point.schedule}, {n_slots} slots, {point.machine}; token {token}, layer {layer}"
            found.append((f"One layer's timeline ({what})", _timeline(bars, what)))
    real = [r for r, _ in pairs if not describe(Kind.EVICTION, Policy.parse(r.policy).name).oracle]
    if real:
        best = max(real, key=lambda r: r.hit_rate)
        what = f"{best.policy}, {n_slots} of {trace.model.n_expert} slots per layer"
        found.append((f"Residency ({what})", _heat_map(residency(best.policy, n_slots, trace), what)))
    return found


def _over_size(rows: Sequence[Row], name: str, label: str, factor: float) -> Figure:
    figure = _figure(8, 4.8)
    axes = figure.add_subplot()
    lines: dict[str, list[Row]] = {}
    several = {
        key: len({getattr(r, key) for r in rows if r.mode == "clock" or key == "cold"}) > 1
        for key in ("cold", "profile", "schedule", "prefetch")
    }
    for row in rows:
        parts = [row.policy]
        for key, shown in several.items():
            if shown and (value := getattr(row, key)) is not None:
                parts.append(("cold" if value else "kept") if key == "cold" else str(value))
        lines.setdefault(", ".join(parts), []).append(row)
    for title, line in lines.items():
        line.sort(key=lambda r: r.n_slots)
        is_oracle = describe(Kind.EVICTION, Policy.parse(line[0].policy).name).oracle
        style = "--" if is_oracle else "-"
        title = f"{title} (knows the future: the optimum)" if is_oracle else title
        values = [factor * (getattr(r, name) or 0.0) for r in line]
        axes.plot([r.n_slots for r in line], values, style, marker="o", markersize=3.5, label=title)
    axes.set_xlabel(f"slots per layer, of {round(rows[-1].n_slots / max(1e-9, rows[-1].cache_fraction))} experts")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.set_xticks(sorted({r.n_slots for r in rows}))
    sentence = textwrap.fill(advice(rows), 100)
    axes.set_title(f"{rows[0].model}, {rows[0].n_tokens} tokens\n{sentence}".rstrip(), fontsize=10)
    axes.legend(fontsize=8, loc="best", ncols=1 if len(lines) < 9 else 2)
    return figure


def _timeline(bars: Sequence[Any], what: str) -> Figure:
    figure = _figure(8, 2.6)
    axes = figure.add_subplot()
    axes.set_title(f"Who computes which expert when: {what}", fontsize=9)
    lanes = sorted({bar.lane for bar in bars})
    for bar in bars:
        at = lanes.index(bar.lane)
        colour = {"C": "#4c78a8", "G": "#54a24b", "l": "#e45756"}[bar.lane[0]]
        axes.barh(at, bar.end_us - bar.start_us, left=bar.start_us, color=colour, edgecolor="white")
        axes.text((bar.start_us + bar.end_us) / 2, at, str(bar.expert), ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlabel("microseconds (simulated); numbers are experts")
    return figure


def _heat_map(shares: Any, what: str) -> Figure:
    figure = _figure(8, max(2.5, 0.12 * len(shares) + 1))
    axes = figure.add_subplot()
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.set_title(f"Which experts stay in the cache: {what}", fontsize=10)
    figure.colorbar(image, ax=axes, label="share of the tokens that found it there")
    return figure


def closed_loop_figure(loop: ClosedLoop, changes: MachineChanges) -> Figure:
    """Time per token over tokens beside oracle and plain, the guard's levels below; what disturbs is shaded."""
    figure = _figure(9, 5.4)
    times, levels = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges = [w.first_token for w in loop.windows] + [loop.n_tokens]
    for name, label, style in (
        ("plain_us_per_token", "plain (better of all on the CPU, whole layers on the card)", {"color": "#888888"}),
        ("us_per_token", "ours, on beliefs", {"color": "#4c78a8", "linewidth": 2.0}),
        ("oracle_us_per_token", "oracle, told the true costs", {"color": "#e45756", "linestyle": "--"}),
    ):
        times.stairs([getattr(w, name) for w in loop.windows], edges, baseline=None, label=label, **style)
    times.set_yscale("log")
    times.set_ylabel("us per token (simulated)")
    times.grid(alpha=0.3)
    worst = f"worst to oracle in the last third {loop.worst_to_oracle_last_third:.3f}"
    what = f"{loop.model}, {loop.n_slots} slots per layer, {loop.policy}; every token replayed as decode"
    times.set_title(f"{what}\n{worst}", fontsize=10)
    names = [level.label for level in GuardLevel]
    levels.stairs([names.index(w.guard) for w in loop.windows], edges, baseline=None, color="#54a24b", linewidth=2.0)
    levels.set_yticks(range(len(names)), names, fontsize=8)
    levels.set_ylim(len(names) - 0.5, -0.5)
    levels.set_ylabel("guard")
    levels.grid(alpha=0.3)
    levels.set_xlabel("token")
    levels.set_xlim(0, loop.n_tokens)
    ends = [p.from_token for p in changes.phases[1:]] + [loop.n_tokens]
    usual = changes.phases[0]
    for phase, end in zip(changes.phases, ends, strict=True):
        if phase.from_token >= loop.n_tokens:
            break
        is_usual = (phase.factors, phase.disturbance) == (usual.factors, usual.disturbance)
        for axes in (times, levels):
            if not is_usual:
                axes.axvspan(phase.from_token, min(end, loop.n_tokens), color="#f58518", alpha=0.12, linewidth=0)
            axes.axvline(phase.from_token, color="#f58518", alpha=0.4, linewidth=0.8)
        # Many short phases, as of a ramp, would write over each other.
        if not is_usual and end - phase.from_token >= loop.n_tokens / 24:
            text = _what_is_true(phase)
            at = (phase.from_token, 0.98)
            times.annotate(text, at, xycoords=("data", "axes fraction"), va="top", fontsize=7)
    times.legend(fontsize=8, loc="best")
    return figure


def _what_is_true(phase: Phase) -> str:
    """Factors that are not 1, and disturbances, a line each."""
    f, d = phase.factors, phase.disturbance
    pairs = (("cpu", f.cpu), ("gpu", f.gpu), ("link", f.link), ("dram", f.dram))
    lines = [f"{name} x{value:g}" for name, value in pairs if value != 1.0]
    if d.outlier_share:
        lines.append(f"{100 * d.outlier_share:g} % x{d.outlier_factor:g}")
    if d.waits_every_layers and d.waits_us:
        lines.append(f"waits {d.waits_us / 1000:g} ms")
    return "\n".join(lines)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222;
 background: #fff }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .2rem .6rem; text-align: right;
 border-bottom: 1px solid #ddd } td:first-child, th:first-child { text-align: left } img { max-width: 100% }
.note { color: #666 } div { overflow-x: auto }
"""


def html_page(rows: Sequence[Row], pictures: Sequence[tuple[str, Figure]], command: str, notes: Sequence[str]) -> str:
    """One page that needs no other file and no network."""
    head, cells = table_cells(rows)

    def line(values: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"

    title = f"Expert cache simulation: {rows[0].model}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style></head>",
        f"<body><h1>{html.escape(title)}</h1>",
    ]
    if sentence := advice(rows):
        parts.append(f"<p><strong>{html.escape(sentence)}</strong></p>")
    parts += [f'<p class="note">{html.escape(text)}</p>' for text in notes]
    for name, figure in pictures:
        data = base64.b64encode(png(figure)).decode()
        parts.append(f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    body = "".join(line(row, "td") for row in cells)
    parts.append(f"<h2>All combinations</h2><div><table>{line(head, 'th')}{body}</table></div>")
    parts.append(f'<p class="note">{html.escape(command)}</p></body></html>')
    return "\n".join(parts) + "\n"
