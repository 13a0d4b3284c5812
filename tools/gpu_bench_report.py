"""Figures of `tools/bench_gpu.py`: what counters mean, ratios within rounds, tables and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench_cpu import shown, summary
from gpu_bench_plan import GOALS, least_step_us

Counters = Mapping[str, float]
MAX_EVENTS = 5


def share(part: float | None, whole: float) -> float | None:
    return None if part is None or whole <= 0 else part / whole


def blocks_us(counters: Counters) -> float:
    """Time in MoE blocks; planning and waiting lie within."""
    return sum(counters.get(name, 0.0) for name in ("router_us", "experts_us", "merge_us"))


def limit_us(counters: Counters, state: Mapping[str, Any]) -> float | None:
    """The least time that CPU, GPU and link need for a decode step's experts in one layer, at the plug-in's own costs.

    Costs are those of one expert for one token on the first device; None before they are known.
    """
    device: Mapping[str, float] = next(iter(state.get("devices", [])), {})
    costs = (state.get("cpu_expert_us"), device.get("gpu_expert_us"), device.get("copy_expert_us"))
    n_steps = counters.get("n_steps", 0)
    n_experts = counters.get("n_experts_cpu", 0) + counters.get("n_experts_gpu", 0)
    if not n_steps or not n_experts or any(cost is None for cost in costs):
        return None
    cpu_us, gpu_us, copy_us = (float(cost) for cost in costs if cost is not None)
    return least_step_us(n_experts / n_steps, counters.get("n_hits", 0) / n_steps, cpu_us, gpu_us, copy_us)


def figures(
    reply: Mapping[str, Any], expert_bytes: float, host_bytes_per_s: float | None, *, is_decode: bool
) -> dict[str, float | None]:
    """What one measured test of one of our rows says beyond its speed; None: not known.

    `gpu_busy` is from the cost per expert that the plug-in goes by, since ggml's interface tells no device times.
    `limit_share`: `limit_us` over the time that blocks took, in decode. `host_share`: bytes of experts that the CPU
    read and the link carried, over what the host's memory could have delivered in the whole time.
    """
    counters: Counters = reply.get("counters", {})
    state: Mapping[str, Any] = reply.get("state", {})
    us = float(reply["us"])
    lookups = counters.get("n_hits", 0) + counters.get("n_misses", 0)
    n_steps, n_cpu = counters.get("n_steps", 0), counters.get("n_experts_cpu", 0)
    moved = counters.get("h2d_bytes")
    device: Mapping[str, float] = next(iter(state.get("devices", [])), {})
    gpu = None
    if is_decode and device.get("gpu_expert_us") is not None:
        gpu = counters.get("n_experts_gpu", 0) * device["gpu_expert_us"] + n_steps * device.get("step_us", 0.0)
    waiting = counters.get("plan_us", 0.0) + counters.get("wait_us", 0.0)
    limit = limit_us(counters, state) if is_decode else None
    host = None
    if host_bytes_per_s and moved is not None:
        host = (n_cpu * expert_bytes + moved) / (us * 1e-6) / host_bytes_per_s
    return {
        "hit_rate": counters.get("n_hits", 0) / lookups if lookups else None,
        "cpu_busy": share(counters["experts_us"] - waiting if "experts_us" in counters else None, us),
        "gpu_busy": share(gpu, us),
        "link_busy": share(reply.get("copy_busy_us"), us),
        "h2d_bytes_per_s": None if moved is None else moved / (us * 1e-6),
        "limit_share": limit * n_steps / blocks_us(counters) if limit is not None and blocks_us(counters) else None,
        "host_share": host,
        "plan_us": counters["plan_us"] / n_steps if n_steps and "plan_us" in counters else None,
    }


def stock_estimate_us(reply: Mapping[str, Any], n_tokens: float) -> float | None:
    """Plain llama.cpp's time per decoded token by the guard's floor: its estimate of the experts, and our own rest."""
    floor = reply.get("state", {}).get("guard", {}).get("floor_us")
    if floor is None or not reply.get("counters"):
        return None
    return float(floor) + (float(reply["us"]) - blocks_us(reply["counters"])) / n_tokens


def speeds(stage: Mapping[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    """Tokens per second by test, row and round; None where a row failed in that round."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for number, one in enumerate(stage["rounds"]):
        for row, tests in one["rows"].items():
            for test, reply in tests.items():
                values = found.setdefault(test, {}).setdefault(row, [None] * len(stage["rounds"]))
                values[number] = float(test.split()[1]) / reply["us"] * 1e6
    return found


