"""A snapshot as a page in the terminal: made anew from nothing but the snapshot and the terminal's size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

__all__ = ["dashboard"]

_SHADES = " ░▒▓█"
# From cold to hot; readable on dark and light backgrounds alike.
_HEAT = ("grey37", "blue", "cyan", "green", "yellow", "red")
_NARROW = 56
_BAR = 24


def dashboard(snapshot: dict[str, Any], width: int, height: int | None, *, colour: bool) -> RenderableType:
    """The page for a terminal of `width` columns and `height` rows (None: as long as it wants to be)."""
    from rich.console import Group
    from rich.text import Text

    width = max(8, width)
    lines = _head(snapshot, width)
    if snapshot["phase"] == "loading":
        return Group(*lines, Text("loading the model ...", overflow="ellipsis", no_wrap=True))
    lines += _speeds(snapshot, width)
    lines += _busy(snapshot, width, colour)
    lines += _cache(snapshot, width)
    tail = _events(snapshot, width, 3 if height is not None and height < 30 else 6)
    room = None if height is None else height - len(lines) - len(tail) - 1
    lines += _heat_map(snapshot, width, room, colour)
    lines += tail
    if height is not None:
        lines = lines[: max(1, height - 1)]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
        line.truncate(width, overflow="ellipsis")
    return Group(*lines)


def _text(*parts: str | tuple[str, str]) -> Text:
    from rich.text import Text

    return Text.assemble(*parts)


def _head(snapshot: dict[str, Any], width: int) -> list[Text]:
    model = snapshot["model"]
    phase = snapshot["phase"]
    style = {"idle": "dim", "loading": "yellow"}.get(phase, "bold green")
    up = int(snapshot.get("uptime_s", 0))
    title = _text(("hybrimoe ", "bold"), snapshot["command"], f" {snapshot['pid']} ", (phase, style))
    more = f"  up {up // 3600}:{up // 60 % 60:02}:{up % 60:02}"
    requests = snapshot.get("requests")
    if requests:
        more += f"  requests {requests['running']} running, {requests['waiting']} waiting, {requests['done']} done"
    title.append(more, "dim")
    lines = [title]
    shape = ""
    if model.get("n_experts"):
        shape = f"  {model['n_moe_layers']} MoE layers x {model['n_experts']} experts, top-{model['top_k']}"
    lines.append(_text((model.get("name", ""), "bold"), shape))
    return lines


def _speeds(snapshot: dict[str, Any], width: int) -> list[Text]:
    rates, totals, context = snapshot["rates"] or {}, snapshot["totals"], snapshot.get("context")
    generation, prompt = rates.get("generation_per_s"), rates.get("prompt_per_s")
    now = _text(
        ("generation ", "dim"),
        (_rate(generation), "bold"),
        ("  prompt ", "dim"),
        (_rate(prompt), "bold"),
    )
    now.append(f"  on average {_rate(totals['generation_per_s'])}, {_rate(totals['prompt_per_s'])}", "dim")
    tokens = _text(("tokens ", "dim"), f"{totals['prompt_tokens']} read, {totals['generated_tokens']} written")
    if context is not None:  # known of hosts that say so
        used = context["n_tokens"] / max(1, context["n_ctx"])
        tokens.append("  context ", "dim").append(f"{context['n_tokens']} of {context['n_ctx']} ({used:.0%})")
    return [now, tokens]


def _rate(per_s: float | None) -> str:
    return "-" if not per_s else f"{per_s:.1f} t/s"


def _busy(snapshot: dict[str, Any], width: int, colour: bool) -> list[Text]:
    """Bars of what the wall time went to."""
    if not snapshot.get("plugin", True):
        return [_text(("the plug-in is off: plain llama.cpp", "dim"))]
    busy = (snapshot["rates"] or {}).get("busy") or {}
    rows = [("CPU experts", busy.get("cpu"), "cyan"), ("GPU experts", busy.get("gpu"), "magenta")]
    rows += [("link", busy.get("link"), "yellow"), ("waiting", busy.get("wait"), "red")]
    if not snapshot["devices"]:
        rows = rows[:1]
    n_bar = max(4, min(_BAR, width - 20))
    lines = []
    for name, share, style in rows:
        filled = 0 if share is None else round(share * n_bar)
        bar = ("█" * filled, style), ("░" * (n_bar - filled), "dim")
        value = "   -" if share is None else f"{share:4.0%}"
        lines.append(_text((f"{name:<12}", "dim"), *bar, f" {value}"))
    if len(lines) > 1 and width >= _NARROW:
        lines[1].append("  (estimated)", "dim")
    if not snapshot["devices"]:
        lines[0].append("  all experts on the CPU", "dim")
    elif width >= _NARROW:
        moved = (snapshot["rates"] or {}).get("link_bytes_per_s")
        lines[2].append("" if moved is None else f"  {_size(moved)}/s", "dim")
    return lines


def _cache(snapshot: dict[str, Any], width: int) -> list[Text]:
    given_up = snapshot.get("given_up")
    why = [_text(("the expert cache was given up: ", "bold"), (str(given_up), ""))] if given_up else []
    if not snapshot["devices"]:
        return why
    rates, totals = snapshot["rates"] or {}, snapshot["totals"]
    hit = rates.get("hit_rate")
    lines = [
        _text(
            ("hit rate ", "dim"),
            ("-" if hit is None else f"{hit:.0%}", "bold"),
            ("  on average ", "dim"),
            "-" if totals["hit_rate"] is None else f"{totals['hit_rate']:.0%}",
            ("  on GPU ", "dim"),
            "-" if totals["gpu_share"] is None else f"{totals['gpu_share']:.0%}",
            ("  evictions ", "dim"),
            str(totals["evictions"]),
            ("  prefetched ", "dim"),
            f"{totals['prefetched']} of {totals['copies']} copies",
        )
    ]
    for device in snapshot["devices"]:
        used = device["total_bytes"] - device["free_bytes"]
        suspended = "  suspended" if device["suspended"] else ""
        lines.append(
            _text(
                (f"{device['name']} ", "bold"),
                f"{device['n_slots']} slots ({_size(device['cache_bytes'])})",
                ("  memory ", "dim"),
                f"{_size(used)} of {_size(device['total_bytes'])}",
                (suspended, "red"),
            )
        )
    guard, fixed = snapshot["guard"], snapshot.get("reproducible") or {}
    if fixed.get("on"):
        word = ("yes", "bold") if fixed["holds"] else ("no longer", "red")
        lines.append(_text(("reproducible ", "dim"), word))
    elif guard:
        costs = f"  MoE {guard['token_us'] / 1e3:.1f} ms a token, plain placement {guard['floor_us'] / 1e3:.1f} ms"
        level = guard["level"] if guard["on"] else "off"
        lines.append(_text(("guard ", "dim"), (level, "bold"), (costs if guard["token_us"] else "", "dim")))
    lines += why
    for pause in snapshot.get("paused") or ():
        lines.append(_text((f"{pause['what']} is paused: ", "bold"), (str(pause["reason"]), "")))
    return lines


def _heat_map(snapshot: dict[str, Any], width: int, room: int | None, colour: bool) -> list[Text]:
    """Layers down, experts across: how often each expert is asked for; capital letters of shade where it has a slot."""
    experts = snapshot["experts"]
    layers, heat, on = experts["layers"], experts["heat"], experts["on"]
    if not layers or (room is not None and room < 4) or width < 16:
        return []
    n_experts = max((len(row) for row in (heat or on)), default=0)
    if not n_experts or (heat is None and not any(on)):
        return []
    n_rows = len(layers) if room is None else max(1, min(len(layers), room - 2))
    n_columns = min(n_experts, width - 5)
    n_wide = min(2, (width - 5) // n_columns)  # terminals' cells are about twice as high as wide
    title = "routing: layers down, experts across, dark to bright" if heat else "experts with a slot"
    lines = [_text(), _text((title, "dim"))]
    if heat and any(any(d >= 0 for d in row) for row in on):
        lines[-1].append(", underlined: on the GPU", "dim")
    for r in range(n_rows):
        first, last = r * len(layers) // n_rows, (r + 1) * len(layers) // n_rows
        line = _text((f"{layers[first]:>4} ", "dim"))
        for c in range(n_columns):
            a, b = c * n_experts // n_columns, (c + 1) * n_experts // n_columns
            cells = [(row, e) for row in range(first, max(last, first + 1)) for e in range(a, max(b, a + 1))]
            warm = (
                max((heat[row][e] * n_experts for row, e in cells if e < len(heat[row])), default=0.0) if heat else 0.0
            )
            held = any(e < len(on[row]) and on[row][e] >= 0 for row, e in cells)
            mark, style = _cell(warm if heat else float(held) * 4, held and heat is not None, colour)
            line.append(mark * n_wide, style)
        lines.append(line)
    return lines


def _cell(warm: float, held: bool, colour: bool) -> tuple[str, str]:
    """`warm` is the expert's share relative to the average: 1 is as often as any other."""
    level = 0 if warm < 0.1 else 1 if warm < 0.5 else 2 if warm < 1 else 3 if warm < 2 else 4 if warm < 3 else 5
    if colour:
        return "■", _HEAT[level] + (" underline" if held else "")
    return _SHADES[min(level, 4)], "underline" if held else ""


def _events(snapshot: dict[str, Any], width: int, n: int) -> list[Text]:
    events = snapshot["events"][-n:]
    if not events:
        return []
    return [_text(), *(_text((f"{e['number']:>4} ", "dim"), e["text"]) for e in events)]


def _size(n_bytes: float) -> str:
    from hybrimoe.cli.console import size_text

    return size_text(n_bytes)
