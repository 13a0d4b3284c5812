#!/usr/bin/env python3
"""Measures the plug-in against plain llama.cpp on the CPU: decode and prefill speed, or peak memory.

Each row is a process of its own (a loaded plug-in changes plain llama.cpp) that loads the model once. Rounds are
interleaved A-B-A: each measures all rows one after the other, never two at once, every second round in reverse order.
A ratio is formed within a round, so that a change of the machine's speed hits both sides. Only forward calls are timed.

Rows: stock (llama.cpp's default, which keeps a repacked copy of the weights), stock-r0 (`--repack 0`), ours (the
plug-in, other weights as in stock), ours-r0 (the plug-in, other weights as in stock-r0), ours-ggml and ours-ggml-r0
(the same with HYBRIMOE_CPU=ggml: experts through ggml's own kernels), ours-avx2 and ours-avx2-r0 (HYBRIMOE_CPU=avx2);
ik and ik-repack (ik_llama.cpp without and with its run-time repacking, in the interpreter that --ik-python names).

For rows of the plug-in, the report also has the time of routers and experts a layer, and the bandwidth at which decode
reads the experts' weights; native/tests/kernels/bench_kernels sets the kernels beside plain reads of memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from hybrimoe.bench.process import WorkerProcess
from hybrimoe.errors import HybrimoeError, UsageError, as_script

ROOT = Path(__file__).resolve().parent.parent
N_PROMPT_BEFORE_DECODE = 32
N_UBATCH = 512


@dataclass(frozen=True)
class Row:
    """One way of running a model. `cpu` is HYBRIMOE_CPU; empty means the plug-in's default. `ik`: by ik_llama.cpp."""

    name: str
    plugin: bool
    repack: bool
    cpu: str = ""
    ik: bool = False


ROWS = {
    row.name: row
    for row in (
        Row("stock", plugin=False, repack=True),
        Row("stock-r0", plugin=False, repack=False),
        Row("ours", plugin=True, repack=True),
        Row("ours-r0", plugin=True, repack=False),
        Row("ours-ggml", plugin=True, repack=True, cpu="ggml"),
        Row("ours-ggml-r0", plugin=True, repack=False, cpu="ggml"),
        Row("ours-avx2", plugin=True, repack=True, cpu="avx2"),
        Row("ours-avx2-r0", plugin=True, repack=False, cpu="avx2"),
        Row("ik", plugin=False, repack=False, ik=True),
        Row("ik-repack", plugin=False, repack=True, ik=True),
    )
}


# --- the child: loads once, then measures what it is asked for --------------------------------------------------------


def child(options: argparse.Namespace) -> None:
    """Answers requests on stdin, one JSON object a line, until it ends."""
    import resource

    row = ROWS[options.child]
    Model, Context, features = ik_engine() if row.ik else llama_cpp_engine()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    n_ctx = max(options.largest + N_UBATCH, 1024)
    with Model(options.model, plugin=row.plugin, repack=row.repack) as model:
        tokens = token_source(model, options.text, n_ctx)
        with Context(model, n_ctx=n_ctx, n_batch=N_UBATCH, n_threads=options.threads) as context:
            measure(context, tokens, {"test": "prefill", "n": N_PROMPT_BEFORE_DECODE})
            measure(context, tokens, {"test": "decode", "n": 4})
            delegated = sum(layer.n_blocks_delegated for layer in context.counters())
            ready = {"ready": True, "n_blocks_delegated": delegated, "n_tokens": len(tokens), "features": features}
            print(json.dumps(ready), file=replies, flush=True)
            for line in sys.stdin:
                request = json.loads(line)
                reply: dict[str, Any]
                if request["test"] == "memory":
                    usage = resource.getrusage(resource.RUSAGE_SELF)
                    reply = {"peak_rss_bytes": usage.ru_maxrss * 1024, **status_bytes()}
                else:
                    reply = {"us": measure(context, tokens, request), **layer_times(context)}
                print(json.dumps(reply), file=replies, flush=True)


def llama_cpp_engine() -> tuple[Any, Any, str]:
    """The classes that load and run a model, and what llama.cpp says it was built for."""
    import llama_cpp
    from llama_forward import Context, Model

    return Model, Context, llama_cpp.llama_print_system_info().decode()


