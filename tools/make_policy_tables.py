"""Writes docs/policies.md: every policy as the library describes it, and what each reaches.

    python tools/make_policy_tables.py           rewrite the page (needs HYBRIMOE_TRACES for the hit rates)
    python tools/make_policy_tables.py --check   exit 1 if the page is out of date

Without HYBRIMOE_TRACES the hit-rate tables of the present page are kept as they are, so the check still covers the
descriptions and the scheduler table.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from hybrimoe.errors import as_script
from hybrimoe.native.core import CPU, CoreError, Costs, Curve, Kind, PolicyInfo, Scheduler, WorkItem, policies
from hybrimoe.native.core_replay import Trace, replay_cache

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "policies.md"
TRACES = ("deepseek-v2-lite", "qwen3-30b-a3b", "gemma4-26b-a4b", "gpt-oss-120b")
N_LAYERS_DRAWN = 2500
REGIMES = ("decode, load 1", "loads 1..20", "heavy-tailed loads")
HIT_RATES = "## Hit rates on routing traces of real models"
TITLES = {
    Kind.SCHEDULER: "Schedulers (`--schedule`)",
    Kind.EVICTION: "Eviction (`--cache-policy`)",
    Kind.ADMISSION: "Admission",
    Kind.PREFETCH: "Prefetch (`--prefetch`)",
    Kind.ALLOCATION: "Slot allocation",
}


def paragraph(text: str) -> list[str]:
    """Lines of a paragraph of the page."""
    return textwrap.wrap(" ".join(text.split()), 118)


def describe(kind: Kind) -> Iterator[str]:
    """One section: a table of the policies of a kind, and their parameters."""
    yield f"### {TITLES[kind]}"
    yield ""
    yield "| name | what it does | source | parameters |"
    yield "|---|---|---|---|"
    for p in policies(kind):
        notes = [text for flag, text in ((p.needs_scores, "needs router scores"), (p.oracle, "offline")) if flag]
        doc = p.doc + (f" ({', '.join(notes)})" if notes else "")
        params = "; ".join(f"`{q.name}` = {q.default:g} ({q.min:g}..{q.max:g}): {q.doc}" for q in p.params)
        yield f"| `{p.name}` | {doc} | {p.source} | {params} |"
    yield ""


def draw_layer(regime: int, rng: random.Random) -> tuple[Costs, list[WorkItem]]:
    """A random layer as algorithms.md 1.1 draws it."""
    decode = regime == 0
    cpu_us = rng.uniform(0.3, 6.0) if decode else rng.uniform(0.02, 1.0)
    copy_us = rng.uniform(0.3, 6.0) if decode else rng.uniform(0.3, 8.0)
    costs = Costs.simple(
        1, expert_bytes=1.0, cpu_us=cpu_us, gpu_us=1.0, copy_us=copy_us, cpu_first_us=rng.choice((0.0, 0.5 * cpu_us))
    )
    costs.set_gpu(0, Curve(1.0, 0.002))
    p_cached = rng.choice((0.3, 0.5, 0.7, 0.85))
    items = []
    for expert in range(rng.randint(3, 9)):
        load = 1 if decode else rng.randint(1, 20) if regime == 1 else min(400, int(rng.paretovariate(0.8)))
        items.append(WorkItem(expert, load, 0 if rng.random() < p_cached else CPU))
    return costs, items


def scheduler_table() -> Iterator[str]:
    """Excess over the optimum per scheduler and load regime."""
    names = [p.name for p in policies(Kind.SCHEDULER) if p.name != "exhaustive"]
    schedulers = {name: Scheduler(name) for name in names}
    exact = Scheduler("exhaustive")
    yield "## Schedulers against exact search"
    yield ""
    yield from paragraph(
        f"""Excess of the planned time over the optimum, {N_LAYERS_DRAWN} random layers per regime (3..9 experts,
        each cached with p from .3, .5, .7, .85; GPU 1.0 + 0.002 x load; decode: CPU per token and copy uniform
        in 0.3..6; else CPU per token 0.02..1, copy 0.3..8; heavy tails: Pareto 0.8, at most 400; first CPU
        expert extra 0 or half a token). Simulated, under the planner's own cost model. `static` with its
        default runs all layers on the CPU."""
    )
    yield ""
    yield "| scheduler | " + " | ".join(f"{r}: mean / p99 / max" for r in REGIMES) + " |"
    yield "|---|" + "---|" * len(REGIMES)
    cells: dict[str, list[str]] = {name: [] for name in names}
    for regime in range(len(REGIMES)):
        rng = random.Random(regime)
        excess: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(N_LAYERS_DRAWN):
            costs, items = draw_layer(regime, rng)
            best = exact.plan(costs, items).makespan_us
            for name, scheduler in schedulers.items():
                excess[name].append(100 * (scheduler.plan(costs, items).makespan_us / best - 1))
        for name, values in excess.items():
            values.sort()
            mean, p99 = sum(values) / len(values), values[len(values) * 99 // 100]
            cells[name].append(f"{mean:.2f} / {p99:.1f} / {values[-1]:.1f} %")
    for name in names:
        yield f"| `{name}` | " + " | ".join(cells[name]) + " |"
    yield ""


def read_trace(path: Path) -> Trace:
    """A trace in the layout of the shared traces' README."""
    import numpy as np

    with np.load(path) as z:
        weights = z["weights"] if "weights" in z.files else None
        return Trace(z["experts"], int(z["n_expert"]), weights=weights, prompt_offsets=z["prompt_offsets"])


