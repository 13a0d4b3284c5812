#!/usr/bin/env python3
"""Compares bench's row of plain llama.cpp with the llama-bench program: same model, tests, threads and random tokens.

Both are asked in turns, one repetition each; the ratio is formed within a turn. The program is that of
`tools/build_llama_cpp.py` unless --llama-bench names one, and runs with the libraries of the installed
llama-cpp-python, so that only the measuring differs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_cpu import interval, shown
from build_llama_cpp import find_programs

from hybrimoe.bench.cases import Test
from hybrimoe.bench.rows import Row
from hybrimoe.bench.run import open_stock
from hybrimoe.errors import HybrimoeError, UsageError, as_script


def program_speeds(program: Path, model: Path, test: Test, n_threads: int) -> float:
    """Tokens per second of one repetition of the program. Raises HybrimoeError."""
    import llama_cpp

    libraries = Path(llama_cpp.__file__).parent / "lib"
    command = [str(program), "-m", str(model), "-p", str(test.n_prompt), "-n", str(test.n_gen)]
    command += ["-t", str(n_threads), "-r", "1", "-o", "jsonl"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0 or not done.stdout.strip():
        raise HybrimoeError(f"{program.name} ended with status {done.returncode}", done.stderr.strip()[-200:])
    return float(json.loads(done.stdout.splitlines()[-1])["avg_ts"])


def measure(
    program: Path, model: Path, tests: Sequence[Test], n_turns: int, n_threads: int
) -> dict[str, list[list[float]]]:
    """Per test and turn [program, ours] in tokens per second."""
    found: dict[str, list[list[float]]] = {test.name: [] for test in tests}
    side = open_stock(model, tests, n_threads, n_turns)
    try:
        for turn in range(n_turns):
            for test in tests:
                row: Row = side.row(test)
                if turn % 2 == 0:
                    theirs = program_speeds(program, model, test, n_threads)
                    side.run(row, turn, 0.0)
                else:
                    side.run(row, turn, 0.0)
                    theirs = program_speeds(program, model, test, n_threads)
                found[test.name].append([theirs, row.samples_ts[0]])
            print(f"turn {turn + 1}/{n_turns}", file=sys.stderr)
    finally:
        side.close()
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-p", type=int, default=128, metavar="N", help="prompt tokens (default: %(default)s)")
    parser.add_argument("-n", type=int, default=32, metavar="N", help="generated tokens (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=12, metavar="N", help="(default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="default: one per physical core")
    parser.add_argument("--llama-bench", type=Path, metavar="FILE", help="the program")
    parser.add_argument("--json", action="store_true", help="print every value")
    options = parser.parse_args(argv)
    if min(options.p, options.n, options.turns) < 1:
        parser.error("-p, -n and --turns must be at least 1")
    return options


def run(options: argparse.Namespace) -> None:
    from hybrimoe.gguf_model import inspect
    from hybrimoe.machine import host

    inspect(options.model, header_only=True).require_moe()
    folder = None if options.llama_bench else find_programs(("llama-bench",))
    program = options.llama_bench or (folder and folder / "llama-bench")
    if program is None or not program.is_file():
        raise UsageError("there is no llama-bench", "run tools/build_llama_cpp.py, or name one with --llama-bench")
    n_threads = options.threads or host.n_physical_cores()
    found = measure(program, options.model, [Test(options.p, 0), Test(0, options.n)], options.turns, n_threads)
    if options.json:
        print(json.dumps(found))
        return
    for name, values in found.items():
        theirs, ours = zip(*values, strict=True)
        ratios = [b / a for a, b in values]
        summary = {"median": statistics.median(ratios), "interval_95": interval(ratios)}
        medians = (
            f"llama-bench {statistics.median(theirs):.1f} t/s, bench's stock row {statistics.median(ours):.1f} t/s"
        )
        print(f"{name}: {medians}, ratio {shown(summary, 3)}, {len(values)} turns")


@as_script
def main(argv: Sequence[str] | None = None) -> int:
    run(parse(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
