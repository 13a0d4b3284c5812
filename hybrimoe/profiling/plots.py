"""The plots of the report, as plotly figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybrimoe.profiling.analysis import BEGIN, CPU, GPU, LAUNCH, MERGE, PLAN, ROUTER, WAIT
from hybrimoe.profiling.limits import PATH_NAMES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from hybrimoe.profiling.analysis import Blocks, Copies

__all__ = ["busy", "heat_map", "layers", "prediction", "residency", "time_shares", "timeline"]

# The same colours for the same things in all plots (distinguishable without red and green).
COLOURS: Mapping[str, str] = {
    "dense": "#9aa5b1",
    "router": "#b07aa1",
    "plan": "#d4a6c8",
    "launch": "#e8cfe1",
    "cpu_experts": "#4e79a7",
    "gpu_experts": "#f2a93b",
    "copies": "#c8553d",
    "merge": "#76b7b2",
}
_TITLES = {"decode": "generation", "prefill": "prompt"}


def _figure(height: int, **layout: Any) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        height=height,
        margin={"l": 70, "r": 20, "t": 40, "b": 50},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        **layout,
    )
    return figure


def time_shares(phases: Mapping[str, Any]) -> Figure:
    """One bar for each phase: parts of a token's time, which add up to it."""
    figure = _figure(120 + 70 * len(phases), barmode="stack")
    names = [name for name in ("prefill", "decode") if name in phases]
    labels = [_TITLES[name] for name in names]
    for part, title in PATH_NAMES.items():
        us = [phases[name]["critical_us_per_token"][part] for name in names]
        shares = [value / 10 / phases[name]["ms_per_token"] for value, name in zip(us, names, strict=True)]
        if max(shares) < 0.05:
            continue
        figure.add_bar(
            y=labels,
            x=shares,
            name=title,
            orientation="h",
            marker_color=COLOURS[part],
            text=[f"{share:.0f} %" if share >= 4 else "" for share in shares],
            textposition="inside",
            insidetextanchor="middle",
            customdata=[value / 1e3 for value in us],
            hovertemplate=f"{title}: %{{customdata:.3f}} ms a token, %{{x:.1f}} %<extra>%{{y}}</extra>",
        )
    figure.update_xaxes(title="% of the time of a token", range=[0, 100])
    figure.update_layout(margin_l=90)
    return figure


def busy(phases: Mapping[str, Any]) -> Figure:
    """How much of the time CPU, GPU and link had work."""
    figure = _figure(260, barmode="group")
    for name in ("prefill", "decode"):
        if name in phases:
            shares = phases[name]["busy"]
            figure.add_bar(
                x=list(shares),
                y=[100 * share for share in shares.values()],
                name=_TITLES[name],
                marker_color={"prefill": "#a0cbe8", "decode": "#4e79a7"}[name],
                text=[f"{share:.0%}" for share in shares.values()],
                hovertemplate="%{x}: busy %{y:.1f} % of the time<extra></extra>",
            )
    figure.update_yaxes(title="% of the time", range=[0, 105])
    return figure