def rates(trace: Trace, policy: str, cold: bool) -> str:
    """Hit rates in percent at 25, 50 and 75 % of the experts."""
    try:
        found = [replay_cache(trace, policy, trace.n_expert * share // 4, cold=cold).hit_rate for share in (1, 2, 3)]
    except CoreError:
        return "no scores"
    return " / ".join(f"{100 * rate:.1f}" for rate in found)


def eviction_rows() -> list[PolicyInfo]:
    """Eviction policies, the oracles last."""
    found = policies(Kind.EVICTION)
    return [p for p in found if not p.oracle] + [p for p in found if p.oracle]


def hit_tables(folder: Path) -> Iterator[str]:
    """Hit rates of every eviction policy on all traces, beside Belady."""
    traces = {name: read_trace(folder / f"{name}.npz") for name in TRACES}
    traces["deepseek-v2-lite"] = traces["deepseek-v2-lite"].head(40)
    columns = [("deepseek-v2-lite", False), ("deepseek-v2-lite", True), *((name, False) for name in TRACES[1:])]
    yield HIT_RATES
    yield ""
    yield from paragraph(
        """Per cent of queries that hit, at 25 / 50 / 75 % of the experts cached; every policy with its default
        parameters, event-atomic replay, one cache per layer, every miss admitted. kept: one state over all
        prompts; cold: every prompt from a cold cache and fresh statistics (the other three traces hold one
        prompt). DeepSeek: the first 40 prompts of a teacher-forced trace of prompt text, so its replay as
        decode is an approximation, and the trace has no scores for `mrs`. On the others `mrs` sees the weights
        of the chosen experts only, not the 2 x top-k largest scores that it is meant for. A figure without its
        mode says nothing: `lfu` leads `lru` only while its statistics are fresh."""
    )
    yield ""
    yield "| policy | " + " | ".join(f"{name}, {'cold' if cold else 'kept'}" for name, cold in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for policy in eviction_rows():
        row = [rates(traces[name], policy.name, cold) for name, cold in columns]
        yield f"| `{policy.name}` | " + " | ".join(row) + " |"
    yield ""
    yield from paragraph(
        """`static` keeps the experts 0.. that it starts with. `belady` admits every miss; `belady-bypass` may
        refuse one, which no policy here but `static` does; `eam` is meant for one pool over all layers and here
        runs per layer."""
    )
    yield ""


EXAMPLE = """\
```python
from hybrimoe.native.core import Costs, Kind, Scheduler, WorkItem, allocate_slots, policies
from hybrimoe.native.core_replay import Trace, replay_cache
from hybrimoe.native.core_runtime import Runtime

costs = Costs.simple(2, expert_bytes=3e6, cpu_us=90.0, gpu_us=12.0, copy_us=120.0)
trace = Trace([[[0, 1], [2, 3]], [[0, 5], [2, 6]], [[0, 1], [3, 6]]], 8, weights=[[[0.6, 0.4]] * 2] * 3)
made = {s.name: Scheduler(s.name).plan(costs, [WorkItem(0), WorkItem(1, device=0)]) for s in policies(Kind.SCHEDULER)}
hits = {e.name: replay_cache(trace, e.name, 4).n_hits for e in policies(Kind.EVICTION)}
admitted = [replay_cache(trace, "lru", 4, admission=a.name, costs=costs) for a in policies(Kind.ADMISSION)]
slots = {a.name: allocate_slots(a.name, 2, 8, 8, [3.0, 1.0]) for a in policies(Kind.ALLOCATION)}
runs = [Runtime(costs, 8, 2, 4, prefetch=p.name).simulate(trace).total_us for p in policies(Kind.PREFETCH)]
```
"""


def page(folder: Path | None) -> str:
    """The whole page."""
    lines = [
        "# Policies",
        "",
        *paragraph(
            """Written by `tools/make_policy_tables.py`; do not edit. The names, defaults and ranges come from the
            library itself. A parameter is given after a colon: `--cache-policy ema:alpha=0.05`. How to add one:
            [adding-a-policy.md](adding-a-policy.md)."""
        ),
        "",
        "## Every policy from Python",
        "",
        EXAMPLE,
        "## What there is",
        "",
    ]
    for kind in Kind:
        lines += describe(kind)
    lines += scheduler_table()
    if folder is not None:
        lines += hit_tables(folder)
    elif PAGE.is_file():
        kept = PAGE.read_text(encoding="utf-8")
        lines += [HIT_RATES + kept.partition(HIT_RATES)[2].rstrip("\n"), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


@as_script
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    options = parser.parse_args()
    given = os.environ.get("HYBRIMOE_TRACES")
    if not given and not options.check and not PAGE.is_file():
        sys.exit("error: HYBRIMOE_TRACES is not set\nhint: point it at the folder with the traces of real models")
    text = page(Path(given) if given else None)
    if options.check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit("error: docs/policies.md is out of date\nhint: python tools/make_policy_tables.py")
        return
    PAGE.parent.mkdir(exist_ok=True)
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(PAGE)


if __name__ == "__main__":
    sys.exit(main())
