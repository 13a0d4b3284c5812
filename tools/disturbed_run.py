#!/usr/bin/env python3
"""Whether a disturbance of seconds leaves a mark: a model decodes on a stand-in accelerator while busy processes take
the processors for some seconds, and what it is like 20 seconds later is compared with undisturbed runs.

Runs come in pairs, undisturbed and disturbed, in turn; each in its own process. Of each run, in its last seconds:
tokens per second, the share of experts on the accelerator, and the guard's level; and the same before the disturbance.

    python tools/disturbed_run.py demo
    python tools/disturbed_run.py model.gguf --pairs 3 --json disturbed.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_cpu import git_commit, write_json

from hybrimoe.errors import HybrimoeError, as_script
from hybrimoe.machine import host

QUESTION = "Tell me a long story about a river, a bridge and the people who live beside it."
N_CTX = 4096
BUSY = "while True: pass"


@dataclass
class Stretch:
    """Some seconds of decoding."""

    tokens_per_s: float
    gpu_share: float  # of the experts computed
    guard: str  # its level at the end


@dataclass
class Run:
    """One process."""

    is_disturbed: bool
    before: Stretch
    during: Stretch
    after: Stretch


def decode(engine: Any, seconds: float) -> Stretch:
    """Decodes for so long, past every end of an answer: prompts and endings would be noise."""
    engine.reset()
    engine.set_seed(1)
    before = engine.counted()
    n_tokens, begin = -1, 0.0
    for _ in engine.generate(engine.tokenize(QUESTION.encode()), temp=0.8):
        n_tokens += 1
        begin = begin or time.monotonic()
        if time.monotonic() - begin > seconds or n_tokens > N_CTX - 100:
            break
    took = time.monotonic() - begin
    counts = {name: value - before[name] for name, value in engine.counted().items()}
    n_experts = counts["n_experts_gpu"] + counts["n_experts_cpu"]
    share = counts["n_experts_gpu"] / n_experts if n_experts else 0.0
    return Stretch(n_tokens / took, share, engine.expert_state()["guard"]["level"])


def one_run(model: Path, options: argparse.Namespace, is_disturbed: bool) -> Run:
    """In this process: warm up, measure, disturb, wait, measure."""
    from hybrimoe.engine import Engine, EngineOptions
    from hybrimoe.expert_options import CacheSize, ExpertOptions

    experts = ExpertOptions(cache=CacheSize(n_slots=options.expert_cache), devices=("CPU",))
    with Engine(model, EngineOptions(n_ctx=N_CTX, experts=experts)) as engine:
        decode(engine, options.warm)
        before = decode(engine, options.measure)
        processes = []
        if is_disturbed:
            processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.busy_processes)]
        during = decode(engine, options.busy_seconds)
        for process in processes:
            process.kill()
            process.wait()
        decode(engine, options.settle)
        return Run(is_disturbed, before, during, decode(engine, options.measure))


def child(model: Path, options: argparse.Namespace, is_disturbed: bool) -> Run:
    """One run in its own process."""
    command = [
        sys.executable, __file__, str(model), "--child", str(int(is_disturbed)),
        "--expert-cache", str(options.expert_cache), "--warm", str(options.warm), "--measure", str(options.measure),
        "--settle", str(options.settle), "--busy-seconds", str(options.busy_seconds),
        "--busy-processes", str(options.busy_processes),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise HybrimoeError(f"a run ended with {done.returncode}", "its messages stand above")
    data = json.loads(done.stdout.splitlines()[-1])
    return Run(data["is_disturbed"], *(Stretch(**data[name]) for name in ("before", "during", "after")))


def table(runs: list[Run]) -> str:
    """Markdown: a line per run, then medians and ranges."""
    lines = [
        "| run | before: tokens/s | accelerator | guard | during | after | accelerator | guard |",
        "|---" * 8 + "|",
    ]
    for number, r in enumerate(runs):
        kind = "disturbed" if r.is_disturbed else "quiet"
        lines.append(
            f"| {number // 2 + 1} {kind} | {r.before.tokens_per_s:.1f} | {100 * r.before.gpu_share:.0f} % "
            f"| {r.before.guard} | {r.during.tokens_per_s:.1f} | {r.after.tokens_per_s:.1f} "
            f"| {100 * r.after.gpu_share:.0f} % | {r.after.guard} |"
        )
    for is_disturbed, kind in ((False, "quiet"), (True, "disturbed")):
        speeds = [r.after.tokens_per_s for r in runs if r.is_disturbed == is_disturbed]
        shares = [r.after.gpu_share for r in runs if r.is_disturbed == is_disturbed]
        lines.append(
            f"\n{kind}, after: {statistics.median(speeds):.1f} tokens/s ({min(speeds):.1f} to {max(speeds):.1f}), "
            f"{100 * statistics.median(shares):.0f} % of the experts on the accelerator"
        )
    return "\n".join(lines)


@as_script
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model file, or a name that `hybrimoe models` knows")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--expert-cache", type=int, default=6, metavar="SLOTS", help="per layer")
    parser.add_argument("--warm", type=float, default=6.0, metavar="SECONDS")
    parser.add_argument("--measure", type=float, default=6.0, metavar="SECONDS")
    parser.add_argument("--busy-seconds", type=float, default=6.0)
    parser.add_argument("--busy-processes", type=int, default=4)
    parser.add_argument("--settle", type=float, default=20.0, metavar="SECONDS", help="after the disturbance")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    parser.add_argument("--child", type=int, choices=(0, 1), help=argparse.SUPPRESS)
    options = parser.parse_args()
    from hybrimoe.models import store

    model = store.resolve(options.model)
    if options.child is not None:
        print(json.dumps(asdict(one_run(model, options, bool(options.child)))))
        return 0
    runs: list[Run] = []
    for pair in range(options.pairs):
        for is_disturbed in (False, True):
            print(f"pair {pair + 1} of {options.pairs}, {'disturbed' if is_disturbed else 'quiet'}", file=sys.stderr)
            runs.append(child(model, options, is_disturbed))
    print(f"{host.cpu().name}; commit {git_commit()}; {model.name}\n\n{table(runs)}")
    if options.json is not None:
        write_json(options.json, {"cpu": host.cpu().name, "commit": git_commit(), "runs": [asdict(r) for r in runs]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
