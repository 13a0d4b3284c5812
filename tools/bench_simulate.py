"""Measures how fast the simulator replays a routing trace, in token-layers per second and core.

    python tools/bench_simulate.py deepseek-v2-lite.npz [--prompts 40] [--rounds 5]

One thread, median of the rounds; loading the trace is not part of it. Token-layers: tokens times MoE layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from hybrimoe.machine.describe import describe
from hybrimoe.native.core_replay import replay_cache
from hybrimoe.native.core_runtime import Runtime, TransferKind
from hybrimoe.simulate.replay import make_lookahead
from hybrimoe.trace.convert import write_imported
from hybrimoe.trace.format import TraceFile, read
from hybrimoe.trace.importers import ImportOptions, import_files

MACHINE = "rtx3090-pcie4-ddr4"
# algorithms.md sec. 4: one expert of DeepSeek-V2-Lite at 4 bits.
EXPERT_BYTES = 4_900_000


def open_trace(path: Path, n_prompts: int) -> TraceFile:
    """The first prompts of a trace file, or of a file to be imported."""
    if path.suffix == ".trace":
        return read(path).head(n_prompts)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "a.trace"
        write_imported(import_files([path], ImportOptions(expert_bytes=EXPERT_BYTES)), output)
        return read(output).head(n_prompts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trace = open_trace(options.trace, options.prompts)
    core = trace.trace()
    n_slots = trace.model.n_expert // 4
    costs = describe(MACHINE).costs(trace.model).costs()
    lookahead = make_lookahead(trace, "recall=0.9")

    def clock(prefetch: str) -> None:
        runtime = Runtime(costs, core.n_expert, core.top_k, n_slots, prefetch=prefetch, preload=True)
        given = lookahead if prefetch == "impact" else None
        # A gap in which two copies fit: the prefetcher must really choose.
        runtime.simulate(core, gap_us=500.0, lookahead=given, keep_layers=False)
        if prefetch != "none" and not runtime.stats()["n_transfers"][TransferKind.PREFETCH]:
            raise RuntimeError("nothing was prefetched: this would measure nothing")

    cases: dict[str, Callable[[], object]] = {
        "LRU, event-atomic": lambda: replay_cache(core, "lru", n_slots),
        "LFU, event-atomic": lambda: replay_cache(core, "lfu", n_slots),
        "Belady, event-atomic": lambda: replay_cache(core, "belady", n_slots),
        "two-threshold on the clock, no prefetch": lambda: clock("none"),
        "two-threshold on the clock, impact prefetch": lambda: clock("impact"),
    }
    n = core.n_tokens * core.n_layers
    print(f"{trace.model.name}: {core.n_tokens} tokens, {n_slots} slots; {MACHINE}; {options.rounds} rounds")
    print("| replay | token-layers per second |")
    print("|---|---|")
    for name, run in cases.items():
        times = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        print(f"| {name} | {n / statistics.median(times):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