def ik_engine() -> tuple[Any, Any, str]:
    import ik_llama_cpp
    from ik_forward import IkContext, IkModel

    return IkModel, IkContext, f"ik_llama_cpp {ik_llama_cpp.__version__}"


def layer_times(context: Any) -> dict[str, float]:
    """What the plug-in counted in the last test: blocks, and microseconds of a block's router and of its experts."""
    layers = context.counters()
    n_blocks = sum(layer.n_blocks for layer in layers)
    if not n_blocks:
        return {}
    router_us = sum(layer.router_us for layer in layers) / n_blocks
    return {"n_blocks": n_blocks, "router_us": router_us, "experts_us": sum(x.experts_us for x in layers) / n_blocks}


def token_source(model: Any, text: Path | None, n: int) -> list[int]:
    """Tokens to feed: those of a text, repeated to length, or random ones."""
    import numpy as np

    if text is None:
        return [int(t) for t in np.random.default_rng(0).integers(1, model.n_vocab, n)]
    tokens: list[int] = model.tokenize(text.read_text(errors="replace")[: 16 * n])
    if not tokens:
        raise SystemExit(f"{text} has no tokens")
    return (tokens * (n // len(tokens) + 1))[:n]


def measure(context: Any, tokens: Sequence[int], request: Mapping[str, Any]) -> float:
    """Microseconds of the forward calls of one test, waiting for their results included."""
    context.clear()
    n = int(request["n"])
    if request["test"] == "prefill":
        context.reset_counters()
        elapsed = 0.0
        for start in range(0, n, N_UBATCH):
            chunk = tokens[start : min(start + N_UBATCH, n)]
            elapsed += timed_us(context, chunk, start)
        return elapsed
    context.compute(tokens[:N_PROMPT_BEFORE_DECODE], 0, last_only=True)
    context.synchronize()
    context.reset_counters()
    first = N_PROMPT_BEFORE_DECODE
    return sum(timed_us(context, [tokens[first + i]], first + i) for i in range(n))


def timed_us(context: Any, tokens: Sequence[int], position: int) -> float:
    start = time.perf_counter()
    context.compute(tokens, position, last_only=True)
    context.synchronize()
    return (time.perf_counter() - start) * 1e6


def status_bytes() -> dict[str, int]:
    """Resident memory now, by kind; file-backed pages are the mapped model."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("RssAnon", "RssFile"):
            found[{"RssAnon": "anonymous_bytes", "RssFile": "file_bytes"}[key]] = int(value.split()[0]) * 1024
    return found


# --- the parent -------------------------------------------------------------------------------------------------------


class Child(WorkerProcess):
    """A running row."""

    def __init__(self, row: Row, options: argparse.Namespace) -> None:
        self.row = row
        python = str(options.ik_python) if row.ik else sys.executable
        command = [python, str(Path(__file__).resolve()), str(options.model), "--child", row.name]
        command += ["--threads", str(options.threads), "--largest", str(largest_test(options))]
        if options.text:
            command += ["--text", str(options.text)]
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        if row.cpu:
            environment["HYBRIMOE_CPU"] = row.cpu
        super().__init__(row.name, command, environment, give_up_s=3600.0)
        if self.ready["n_blocks_delegated"]:
            print(f"warning: {row.name} delegated blocks instead of dispatching them", file=sys.stderr)


def largest_test(options: argparse.Namespace) -> int:
    return int(max([options.decode + N_PROMPT_BEFORE_DECODE, *options.prefill]))


def busy_cores(seconds: float = 0.5) -> float:
    """Cores that others keep busy, while our own processes wait for a question."""
    import psutil

    return float(psutil.cpu_percent(seconds)) / 100 * (psutil.cpu_count() or 1)


def wait_for_quiet(options: argparse.Namespace) -> dict[str, Any]:
    """Waits until the machine is quiet, at most `--wait` seconds; returns what was seen.

    The load average of the last minute contains our own work, so it is only noted; the decision is made on a sample.
    """
    give_up = time.monotonic() + options.wait
    busy = busy_cores()
    while busy > options.max_busy and time.monotonic() < give_up:
        time.sleep(2)
        busy = busy_cores()
    is_quiet = busy <= options.max_busy
    if not is_quiet:
        print(f"warning: others keep {busy:.1f} cores busy; this round is marked", file=sys.stderr)
    return {"busy_cores": round(busy, 2), "load_average": round(os.getloadavg()[0], 2), "is_quiet": is_quiet}


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds: per test and row the tokens per second of each round."""
    tests = [("decode", options.decode), *(("prefill", n) for n in options.prefill)]
    speeds: dict[str, dict[str, list[float]]] = {f"{t} {n}": {r: [] for r in options.rows} for t, n in tests}
    blocks: dict[str, dict[str, list[dict[str, Any]]]] = {test: {} for test in speeds}
    rounds = []
    children: list[Child] = []
    try:
        for name in options.rows:
            print(f"loading {name}", file=sys.stderr)
            children.append(Child(ROWS[name], options))
        for number in range(options.rounds):
            rounds.append(wait_for_quiet(options))
            for kind, n in tests:
                for one in children if number % 2 == 0 else reversed(children):
                    reply = one.ask(test=kind, n=n)
                    speeds[f"{kind} {n}"][one.row.name].append(n / reply.pop("us") * 1e6)
                    if reply:
                        blocks[f"{kind} {n}"].setdefault(one.row.name, []).append(reply)
            latest = ", ".join(f"{row} {speeds[f'decode {options.decode}'][row][-1]:.1f}" for row in options.rows)
            print(f"round {number + 1}/{options.rounds}: decode t/s {latest}", file=sys.stderr)
    finally:
        for one in children:
            one.close()
    features = {one.row.name: one.ready["features"] for one in children}
    return {"rounds": rounds, "tokens_per_s": speeds, "blocks": blocks, "features": features}


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a short run of each row, one at a time."""
    result = {}
    for name in options.rows:
        one = Child(ROWS[name], options)
        try:
            for n in options.prefill:
                one.ask(test="prefill", n=n)
            one.ask(test="decode", n=options.decode)
            result[name] = one.ask(test="memory")
        finally:
            one.close()
    return {"memory": result}


# --- statistics and output --------------------------------------------------------------------------------------------


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """A confidence interval of the median from order statistics (sign test); no distribution is assumed.

    None when there are too few values for that confidence (fewer than 6 for 95 %).
    """
    n = len(values)
    ordered = sorted(values)
    for rank in range(n // 2, 0, -1):
        # Probability that the median lies outside the rank-th smallest and largest value.
        outside = 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n
        if outside <= 1 - confidence:
            return ordered[rank - 1], ordered[n - rank]
    return None


def summary(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "interval_95": interval(values), "n": len(values)}


def summarise(result: Mapping[str, Any], rows: Sequence[str]) -> dict[str, Any]:
    """Medians of each row, and of the ratios of each of our rows to each of llama.cpp's within a round."""
    tests = {}
    for test, by_row in result["tokens_per_s"].items():
        ratios = {
            f"{ours}/{stock}": summary([a / b for a, b in zip(by_row[ours], by_row[stock], strict=True)])
            for ours in rows
            for stock in rows
            if ROWS[ours].plugin and not ROWS[stock].plugin
        }
        tests[test] = {"tokens_per_s": {row: summary(by_row[row]) for row in rows}, "ratios": ratios}
    return tests


def shown(value: Mapping[str, Any], digits: int) -> str:
    """'12.3 (12.1-12.6)': the median and its interval."""
    text = f"{value['median']:.{digits}f}"
    if value["interval_95"] is None:
        return text
    low, high = value["interval_95"]
    return f"{text} ({low:.{digits}f}-{high:.{digits}f})"


def speed_table(report: Mapping[str, Any], rows: Sequence[str]) -> list[str]:
    lines = [f"{'test':<14}{'row':<16}{'t/s (95 % interval)':<28}ratio to llama.cpp within a round"]
    for test, values in report["summary"].items():
        for row in rows:
            ratios = [
                f"{name.partition('/')[2]} {shown(value, 3)}"
                for name, value in values["ratios"].items()
                if name.startswith(row + "/")
            ]
            lines.append(f"{test:<14}{row:<16}{shown(values['tokens_per_s'][row], 1):<28}{', '.join(ratios)}".rstrip())
    n_loaded = sum(not one["is_quiet"] for one in report["rounds"])
    if n_loaded:
        lines.append(f"{n_loaded} of {len(report['rounds'])} rounds ran while others used the machine")
    return lines


def block_lines(report: Mapping[str, Any]) -> list[str]:
    """Router and experts of a layer, as the plug-in counted them; in decode also the experts' bytes per second."""
    lines = []
    for test, by_row in report["blocks"].items():
        for row, replies in by_row.items():
            router_us = statistics.median(reply["router_us"] for reply in replies)
            experts_us = statistics.median(reply["experts_us"] for reply in replies)
            line = f"{test:<14}{row:<16}a layer: router {router_us:.1f} us, experts {experts_us:.1f} us"
            if test.startswith("decode"):
                n_bytes = report["provenance"]["model"]["active_expert_bytes_per_layer"]
                line += f" for {n_bytes / 1e6:.2f} MB: {n_bytes / experts_us / 1e3:.1f} GB/s"
            lines.append(line)
    return lines


def memory_table(report: Mapping[str, Any]) -> list[str]:
    memory = report["memory"]
    lines = [f"{'row':<16}{'peak MiB':>10}{'anonymous':>12}{'mapped file':>14}   excess of the peak over"]
    for name, values in memory.items():
        excess = [
            f"{other} {(values['peak_rss_bytes'] - memory[other]['peak_rss_bytes']) / 2**20:+.1f} MiB"
            for other in memory
            if ROWS[name].plugin and not ROWS[other].plugin
        ]
        parts = [values.get(key, 0) / 2**20 for key in ("peak_rss_bytes", "anonymous_bytes", "file_bytes")]
        lines.append(f"{name:<16}{parts[0]:>10.1f}{parts[1]:>12.1f}{parts[2]:>14.1f}   {', '.join(excess)}".rstrip())
    return lines


def markdown(report: Mapping[str, Any], rows: Sequence[str]) -> list[str]:
    """Rows of the tables in docs/benchmarks.md."""
    origin = report["provenance"]
    model = f"{origin['model']['description']}"
    where = f"{origin['machine']['cpu']}, {origin['threads']} threads | {origin['commit']}"
    lines = []
    if "memory" in report:
        memory = report["memory"]
        for name in memory:
            for other in memory:
                if ROWS[name].plugin and not ROWS[other].plugin:
                    ours, stock = (memory[row]["peak_rss_bytes"] / 2**20 for row in (name, other))
                    excess = f"{ours:.1f} | {other} {stock:.1f} | {ours - stock:+.1f}"
                    lines.append(f"| {model} | {name} {excess} | {where} |")
        return lines
    for test, values in report["summary"].items():
        for row in (row for row in rows if ROWS[row].plugin):
            ratios = [shown(values["ratios"][f"{row}/{stock}"], 2) for stock in rows if not ROWS[stock].plugin]
            speed = shown(values["tokens_per_s"][row], 1)
            lines.append(f"| {model} | {test} | {row} | {speed} | {' | '.join(ratios)} | {where} |")
    return lines


def provenance(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Everything needed to repeat the measurement, and to judge it."""
    import llama_cpp

    from hybrimoe.machine import host

    cpu = host.cpu()
    layer = model.moe_layers[0]
    widths = {t.name.rpartition("blk.")[2].partition(".")[2]: f"{t.type_name} {t.shape}" for t in layer.expert_tensors}
    described = f"{options.model.stem}: {model.n_layers} layers, {model.n_experts} experts, top-{model.n_experts_used}"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "tools/bench_cpu.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "llama_cpp_python": llama_cpp.__version__,
        "plugin": os.environ.get("HYBRIMOE_PLUGIN", "installed"),
        "threads": options.threads,
        "tokens": f"text {options.text.name}" if options.text else "random",
        "machine": {
            "cpu": cpu.name,
            "n_cores": cpu.n_cores,
            "n_threads": cpu.n_threads,
            "instructions": [flag for flag in cpu.instructions if flag.startswith(NOTABLE_FLAGS)],
            "memory_bytes": host.memory().total_bytes,
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
        },
        "model": {
            "description": described,
            "experts": widths,
            "active_expert_bytes_per_layer": statistics.mean(
                x.bytes_per_expert * x.n_experts_used for x in model.moe_layers
            ),
            **{k: model.to_dict()[k] for k in MODEL_KEYS},
        },
    }


NOTABLE_FLAGS = ("avx", "amx", "fma", "f16c", "bmi2", "asimd", "sve", "i8mm")
MODEL_KEYS = ("architecture", "file_type", "n_layers", "n_embd", "n_experts", "n_experts_used", "file_bytes")


def git_commit() -> str:
    """The commit of this checkout, with a plus sign when tracked files differ from it."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    commit = git("rev-parse", "--short=10", "HEAD") or "unknown"
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".json", delete=False) as file:
            json.dump(report, file, indent=1)
            file.write("\n")
        Path(file.name).replace(path)
    except OSError as error:
        raise HybrimoeError(f"cannot write {path}: {error.strerror or error}", "choose another --json FILE") from error


def sizes(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers such as 256,512") from None
    if any(not 1 <= value <= 65536 for value in values):
        raise argparse.ArgumentTypeError("prompt lengths are 1 to 65536")
    return values


def row_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ROWS:
            raise argparse.ArgumentTypeError(f"unknown row '{name}', known: {', '.join(ROWS)}")
    return list(dict.fromkeys(names))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file; tools/make_bench_model.py writes realistic ones")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="pairs to measure (default: %(default)s)")
    parser.add_argument("--rows", type=row_names, default=None, metavar="A,B", help="default: stock,stock-r0,ours")
    parser.add_argument("--threads", "-t", type=int, metavar="N", help="default: one per physical core")
    parser.add_argument("--decode", type=int, default=64, metavar="N", help="tokens to decode (default: %(default)s)")
    parser.add_argument("--prefill", type=sizes, default=[256, 512], metavar="N,N", help="default: 256,512")
    parser.add_argument("--text", type=Path, metavar="FILE", help="feed this text instead of random tokens")
    parser.add_argument("--max-busy", type=float, default=0.2, metavar="CORES", help="others may use this much")
    parser.add_argument(
        "--wait", type=float, default=120, metavar="S", help="seconds to wait for that before each round"
    )
    parser.add_argument("--peak-memory", action="store_true", help="measure peak memory instead of speed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--markdown", action="store_true", help="print rows for docs/benchmarks.md instead of a table")
    parser.add_argument(
        "--ik-python",
        type=Path,
        metavar="FILE",
        help="a Python that has ik-llama-cpp-python",
    )
    parser.add_argument("--child", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--largest", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if min(options.rounds, options.decode) < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--rounds, --decode and --threads must be at least 1")
    if options.rows is None:
        names = "stock,stock-r0,ours,ours-r0" if options.peak_memory else "stock,stock-r0,ours"
        options.rows = row_names(names)
    if any(ROWS[name].ik for name in options.rows) and not options.ik_python:
        parser.error("rows of ik_llama.cpp need --ik-python FILE")
    return options


def run(options: argparse.Namespace) -> None:
    from hybrimoe.gguf_model import inspect
    from hybrimoe.machine import host

    model = inspect(options.model).require_moe()
    if options.text and not options.text.is_file():
        raise UsageError(f"--text {options.text} is no file", "give a text file, or leave it out for random tokens")
    if options.json and not os.access(options.json.parent, os.W_OK):
        raise HybrimoeError(f"cannot write into {options.json.parent}", "choose another --json FILE")
    options.threads = options.threads or host.n_physical_cores()
    report: dict[str, Any] = {"provenance": provenance(options, model)}
    if options.peak_memory:
        report |= measure_memory(options)
    else:
        report |= measure_speed(options)
        report["summary"] = summarise(report, options.rows)
    if options.json:
        write_json(options.json, report)
    if options.markdown:
        print("\n".join(markdown(report, options.rows)))
        return
    origin = report["provenance"]
    print(f"{origin['model']['description']}, {origin['model']['file_bytes'] / 1e6:.0f} MB, tokens: {origin['tokens']}")
    print(f"{origin['machine']['cpu']}, {options.threads} threads, {' '.join(origin['machine']['instructions'])}")
    print(f"llama-cpp-python {origin['llama_cpp_python']}, commit {origin['commit']}, {origin['date']}")
    print(origin["command"])
    print()
    if options.peak_memory:
        print("\n".join(memory_table(report)))
    else:
        print("\n".join([*speed_table(report, options.rows), *block_lines(report)]))


@as_script
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.child:
        child(options)
    else:
        run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
