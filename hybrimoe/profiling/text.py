"""The profile for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe.profiling.limits import PATH_NAMES

__all__ = ["headline", "summary", "versus_stock"]

_SLOWEST = 5
_BAR = 20
_TITLES = {"prefill": "prompt", "decode": "generation"}
_SHORT = {"prefill": "prompt", "decode": "gen."}


def headline(profile: Mapping[str, Any]) -> str:
    """The sentence that says what limits generation (or the prompt, where nothing was generated)."""
    phases = profile["phases"]
    phase = phases.get("decode") or phases.get("prefill")
    return "" if phase is None else str(phase["limit"]["sentence"])


def versus_stock(profile: Mapping[str, Any]) -> list[str]:
    """Lines that compare with plain llama.cpp: measured, and what the guard thinks."""
    lines = []
    stock = profile.get("stock")
    for name, phase in profile["phases"].items():
        if stock and (theirs := stock.get(name)):
            ratio = phase["tokens_per_s"] / theirs
            lines.append(
                f"plain llama.cpp, measured beside: {_TITLES[name]} {theirs:.1f} t/s; "
                f"here {phase['tokens_per_s']:.1f} t/s ({ratio:.2f} x)"
            )
    if stock and stock.get("error"):
        lines.append(f"plain llama.cpp could not be measured: {stock['error']}")
    guard = profile.get("guard")
    if guard and guard["token_us"]:
        lines.append(
            f"guard: experts take {guard['token_us'] / 1e3:.2f} ms a token; llama.cpp's best placement in the same "
            f"memory would take {guard['floor_us'] / 1e3:.2f} ms (estimate); level {guard['level']}"
        )
    return lines


def summary(profile: Mapping[str, Any]) -> list[Any]:
    """Tables and sentences, one renderable each; they fit into 80 columns."""
    from rich.text import Text

    phases = profile["phases"]
    parts: list[Any] = [Text(_about(profile)), Text("")]
    for name in ("decode", "prefill"):
        if name in phases:
            limit = phases[name]["limit"]
            parts.append(Text(limit["sentence"], style="bold" if name == "decode" else ""))
            if name == "decode":
                parts.append(Text(limit["help"]))
    parts += [Text(""), _time_table(phases)]
    parts += [Text(""), _busy_table(phases)]
    if any(p["experts"]["hit_rate"] is not None for p in phases.values()):
        parts += [Text(""), _expert_table(phases), *(Text(line) for line in _prefetch_lines(profile))]
    parts += [Text(""), _layer_table(phases)]
    if prediction := profile.get("prediction"):
        predicted, observed = prediction["token_predicted_us"] / 1e3, prediction["token_observed_us"] / 1e3
        parts.append(
            Text(
                f"experts of a token: {predicted:.2f} ms predicted, {observed:.2f} ms observed "
                f"(median error of a layer {prediction['median_error']:.0%})"
            )
        )
    parts += [Text(line) for line in versus_stock(profile)]
    if profile["verified"]:
        parts.append(Text(f"warning: {profile['verified']}"))
    return parts


def _about(profile: Mapping[str, Any]) -> str:
    model, machine = profile["model"], profile["machine"]
    n_texts = len(profile["texts"])
    tokens = ", ".join(f"{p['n_tokens']} tokens of {_TITLES[n]}" for n, p in profile["phases"].items())
    return (
        f"{model['name']}: {model['n_moe_layers']} MoE layers, {model['n_experts']} experts, "
        f"top-{model['n_experts_used']}\n"
        f"{machine['description']}, {machine['n_threads']} threads; {n_texts} text{'s' * (n_texts != 1)}, {tokens}"
    )


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _bar(share: float) -> str:
    full = round(share * _BAR)
    return "#" * full + "." * (_BAR - full)


def _time_table(phases: Mapping[str, Any]) -> Any:
    head = ["where a token's time goes"]
    for name in phases:
        head += [f"{_SHORT[name]} ms", "%"]
    table = _table(*head)
    for part, title in PATH_NAMES.items():
        cells = []
        for phase in phases.values():
            us = phase["critical_us_per_token"][part]
            cells += [f"{us / 1e3:.3f}", f"{us / 10 / phase['ms_per_token']:.0f}"]
        if any(cell not in ("0.000", "0") for cell in cells):
            table.add_row(title, *cells)
    totals = [text for p in phases.values() for text in (f"{p['ms_per_token']:.3f}", f"{p['tokens_per_s']:.1f} t/s")]
    table.add_row("all", *totals)
    return table


def _busy_table(phases: Mapping[str, Any]) -> Any:
    table = _table("busy", *(_TITLES[name] for name in phases))
    for part in next(iter(phases.values()))["busy"]:
        table.add_row(part, *(f"{_bar(p['busy'][part])} {p['busy'][part]:4.0%}" for p in phases.values()))
    return table


def _expert_table(phases: Mapping[str, Any]) -> Any:
    from hybrimoe.cli.console import size_text

    table = _table("experts", *(_TITLES[name] for name in phases))

    def row(title: str, value: Any) -> None:
        table.add_row(title, *(value(p["experts"], p) for p in phases.values()))

    row("hit rate", lambda e, _: "-" if e["hit_rate"] is None else f"{e['hit_rate']:.0%}")
    row("computed on the GPU", lambda e, _: f"{e['gpu_share']:.0%}")
    row("copied", lambda e, _: f"{e['n_copies']}")
    row("evicted", lambda e, _: f"{e['n_evictions']}")
    row("moved per token", lambda e, _: size_text(e["h2d_bytes_per_token"]))
    return table


def _prefetch_lines(profile: Mapping[str, Any]) -> list[str]:
    from hybrimoe.cli.console import size_text

    p = profile["prefetch"]
    if not p["n_issued"]:
        return ["nothing was prefetched"]
    parts = [f"{size_text(p[f'prefetch_{kind}_bytes'])} {kind}" for kind in ("useful", "late", "wasted")]
    return [f"prefetch: {p['n_issued']:.0f} experts, {', '.join(parts)}"]


def _layer_table(phases: Mapping[str, Any]) -> Any:
    name = "decode" if "decode" in phases else "prefill"
    layers = phases[name]["layers"]
    slowest = sorted(layers, key=lambda x: -x["total_us"])[:_SLOWEST]
    mean = {key: sum(x[key] for x in layers) / len(layers) for key in ("total_us", *_COLUMNS)}
    table = _table(f"{_TITLES[name]}, us a layer", "all", *_COLUMNS.values())
    table.add_row(f"mean of {len(layers)}", f"{mean['total_us']:.0f}", *(f"{mean[k]:.0f}" for k in _COLUMNS))
    for x in slowest:
        table.add_row(f"layer {x['layer']}", f"{x['total_us']:.0f}", *(f"{x[k]:.0f}" for k in _COLUMNS))
    return table


_COLUMNS = {
    "router_us": "router",
    "plan_us": "plan",
    "cpu_us": "CPU",
    "gpu_us": "GPU",
    "copies_us": "copies",
    "wait_us": "wait",
    "merge_us": "merge",
}