def _buttons(names: Sequence[str], n_each: int) -> dict[str, Any]:
    """Buttons that show one group of `n_each` traces and hide the others."""
    buttons = []
    for i, name in enumerate(names):
        visible = [j // n_each == i for j in range(n_each * len(names))]
        buttons.append({"label": name, "method": "update", "args": [{"visible": visible}]})
    return {
        "type": "buttons",
        "direction": "right",
        "buttons": buttons,
        "x": 1,
        "xanchor": "right",
        "y": 1.02,
        "yanchor": "bottom",
        "showactive": True,
    }


def _in_order(phases: Mapping[str, Any]) -> list[str]:
    return [name for name in ("decode", "prefill") if name in phases]


def layers(phases: Mapping[str, Any]) -> Figure:
    """Each layer's time: what follows each other stacked, what runs beside as marks."""
    import plotly.graph_objects as go

    figure = _figure(420, barmode="stack")
    stacked = (
        ("router_us", "router", COLOURS["router"]),
        ("plan_us", "planning", COLOURS["plan"]),
        ("launch_us", "starting the accelerator", COLOURS["launch"]),
        ("cpu_us", "experts on the CPU", COLOURS["cpu_experts"]),
        ("wait_us", "waiting for the accelerator", "#e15759"),
        ("merge_us", "merging", COLOURS["merge"]),
    )
    marks = (
        ("gpu_us", "beside: experts on the accelerator", "diamond", COLOURS["gpu_experts"]),
        ("copies_us", "beside: copies", "x", COLOURS["copies"]),
    )
    shown = _in_order(phases)
    for i, name in enumerate(shown):
        data = phases[name]["layers"]
        x = [row["layer"] for row in data]
        for key, title, colour in stacked:
            figure.add_bar(
                x=x,
                y=[row[key] for row in data],
                name=title,
                marker_color=colour,
                visible=i == 0,
                hovertemplate=f"layer %{{x}}: {title} %{{y:.1f}} us<extra></extra>",
            )
        for key, title, symbol, colour in marks:
            values = [row[key] for row in data]
            figure.add_trace(
                go.Scatter(
                    x=x,
                    y=values,
                    name=title,
                    mode="markers",
                    marker={"symbol": symbol, "color": colour, "size": 8, "line": {"width": 1, "color": "#333"}},
                    visible=i == 0,
                    showlegend=any(values),
                    hovertemplate=f"layer %{{x}}: {title} %{{y:.1f}} us<extra></extra>",
                )
            )
    figure.update_layout(updatemenus=[_buttons([_TITLES[n] for n in shown], len(stacked) + len(marks))])
    figure.update_layout(legend={"y": -0.2, "yanchor": "top", "traceorder": "normal"}, margin_b=110)
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="microseconds of one step", rangemode="tozero")
    return figure


def prediction(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Predicted and observed time of each layer's experts."""
    figure = _figure(320, barmode="group")
    x = [row["layer"] for row in rows]
    for key, title, colour in (("predicted_us", "predicted", "#bab0ac"), ("observed_us", "observed", "#4e79a7")):
        figure.add_bar(
            x=x,
            y=[row[key] for row in rows],
            name=title,
            marker_color=colour,
            hovertemplate=f"layer %{{x}}: {title} %{{y:.1f}} us<extra></extra>",
        )
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="microseconds of a token")
    return figure


def heat_map(heat: Mapping[str, Sequence[Sequence[int]]], layer_names: Sequence[int], top_k: int) -> Figure:
    """How often each expert was asked for."""
    import numpy as np

    shown = [name for name in ("decode", "prefill") if np.sum(heat[name])]
    n_layers = len(layer_names)
    figure = _figure(max(280, 120 + 14 * n_layers))
    for i, name in enumerate(shown):
        counts = np.asarray(heat[name], dtype=np.float64)
        tokens = np.maximum(counts.sum(axis=1, keepdims=True) / top_k, 1.0)
        figure.add_heatmap(
            z=(100 * counts / tokens).astype(np.float32),
            y=[str(n) for n in layer_names],
            colorscale="Cividis",
            zmin=0,
            colorbar={"title": "% of<br>tokens"},
            visible=i == 0,
            hovertemplate="layer %{y}, expert %{x}: asked for by %{z:.1f} % of the tokens<extra></extra>",
        )
    figure.update_layout(updatemenus=[_buttons([_TITLES[n] for n in shown], 1)])
    figure.update_xaxes(title="expert")
    figure.update_yaxes(title="layer", type="category", autorange="reversed")
    return figure


