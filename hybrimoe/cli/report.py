"""Tables about experts: what the counters say, and where each layer's experts are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrimoe.cli.console import size_text

if TYPE_CHECKING:
    from hybrimoe.engine import Engine
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
                "CPU",
                runs_in,
            ]
        )
    return table(["layer", "experts", "top-k", "type", "per expert", "all", "on", "run by"], rows)


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
    ]
    return "\n".join(lines)
