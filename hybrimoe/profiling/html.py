"""The report: one HTML file that needs no other file and no network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import HybrimoeError
from hybrimoe.profiling.text import headline, versus_stock

if TYPE_CHECKING:
    from hybrimoe.profiling.analysis import Blocks, Copies
    from hybrimoe.profiling.run import Facts

__all__ = ["html_page"]

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.55 system-ui, sans-serif; margin: 0; color: #1c2733; background: #f4f6f8 }
main { max-width: 74rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 0 0 .2rem }
section { background: #fff; border: 1px solid #dde3e9; border-radius: 10px; padding: 1rem 1.2rem; margin: 1rem 0 }
.note { color: #5a6875; margin: .1rem 0 .6rem } .small { font-size: 13px }
.answer { font-size: 1.2rem; font-weight: 600; margin: .2rem 0 } .cards { display: flex; flex-wrap: wrap; gap: .8rem }
.card { flex: 1 1 9rem; background: #fff; border: 1px solid #dde3e9; border-radius: 10px; padding: .7rem 1rem }
.card b { display: block; font-size: 1.45rem } .card span { color: #5a6875; font-size: 13px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; width: 100% }
td, th { padding: .2rem .55rem; text-align: right; border-bottom: 1px solid #e6ebf0; white-space: nowrap }
td:first-child, th:first-child { text-align: left } th { background: #fff; position: sticky; top: 0 }
code { background: #eef1f4; padding: .1rem .3rem; border-radius: 4px; overflow-wrap: anywhere }
.warning { border-left: 5px solid #c8553d }
"""
_TITLES = {"decode": "Generation", "prefill": "Prompt"}


