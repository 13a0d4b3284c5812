"""Tables about experts: what the counters say, and where each layer's experts are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybrimoe.cli.console import size_text

if TYPE_CHECKING:
    from hybrimoe.engine import Engine
    from hybrimoe.generation import Answer
    from hybrimoe.native.plugin import LayerCounters


def table(head: list[str], rows: list[list[str]]) -> str:
    """Plain aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in [head, *rows])


def expert_table(engine: Engine) -> str:
    """What each MoE layer did since the counters were last reset."""
    if engine.plugin is None:
        return "no counters: the plug-in is off"
    counters = engine.counters()
    if not counters:
        return "no expert has run yet"
    head = ["layer", "steps", "tokens", "blocks", "delegated", "experts CPU", "experts GPU", "router ms", "experts ms"]
    head.append("merge ms")
    return table(head, [_counter_row(c) for c in counters] + [_total_row(counters)])


def prediction_table(engine: Engine) -> str:
    """What each layer's experts were predicted to take in a decode step, and what they took."""
    from hybrimoe.predictions import median_error, predictions

    layers = predictions(engine)
    if not layers:
        return "predicted times: unknown without a decode step and this machine's costs (hybrimoe probe MODEL)"

    def row(name: str, n_steps: int, predicted_us: float, observed_us: float) -> list[str]:
        error = f"{predicted_us / observed_us - 1:+.0%}"
        return [name, str(n_steps), f"{predicted_us:.1f}", f"{observed_us:.1f}", error]

    rows = [row(str(p.layer), p.n_steps, p.predicted_us, p.observed_us) for p in layers]
    sums = sum(p.predicted_us for p in layers), sum(p.observed_us for p in layers)
    rows.append(row("token", max(p.n_steps for p in layers), *sums))
    lines = table(["layer", "decode steps", "predicted us", "observed us", "error"], rows)
    return f"{lines}\nmedian error of a layer {median_error(layers):.0%}"


def _counter_row(c: LayerCounters) -> list[str]:
    counts = (c.n_steps, c.n_tokens, c.n_blocks, c.n_blocks_delegated, c.n_experts_cpu, c.n_experts_gpu)
    times = (c.router_us, c.experts_us, c.merge_us)
    return [str(c.layer), *(str(n) for n in counts), *(f"{us / 1000:.1f}" for us in times)]


def _total_row(counters: list[LayerCounters]) -> list[str]:
    names = ("n_blocks", "n_blocks_delegated", "n_experts_cpu", "n_experts_gpu")
    sums = [str(sum(getattr(c, name) for c in counters)) for name in names]
    times = [f"{sum(getattr(c, n) for c in counters) / 1000:.1f}" for n in ("router_us", "experts_us", "merge_us")]
    return ["all", str(max(c.n_steps for c in counters)), str(max(c.n_tokens for c in counters)), *sums, *times]


def residency_table(engine: Engine) -> str:
    """Where the experts of each layer are, and how large they are."""
    verification = engine.verification
    rows = []
    on = engine.residency()
    for layer in engine.info.moe_layers:
        if layer.predicts_ahead:
            continue
        runs_in = "llama.cpp"
        if engine.plugin is not None and verification is not None:
            dispatched, delegated = layer.index in verification.dispatched, layer.index in verification.delegated
            runs_in = "plug-in" if dispatched else "plug-in, delegated" if delegated else "llama.cpp"
        rows.append(
            [
                str(layer.index),
                str(layer.n_experts),
                str(layer.n_experts_used),
                "/".join(layer.expert_types),
                size_text(layer.bytes_per_expert),
                size_text(layer.expert_bytes),
                _where(engine, on.get(layer.index, [])),
                runs_in,
            ]
        )
    return table(["layer", "experts", "top-k", "type", "per expert", "all", "on", "run by"], rows)


def _where(engine: Engine, on: list[int]) -> str:
    """'CPU', or how many of the layer's experts each accelerator holds: 'CUDA0 32, CPU 96'."""
    names = [device["name"] for device in engine.expert_state().get("devices", ())]
    held = [(name, on.count(i)) for i, name in enumerate(names) if on.count(i)]
    if not held:
        return "CPU"
    return ", ".join(f"{name} {n}" for name, n in [*held, ("CPU", on.count(-1))] if n)