def ratio(ours: Sequence[float | None], other: Sequence[float | None]) -> dict[str, Any] | None:
    """Summary of the ratios within rounds; None without a common round."""
    pairs = [a / b for a, b in zip(ours, other, strict=True) if a is not None and b is not None]
    return summary(pairs) if pairs else None


def median(values: Sequence[float | None]) -> float:
    return statistics.median([value for value in values if value is not None])


def summarise_stage(
    stage: Mapping[str, Any], expert_bytes: float, host_bytes_per_s: float | None
) -> dict[str, dict[str, Any]]:
    """By test: the best stock row, and of every row its speed, its ratio to that row, and its figures."""
    kinds = {name: row["kind"] for name, row in stage["rows"].items()}
    result: dict[str, dict[str, Any]] = {}
    for test, by_row in speeds(stage).items():
        stock = {name: median(values) for name, values in by_row.items() if kinds[name] == "stock"}
        best = max(stock, key=lambda name: stock[name]) if stock else None
        rows: dict[str, Any] = {}
        for name, values in by_row.items():
            entry: dict[str, Any] = {
                "tokens_per_s": summary([value for value in values if value is not None]),
                "to_best_stock": None if best is None or name == best else ratio(values, by_row[best]),
            }
            if kinds[name] == "ours":
                replies = [one["rows"][name][test] for one in stage["rounds"] if test in one["rows"].get(name, {})]
                decode = test.startswith("decode")
                each = [figures(reply, expert_bytes, host_bytes_per_s, is_decode=decode) for reply in replies]
                entry["figures"] = {key: typical([f[key] for f in each]) for key in each[0]}
                entry["guard_levels"] = [r.get("state", {}).get("guard", {}).get("level", "") for r in replies]
                if decode:
                    n_tokens = float(test.split()[1])
                    entry["stock_estimate_us"] = typical([stock_estimate_us(r, n_tokens) for r in replies])
            rows[name] = entry
        result[test] = {"best_stock": best, "rows": rows}
    return result


