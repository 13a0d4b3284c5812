"""Figures of `tools/bench_gpu.py`: what counters mean, ratios within rounds, tables and Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench_cpu import shown, summary
from gpu_bench_plan import GOALS, least_step_us

Counters = Mapping[str, float]


def share(part: float | None, whole: float) -> float | None:
    return None if part is None or whole <= 0 else part / whole


def rate_us(counters: Counters, time: str, count: float) -> float:
    """Microseconds each; infinite where nothing of the kind was done or its time is not known."""
    return counters[time] / count if count > 0 and counters.get(time) else math.inf


def figures(reply: Mapping[str, Any], expert_bytes: float, host_bytes_per_s: float | None) -> dict[str, float | None]:
    """What one measured test of one of our rows says beyond its speed; None: this plug-in does not count it.

    `limit_share`: the least time that CPU, GPU and link would need for this step's experts at the cost per expert that
    each showed (see `least_step_us`), over the time that the blocks took. `host_share`: bytes of experts that the CPU
    read and the link carried, over what the host's memory could have delivered in the whole time.
    """
    counters: Counters = reply.get("counters", {})
    us = float(reply["us"])
    lookups = counters.get("n_hits", 0) + counters.get("n_misses", 0)
    n_steps = counters.get("n_steps", 0)
    n_cpu, n_gpu = counters.get("n_experts_cpu", 0), counters.get("n_experts_gpu", 0)
    moved = counters.get("h2d_bytes")
    cpu_time = "cpu_us" if "cpu_us" in counters else "experts_us"
    blocks_us = sum(counters.get(name, 0.0) for name in ("router_us", "experts_us", "merge_us", "plan_us", "wait_us"))
    limit = None
    if n_steps and n_cpu + n_gpu and blocks_us:
        limit_us = least_step_us(
            (n_cpu + n_gpu) / n_steps,
            counters.get("n_hits", 0) / n_steps,
            rate_us(counters, cpu_time, n_cpu),
            rate_us(counters, "gpu_us", n_gpu),
            rate_us(counters, "copy_us", (moved or 0) / expert_bytes if expert_bytes else 0),
        )
        limit = limit_us * n_steps / blocks_us if math.isfinite(limit_us) else None
    host = None
    if host_bytes_per_s and moved is not None:
        host = (n_cpu * expert_bytes + moved) / (us * 1e-6) / host_bytes_per_s
    return {
        "hit_rate": counters.get("n_hits", 0) / lookups if lookups else None,
        "cpu_busy": share(counters.get(cpu_time), us),
        "gpu_busy": share(counters.get("gpu_us"), us),
        "link_busy": share(counters.get("copy_us"), us),
        "h2d_bytes_per_s": None if moved is None else moved / (us * 1e-6),
        "limit_share": limit,
        "host_share": host,
    }


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
                each = [figures(reply, expert_bytes, host_bytes_per_s) for reply in replies]
                entry["figures"] = {key: typical([f[key] for f in each]) for key in each[0]}
                guards = [reply["guard"] for reply in replies if reply.get("guard")]
                if guards:
                    entry["guard"] = guards[-1]
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


def cells(name: str, entry: Mapping[str, Any], used: int | None) -> list[str]:
    of = entry.get("figures", {})
    to_stock = entry["to_best_stock"]
    return [
        name,
        shown(entry["tokens_per_s"], 1),
        "-" if to_stock is None else shown(to_stock, 2),
        *(percent(of.get(key)) for _, key in FIGURES),
        "-" if not used else f"{used / 2**20:.0f}",
    ]


HEADS = ["row", "t/s", "to best stock", *(head for head, _ in FIGURES), "GPU MiB"]


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
    loaded = sum(not one["quiet"]["is_quiet"] for one in stage["rounds"])
    if loaded:
        lines.append(f"{loaded} of {len(stage['rounds'])} rounds ran while others used the machine")
    return lines


def goal_lines(test: str, stage: Mapping[str, Any], of_test: Mapping[str, Any]) -> list[str]:
    ours = of_test["rows"].get("ours")
    if ours is None or ours["to_best_stock"] is None:
        return []
    goal, reached = goal_of(test, stage["is_worst_case"]), ours["to_best_stock"]["median"]
    lines = [f"goal {goal:.2f}: {'reached' if reached >= goal else 'missed'} ({reached:.2f})"]
    estimate = (ours.get("guard") or {}).get("stock_us")
    best = of_test["best_stock"]
    if estimate and best:
        measured = float(test.split()[1]) / of_test["rows"][best]["tokens_per_s"]["median"] * 1e6
        lines.append(f"stock by the guard's estimate {estimate:.0f} us, measured {measured:.0f} us")
    return lines