def residency(samples: Sequence[tuple[int, Sequence[Sequence[int]]]], layer_names: Sequence[int]) -> Figure:
    """Which experts the accelerators held over time: a picture for each layer, and all layers as a mean."""
    import numpy as np

    tokens = [token for token, _ in samples]
    widest = max(len(experts) for experts in samples[0][1])
    padded = [[[*experts, *[-1] * (widest - len(experts))] for experts in where] for _, where in samples]
    held = np.asarray(padded) >= 0  # [n_samples, n_layers, n_expert]
    figure = _figure(420)
    figure.add_heatmap(
        z=(100 * held.mean(axis=0)).astype(np.float32),
        y=[str(n) for n in layer_names],
        colorscale="Cividis",
        zmin=0,
        zmax=100,
        colorbar={"title": "% of<br>the time"},
        hovertemplate="layer %{y}, expert %{x}: on the accelerator %{z:.0f} % of the time<extra></extra>",
    )
    names = ["all layers"]
    for number, layer in enumerate(layer_names):
        names.append(f"layer {layer}")
        figure.add_heatmap(
            z=held[:, number, :].T.astype(np.uint8),
            x=tokens,
            colorscale=[[0, "#eef1f4"], [1, "#f2a93b"]],
            zmin=0,
            zmax=1,
            showscale=False,
            visible=False,
            hovertemplate="token %{x}, expert %{y}: %{z} (1: on the accelerator)<extra></extra>",
        )
    buttons = []
    for i, name in enumerate(names):
        axes = ("expert", "layer") if i == 0 else ("generated token", "expert")
        kind = "category" if i == 0 else "linear"
        visible = [j == i for j in range(len(names))]
        layout = {
            "xaxis.title.text": axes[0],
            "yaxis.title.text": axes[1],
            "yaxis.type": kind,
            "yaxis.autorange": "reversed" if i == 0 else True,
            "xaxis.autorange": True,
        }
        buttons.append({"label": name, "method": "update", "args": [{"visible": visible}, layout]})
    menu = {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "direction": "down"}
    figure.update_layout(updatemenus=[menu])
    figure.update_xaxes(title="expert")
    figure.update_yaxes(title="layer", type="category", autorange="reversed")
    return figure


def timeline(blocks: Blocks, copies: Copies, layer_names: Sequence[int], devices: Sequence[str]) -> Figure | None:
    """One generated token, the one of median length: who did what when. None where none was generated."""
    import numpy as np

    decode = np.flatnonzero(blocks.of(1))
    if not len(decode):
        return None
    _, first = np.unique(blocks.step[decode], return_index=True)
    last = np.append(first[1:], len(decode)) - 1
    lengths = blocks.ends[decode[last], MERGE] - blocks.ends[decode[first], BEGIN]
    chosen = int(np.argsort(lengths)[len(lengths) // 2])
    mine = decode[first[chosen] : last[chosen] + 1]
    start, end = blocks.ends[mine[0], BEGIN], blocks.ends[mine[-1], MERGE]
    bars: dict[str, list[tuple[str, float, float, str]]] = {}

    def add(kind: str, lane: str, begin: float, until: float, text: str) -> None:
        if until > begin:
            bars.setdefault(kind, []).append((lane, begin - start, until - begin, text))

    kinds = {ROUTER: "router", PLAN: "plan", LAUNCH: "launch", CPU: "cpu_experts", MERGE: "merge"}
    for i in mine:
        ends, layer = blocks.ends[i], layer_names[int(blocks.layer[i])]
        for column, kind in kinds.items():
            add(kind, "CPU", ends[column - 1], ends[column], f"layer {layer}")
        add("wait", "CPU", ends[CPU], ends[WAIT], f"layer {layer}")
        if blocks.n_gpu[i]:
            add("gpu_experts", devices[0] if len(devices) == 1 else "GPUs", ends[PLAN], ends[GPU], f"layer {layer}")
    here = (copies.end > start) & (copies.begin < end)
    for i in np.flatnonzero(here):
        text = f"layer {layer_names[int(copies.layer[i])]}, expert {int(copies.expert[i])}"
        add("copies", f"link to {devices[int(copies.device[i])]}", copies.begin[i], copies.end[i], text)
    titles = {**PATH_NAMES, "gpu_experts": "experts on the accelerator", "copies": "copies", "wait": "waiting"}
    figure = _figure(200 + 50 * len({bar[0] for group in bars.values() for bar in group}), barmode="overlay")
    for kind, group in bars.items():
        figure.add_bar(
            y=[bar[0] for bar in group],
            base=[bar[1] for bar in group],
            x=[bar[2] for bar in group],
            orientation="h",
            name=titles[kind],
            marker_color=COLOURS.get(kind, "#e15759"),
            marker_line_width=0,
            customdata=[bar[3] for bar in group],
            hovertemplate=f"%{{customdata}}: {titles[kind]}, %{{x:.1f}} us<extra></extra>",
        )
    figure.update_xaxes(title="microseconds since the token began (drag to zoom, double click to go back)")
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(margin_l=110)
    return figure