def stats_text(engine: Engine) -> str:
    """The counters' sums since they were last reset, in a few lines."""
    if engine.plugin is None:
        return "no counters: the plug-in is off"
    totals = engine.stats()["totals"]
    n_experts = totals["n_experts_cpu"] + totals["n_experts_gpu"]
    if not n_experts:
        return "no expert has run yet"
    parts = [(name, totals[f"{name}_us"]) for name in ("router", "experts", "merge")]
    all_us = sum(us for _, us in parts) or 1.0
    lines = [
        f"steps {totals['n_steps']}, tokens {totals['n_tokens']}, MoE blocks {totals['n_blocks']}"
        f" (delegated {totals['n_blocks_delegated']})",
        f"experts run {n_experts}: CPU {totals['n_experts_cpu'] / n_experts:.0%}, "
        f"GPU {totals['n_experts_gpu'] / n_experts:.0%}",
        "time in " + ", ".join(f"{name} {us / 1000:.1f} ms ({us / all_us:.0%})" for name, us in parts),
        *_hybrid_lines(engine, totals),
    ]
    return "\n".join(lines)


def footer(engine: Engine, answer: Answer) -> str:
    """Speeds of an answer; with accelerators also what experts did since the counters were last reset.

    `[ Prompt 512.3 t/s | Generation 24.1 t/s | experts 71 % hit, 38 % GPU, 0.9 GiB moved ]`
    """
    speeds = answer.timings.footer()
    totals = engine.stats()["totals"] if engine.plugin is not None else {}
    queries = totals.get("n_hits", 0) + totals.get("n_misses", 0)
    if not queries:
        return speeds
    n_experts = totals["n_experts_cpu"] + totals["n_experts_gpu"]
    hit, gpu = 100 * totals["n_hits"] / queries, 100 * totals["n_experts_gpu"] / n_experts
    experts = f"experts {hit:.0f} % hit, {gpu:.0f} % GPU, {size_text(totals['h2d_bytes'])} moved"
    return f"{speeds.removesuffix(' ]')} | {experts} ]"


def pause_text(pause: dict[str, Any]) -> str:
    """One line about what is paused: `sharing is paused: ...; tried again in 3 s`."""
    retry = f"; tried again in {pause['retry_in_s']:.0f} s" if "retry_in_s" in pause else ""
    return f"{pause['what']} is paused: {pause['reason']}{retry}"


def given_up_text(reason: str) -> str:
    """One line about a set-up without caches: `the expert cache was given up: ...`."""
    return f"the expert cache was given up: {reason}"


def _hybrid_lines(engine: Engine, totals: dict[str, Any]) -> list[str]:
    """What accelerators did, and what the guard makes of it; nothing without accelerators."""
    queries = totals["n_hits"] + totals["n_misses"]
    state = engine.expert_state()
    fixed = []
    reproducible = state["reproducible"]
    if reproducible["on"]:
        held = "as placed at the start" if reproducible["holds"] else "NO LONGER: see the messages on stderr"
        fixed = [f"reproducible: {held}"]
    pauses = [given_up_text(state["given_up"])] if state["given_up"] else []
    pauses += [pause_text(pause) for pause in state["paused"]]
    if not queries or not state.get("devices"):
        return pauses + fixed
    lines = [
        f"expert cache {totals['n_hits'] / queries:.0%} hits, {totals['n_late']} late, "
        f"{totals['n_evictions']} evictions, {totals['n_copies']} copies ({totals['n_prefetched']} prefetched), "
        f"{size_text(totals['h2d_bytes'])} moved",
        f"planning {totals['plan_us'] / 1000:.1f} ms, waiting for accelerators {totals['wait_us'] / 1000:.1f} ms",
    ]
    for device in state["devices"]:
        line = f"{device['name']}: {sum(device['n_slots'])} slots ({size_text(device['cache_bytes'])})"
        if "gpu_expert_us" in device:
            line += f", {device['gpu_expert_us']:.0f} us an expert, {device['copy_expert_us']:.0f} us a copy"
        lines.append(line)
    lines += pauses
    if fixed:
        return lines + fixed
    guard = state["guard"]
    lines.append(
        f"CPU {state['cpu_expert_us']:.0f} us an expert; guard {'on' if guard['on'] else 'off'}, level {guard['level']}"
    )
    return lines + [line for _, line in engine.expert_events() if line.startswith(("guard:", "cost model:"))][-5:]