def html_page(profile: Mapping[str, Any], facts: Facts, blocks: Blocks, copies: Copies) -> str:
    """The whole page. Raises HybrimoeError where plotly is missing."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise HybrimoeError("the report needs plotly, which is not installed", "pip install plotly") from error
    title = f"Profile of {profile['model']['name']}"
    body = [_head(profile, title), _cards(profile), _answer(profile), *_plots(profile, facts, blocks, copies)]
    body += [_table(profile), _how(profile)]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
            f"<script>{get_plotlyjs()}</script></head><body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def _head(profile: Mapping[str, Any], title: str) -> str:
    model, machine = profile["model"], profile["machine"]
    about = (
        f"{model['architecture']}, {model['n_moe_layers']} MoE layers with {model['n_experts']} experts each, "
        f"{model['n_experts_used']} of them for every token. {machine['description']}, {machine['n_threads']} threads."
    )
    devices = ", ".join(
        f"{'a stand-in for a GPU (a second CPU backend)' if d['is_cpu'] else d['name']} with room for "
        f"{sum(d['n_slots'])} experts"
        for d in profile["devices"]
    )
    where = (
        f"Experts run on the CPU and on {devices}." if devices else "There is no accelerator: experts run on the CPU."
    )
    cut = "<p class='note'><b>The run was interrupted; this is what was done until then.</b></p>"
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="note">{html.escape(about)} {html.escape(where)}</p>']
    if profile["interrupted"]:
        parts.append(cut)
    if profile["verified"]:
        parts.append(f'<section class="warning">{html.escape(profile["verified"])}</section>')
    return "\n".join(parts)


def _cards(profile: Mapping[str, Any]) -> str:
    cards = []
    for name in ("decode", "prefill"):
        if phase := profile["phases"].get(name):
            cards.append((f"{phase['tokens_per_s']:.1f} t/s", f"{_TITLES[name].lower()}, tokens per second"))
            if (stock := profile.get("stock") or {}).get(name):
                ratio = phase["tokens_per_s"] / stock[name]
                cards.append((f"{ratio:.2f} x", f"plain llama.cpp's {_TITLES[name].lower()} ({stock[name]:.1f} t/s)"))
    if (decode := profile["phases"].get("decode")) and decode["experts"]["hit_rate"] is not None:
        experts = decode["experts"]
        cards.append((f"{experts['hit_rate']:.0%}", "of the experts asked for were on the accelerator"))
        cards.append((f"{experts['h2d_bytes_per_token'] / 2**20:.1f} MiB", "of experts moved per generated token"))
    divs = (f'<div class="card"><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>' for a, b in cards)
    return f'<div class="cards">{"".join(divs)}</div>'


def _answer(profile: Mapping[str, Any]) -> str:
    phases = profile["phases"]
    lines = [f'<p class="answer">{html.escape(headline(profile))}</p>']
    if "decode" in phases:
        lines.append(f"<p>{html.escape(phases['decode']['limit']['help'])}</p>")
        if "prefill" in phases:
            lines.append(f"<p>{html.escape(phases['prefill']['limit']['sentence'])}</p>")
    lines += [f'<p class="note">{html.escape(_capital(line))}.</p>' for line in versus_stock(profile)]
    return f"<section><h2>What limits the speed?</h2>{''.join(lines)}</section>"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plots(profile: Mapping[str, Any], facts: Facts, blocks: Blocks, copies: Copies) -> list[str]:
    from hybrimoe.profiling import plots

    phases = profile["phases"]
    devices = [d["label"] for d in profile["devices"]]
    names = profile["layers"]
    sections: list[tuple[str, str, Any]] = [
        (
            "Where does the time of a token go?",
            "Parts that follow each other and add up to 100 %. What runs beside something longer costs nothing and is "
            "not in here.",
            plots.time_shares(phases),
        )
    ]
    beside = "" if not devices else " Marks are work that runs beside the bars, on the accelerator and the link."
    if devices:
        sections.append(
            (
                "How busy were CPU, GPU and link?",
                "Share of the time that each had work. High everywhere is good; one at 100 % and the others low means "
                "that the others wait for it."
                + (
                    "" if not profile["devices_are_cpus"] else " Here the GPU is a stand-in: it shares the CPU's cores."
                ),
                plots.busy(phases),
            )
        )
    sections.append(
        (
            "What does each layer take?",
            f"Mean of all steps; a bar's height is the layer's time.{beside}",
            plots.layers(phases),
        )
    )
    if token := plots.timeline(blocks, copies, names, devices):
        sections.append(
            (
                "One generated token",
                "The token of median length, from its first expert layer to its last. White on the CPU's lane is what "
                "llama.cpp computes between the experts: attention and dense layers.",
                token,
            )
        )
    if profile["prediction"]:
        sections.append(
            (
                "Were the predictions right?",
                f"Time of a layer's experts in generation, as the cost model said and as it was; median error "
                f"{profile['prediction']['median_error']:.0%}. Plans are made with the predictions.",
                plots.prediction(profile["prediction"]["layers"]),
            )
        )
    if any(sum(map(sum, layer_counts)) for layer_counts in profile["heat"].values()):
        model = profile["model"]
        even = model["n_experts_used"] / model["n_experts"]
        sections.append(
            (
                "Which experts are asked for?",
                f"Bright experts are worth GPU memory. If all were equal, each would be asked for by {even:.1%} of the "
                "tokens.",
                plots.heat_map(profile["heat"], names, model["n_experts_used"]),
            )
        )
    if facts.residency:
        sections.append(
            (
                "Which experts were on the accelerator?",
                "Of all layers: how much of the time. Of a single layer (menu on the right): at which generated token; "
                "short dashes are experts that came and went.",
                plots.residency(facts.residency, names),
            )
        )
    return [_section(title, note, figure) for title, note, figure in sections]


def _section(title: str, note: str, figure: Any) -> str:
    # Zooming needs no buttons, and they would lie over the legend.
    config = {"displayModeBar": False, "responsive": True}
    div = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
    return f'<section><h2>{html.escape(title)}</h2><p class="note">{html.escape(note)}</p>{div}</section>'


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _table(profile: Mapping[str, Any]) -> str:
    parts = []
    columns = {
        "total_us": "all",
        "router_us": "router",
        "plan_us": "planning",
        "launch_us": "start",
        "cpu_us": "CPU experts",
        "gpu_us": "GPU experts*",
        "copies_us": "copies*",
        "wait_us": "wait",
        "merge_us": "merge",
    }
    for name in ("decode", "prefill"):
        if name not in profile["phases"]:
            continue
        rows = []
        for layer in profile["phases"][name]["layers"]:
            times = (f"{layer[key]:.1f}" for key in columns)
            hits = "-" if layer["hit_rate"] is None else f"{layer['hit_rate']:.0%}"
            counts = (str(layer[key]) for key in ("n_experts_cpu", "n_experts_gpu", "n_evictions"))
            moved = f"{layer['h2d_bytes'] / 2**20:.1f}"
            rows.append(_row([str(layer["layer"]), *times, hits, *counts, moved], "td"))
        head = ["layer", *columns.values(), "hits", "on CPU", "on GPU", "evicted", "MiB moved"]
        parts.append(
            f"<details{' open' if name == 'decode' else ''}>"
            f"<summary>{_TITLES[name]}, microseconds of one step</summary>"
            f'<div class="scroll"><table>{_row(head, "th")}{"".join(rows)}</table></div></details>'
        )
    note = "Times are means over the steps; * runs beside the CPU's experts. Counts are sums over the run."
    return f'<section><h2>All layers</h2><p class="note">{note}</p>{"".join(parts)}</section>'


def _how(profile: Mapping[str, Any]) -> str:
    texts = ", ".join(f"{t['domain']} ({t['n_prompt']} + {t['n_decode']})" for t in profile["texts"])
    recording, tool = profile["recording"], profile["tool"]
    lines = [
        f"Texts, tokens of prompt + generation: {texts}. Generated tokens are the text's own, fed one by one, so that "
        "two runs do the same work.",
        "Speeds are of llama.cpp's decode calls alone.",
        f"Recording took {recording['us_per_decode_pass']:.0f} us of a token"
        + (f", {recording['share']:.2%}." if recording["share"] is not None else ".")
        + (f" {recording['n_dropped']} steps are missing." if recording["n_dropped"] else ""),
    ]
    if profile["devices"] and not all(p["gpu_time_is_measured"] for p in profile["phases"].values()):
        lines.append(
            "How long an accelerator computed is measured where it was waited for; elsewhere it is the cost model's."
        )
    lines += profile["events"][:4]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    versions = (
        f"hybrimoe {tool['version']} ({tool['commit']}), llama-cpp-python {tool['llama_cpp_python']}, {profile['date']}"
    )
    return (
        f'<section class="small"><h2>How this was measured</h2><ul>{items}</ul>'
        f'<p class="note">{html.escape(versions)}<br><code>{html.escape(profile["command"])}</code></p></section>'
    )