def typical(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def goal_of(test: str, is_worst_case: bool) -> float:
    return GOALS[(test.split()[0], "worst" if is_worst_case else "normal")]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


FIGURES = (
    ("hits", "hit_rate"),
    ("CPU", "cpu_busy"),
    ("GPU", "gpu_busy"),
    ("link", "link_busy"),
    ("limit", "limit_share"),
    ("DRAM", "host_share"),
)


LEGEND = (
    "t/s: median of the rounds, with its 95 % interval; ratios are formed within a round.",
    "CPU, GPU, link: share of the time that each computed or copied experts (GPU: by its cost per expert).",
    "limit: least time for the experts at each device's cost per expert, over the time they took (decode).",
    "DRAM: bytes of experts read or copied, over what this machine's memory could have delivered.",
    "plan us: planning and launching, per layer and step.",
)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def cells(name: str, entry: Mapping[str, Any], used: int | None) -> list[str]:
    of = entry.get("figures", {})
    to_stock = entry["to_best_stock"]
    return [
        name,
        shown(entry["tokens_per_s"], 1),
        "-" if to_stock is None else shown(to_stock, 2),
        *(percent(of.get(key)) for _, key in FIGURES),
        number(of.get("plan_us")),
        "-" if not used else f"{used / 2**20:.0f}",
    ]


HEADS = ["row", "t/s", "to best stock", *(head for head, _ in FIGURES), "plan us", "GPU MiB"]


def stage_rows(stage: Mapping[str, Any], test: str, of_test: Mapping[str, Any]) -> list[list[str]]:
    facts = stage.get("facts", {})
    return [
        cells(
            name + (" (best stock)" if name == of_test["best_stock"] else ""),
            entry,
            facts.get(name, {}).get("device_bytes_used"),
        )
        for name, entry in of_test["rows"].items()
    ]


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [heads, *rows]
    ]


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(["---"] + ["---:"] * (len(heads) - 1)) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def tables(report: Mapping[str, Any], *, markdown: bool) -> list[str]:
    """All measured stages, one table for each test, with the goals where our row has one."""
    lines: list[str] = []
    make = markdown_table if markdown else text_table
    for key, stage in report["stages"].items():
        if not stage["rounds"]:
            continue
        heading = f"{key}: {len(stage['rounds'])} rounds" + ("" if stage["done"] else ", not finished")
        lines += [f"### {heading}" if markdown else heading, *notes(stage), ""]
        for test, of_test in stage["summary"].items():
            lines += [f"{test}:", ""] if markdown else [f"{test}:"]
            lines += make(HEADS, stage_rows(stage, test, of_test))
            lines += [*goal_lines(test, stage, of_test), ""]
    return lines


def notes(stage: Mapping[str, Any]) -> list[str]:
    lines = [f"{stage['routing']}"] if stage.get("routing") else []
    lines += [f"{name}: {message}" for name, message in stage.get("failures", {}).items()]
    lines += [f"ours: {event}" for event in guard_events(stage)[:MAX_EVENTS]]
    more = surplus_bytes(stage)
    if more > 0:
        lines.append(f"ours took {more / 2**20:.0f} MiB more GPU memory than the largest stock row")
    loaded = sum(not one["quiet"]["is_quiet"] for one in stage["rounds"])
    if loaded:
        lines.append(f"{loaded} of {len(stage['rounds'])} rounds ran while others used the machine")
    return lines


def guard_events(stage: Mapping[str, Any]) -> list[str]:
    """What the guard of our default row logged while it was measured, in order."""
    replies = [reply for one in stage["rounds"] for reply in one["rows"].get("ours", {}).values()]
    return [event for reply in replies for event in reply.get("events", []) if event.startswith("guard")]


def surplus_bytes(stage: Mapping[str, Any]) -> int:
    """GPU memory that our default row took beyond the stock row that took most; 0 where the driver does not tell."""
    used = {name: fact.get("device_bytes_used", 0) for name, fact in stage.get("facts", {}).items()}
    stock = max((used.get(name, 0) for name, row in stage["rows"].items() if row["kind"] == "stock"), default=0)
    return int(used.get("ours", 0) - stock) if used.get("ours", 0) > 0 and stock > 0 else 0


def goal_lines(test: str, stage: Mapping[str, Any], of_test: Mapping[str, Any]) -> list[str]:
    ours = of_test["rows"].get("ours")
    if ours is None or ours["to_best_stock"] is None:
        return []
    goal, reached = goal_of(test, stage["is_worst_case"]), ours["to_best_stock"]["median"]
    lines = [f"goal {goal:.2f}: {'reached' if reached >= goal else 'missed'} ({reached:.2f})"]
    estimate, best = ours.get("stock_estimate_us"), of_test["best_stock"]
    if estimate and best:
        measured = 1e6 / of_test["rows"][best]["tokens_per_s"]["median"]
        lines.append(f"best stock by the guard's estimate {estimate:.0f} us a token, measured {measured:.0f} us")
    levels = [level for level in ours.get("guard_levels", []) if level]
    if levels:
        lines.append(f"guard at the end of each round: {', '.join(levels)}")
    return lines
